"""What the stages compute on: tensors that are described, not stored.

An operand names the narrow tensors and coefficients that it is an elementwise function of. The
implementation of a stage decides whether to materialise it (torch, C++: into scratch) or to
compute it on load (Triton: a prologue).

Activations are ``[N, C, H, W]`` tensors in channels_last memory, so that their matrix
``[pixels, channels]`` is a view (``matrix``); coefficients are ``[C]`` in the accumulation dtype.
"""

from typing import NamedTuple

from torch import Tensor

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Stride, padding, dilation (height, width) and groups of a convolution."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def output_size(self, height: int, width: int, kernel: Pair) -> Pair:
        """Spatial size of the convolution's output (the formula of nn.Conv2d)."""
        h, w = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (height, width), kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return h, w


POINTWISE = Geometry()


class Activation(NamedTuple):
    """``relu((y - mean) * scale + beta) - centre``: a normalised convolution output.

    beta None counts as zero, centre None as zero.
    """

    y: Tensor
    mean: Tensor
    scale: Tensor
    beta: Tensor | None
    centre: Tensor | None = None


class Normalised(NamedTuple):
    """``(y - mean) * scale + beta``: a normalised convolution output before any ReLU.

    beta None counts as zero.
    """

    y: Tensor
    mean: Tensor
    scale: Tensor
    beta: Tensor | None


class StridedInput(NamedTuple):
    """``x[:, :, ::stride] - centre``: the input as a strided 1x1 convolution sees it.

    centre None counts as zero.
    """

    x: Tensor
    stride: Pair
    centre: Tensor | None = None

    def view(self) -> Tensor:
        """The strided view of x, not centred."""
        return strided(self.x, self.stride)


class MaskedGrad(NamedTuple):
    """``g = grad_out * bit``: the gradient below the final ReLU.

    mask: uint8 ``[Q, ceil(W/8)]``, bit k of byte j belongs to channel 8j+k of that pixel.
    """

    grad_out: Tensor
    mask: Tensor


class ConvGrad(NamedTuple):
    """``scale * (g - k0 - (y - mean) * k1)``: the gradient of a convolution's output y.

    g is the gradient of the normalised value; k0, k1 None where statistics are fixed. Where g is a
    ``MaskedGrad``, y was computed for this gradient, which may take its memory.
    """

    g: Tensor | MaskedGrad
    y: Tensor
    mean: Tensor
    scale: Tensor
    k0: Tensor | None
    k1: Tensor | None


def strided(x: Tensor, stride: Pair) -> Tensor:
    """The pixels of x that a 1x1 convolution of that stride sees."""
    return x[:, :, :: stride[0], :: stride[1]]


def matrix(t: Tensor) -> Tensor:
    """The ``[pixels, channels]`` view of a channels_last ``[N, C, H, W]`` tensor."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def pixels(t: Tensor) -> int:
    """Number of pixels ``N*H*W`` of a ``[N, C, H, W]`` tensor."""
    return t.shape[0] * t.shape[2] * t.shape[3]
