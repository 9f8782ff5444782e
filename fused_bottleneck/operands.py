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

NO_TAP = 255  # of a pooled element: none of its window is above zero


class Pool(NamedTuple):
    """Kernel, stride, padding and dilation (height, width) of a max pooling, and its rounding."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool

    def output_size(self, height: int, width: int) -> Pair:
        """Spatial size of the output (the formula of nn.MaxPool2d)."""
        h, w = (
            _pooled_size(size, k, s, p, d, self.ceil_mode)
            for size, k, s, p, d in zip((height, width), *self[:4], strict=True)
        )
        return h, w

    def fits(self, height: int, width: int) -> bool:
        """Whether an index of one byte names every element of a window, and every window has one
        inside: past the padding a dilation must not step over the whole input."""
        sides = list(zip((height, width), *self[:4], strict=True))
        return (
            self.kernel[0] * self.kernel[1] <= NO_TAP
            and all(min(k, s, d) >= 1 and 0 <= 2 * p <= k for _, k, s, p, d in sides)
            and all(p == 0 or d <= size for size, _, _, p, d in sides)
            and min(self.output_size(height, width)) >= 1
        )


def _pooled_size(size: int, k: int, s: int, p: int, d: int, ceil_mode: bool) -> int:
    count = (size + 2 * p - d * (k - 1) - 1 + (s - 1 if ceil_mode else 0)) // s + 1
    # The last window has to start inside, or in the padding before.
    return count - 1 if ceil_mode and (count - 1) * s >= size + p else count


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


class PooledGrad(NamedTuple):
    """g: the gradient below a ReLU and a max pooling.

    The sum of grad_out ``[N, C, H', W']`` at the element (tap) of each window that taps, uint8 and
    as large, names: they count row by row, ``NO_TAP`` is where none is above zero. Zero elsewhere.
    """

    grad_out: Tensor
    taps: Tensor
    pool: Pool

    def images(self, i: int, j: int) -> "PooledGrad":
        """The same of images i to j."""
        return PooledGrad(self.grad_out[i:j], self.taps[i:j], self.pool)


class ConvGrad(NamedTuple):
    """``scale * (g - k0 - (y - mean) * k1)``: the gradient of a convolution's output y.

    g is the gradient of the normalised value; k0, k1 None where statistics are fixed. Where g is a
    ``MaskedGrad``, y was computed for this gradient, which may take its memory.
    """

    g: Tensor | MaskedGrad | PooledGrad
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
