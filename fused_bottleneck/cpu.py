"""The stages on CPU: oneDNN convolutions through aten, everything around them in C++ passes.

What is wide goes in chunks of images: the product of a chunk and the pass over it happen while it
is in cache, so that of the wide tensors only x, out, grad_out and grad_x touch memory. Memory comes
from pools (scratch.py).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from types import TracebackType

import torch
from torch import Tensor

from . import extension
from .operands import (
    POINTWISE,
    Activation,
    ConvGrad,
    Geometry,
    MaskedGrad,
    Normalised,
    Pool,
    PooledGrad,
)
from .pass_stages import PassStages, TailSource, input_grad, operand_key, pointwise
from .scratch import Lease, result_empty
from .stages import (
    ConvTerm,
    FoldedTerm,
    GradSums,
    InputTerm,
    conv2d,
    conv2d_backward,
    output_dtype,
)

_passes = torch.ops.fused_bottleneck

# A chunk of a wide tensor should stay in the last-level cache together with what it is made from,
# and be large against the weights, which every product reads anew.
_CHUNK_BYTES = 7 * 2**20
_CHUNK_PER_WEIGHT = 8


CHANNEL_MULTIPLE = 16


def products_fit(*channels: int) -> bool:
    """Whether this library's products can take matrices of so many channels."""
    return all(c % CHANNEL_MULTIPLE == 0 for c in channels)


@lru_cache(maxsize=4096)
def workspace_bytes(family: str, threads: int, *sizes: int | bool) -> int:
    """The bytes that an op of a family needs; sizes and the number of threads decide."""
    return getattr(_passes, f"{family}_workspace")(*sizes)


def chunk_images(wide: Tensor, weight_elements: int) -> int:
    """How many images of a wide tensor to make at a time, with weights of so many elements."""
    image = wide[0].numel() * wide.element_size()
    weight = weight_elements * wide.element_size()
    return max(1, max(_CHUNK_BYTES, _CHUNK_PER_WEIGHT * weight) // image)


def _windows(pool: Pool) -> list[int]:
    """A pooling as its passes take it."""
    return [*pool.kernel, *pool.stride, *pool.padding, *pool.dilation]


def _image_matrices(t: Tensor) -> Tensor:
    """The ``[N, H*W, C]`` view of a channels_last ``[N, C, H, W]`` tensor."""
    return t.permute(0, 2, 3, 1).reshape(t.shape[0], -1, t.shape[1])


class CpuStages(PassStages):
    """``PassStages`` for CPU tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._lease = Lease()
        self._lent: dict[str, Tensor] = {}

    def __enter__(self) -> "CpuStages":
        self._lease.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._lent.clear()
        self._lease.__exit__(kind, error, trace)

    # Memory, chunks and the products over pixels.

    def _scratch(self, like: Tensor) -> Tensor:
        return self._lease.take(like.shape, like.dtype)

    def _result(self, like: Tensor, channels_last: bool = True) -> Tensor:
        return result_empty(like.shape, like.dtype, channels_last)

    def _scratch_or_result(self, like: Tensor, channels_last: bool) -> Tensor:
        """Memory for what is to be given out, transposed first if not channels_last."""
        return self._result(like) if channels_last else self._scratch(like)

    def channels_last(self, t: Tensor) -> Tensor:
        if t.is_contiguous(memory_format=torch.channels_last):
            return t
        out = self._scratch(t)
        if t.is_contiguous():
            _passes.transpose_(t.flatten(2), _image_matrices(out))
        else:
            out.copy_(t)
        return out

    def _from_channels_last(self, t: Tensor) -> Tensor:
        out = self._result(t, channels_last=False)
        _passes.transpose_(_image_matrices(t), out.flatten(2))
        return out

    def _chunks(self, wide: Tensor, weight_elements: int) -> Iterator[tuple[int, int]]:
        """Ranges of images whose part of a wide tensor stays in cache."""
        count = chunk_images(wide, weight_elements)
        for start in range(0, wide.shape[0], count):
            yield start, min(start + count, wide.shape[0])

    def _pixel_product(self, g: Tensor, d: Tensor) -> Tensor:
        """In float32 as the weight gradient of a 1x1 convolution: faster than the matrix product
        here, and as this library's own product where that can be."""
        if g.dtype == torch.float64:
            return super()._pixel_product(g, d)
        g, d = self._widened(g, "g"), self._widened(d, "d")
        if extension.has_products() and products_fit(g.shape[1], d.shape[1]):
            return _passes.transposed_product(g, d, self._lend_product(g, d.shape[1]))
        like = g.new_empty(g.shape[1], d.shape[1], 1, 1)
        return conv2d_backward(g, d, like, POINTWISE, (False, True))[1].flatten(1)

    def _widened(self, t: Tensor, name: str) -> Tensor:
        """The tensor in float32, valid until the next of that name."""
        if t.dtype == torch.float32:
            return t
        n, c, h, w = t.shape
        flat = self._lend(4 * t.numel(), name)[: 4 * t.numel()].view(torch.float32)
        return flat.view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)

    def _lend(self, size: int, name: str = "workspace") -> Tensor:
        """At least that many bytes, the same ones for each use of a name."""
        if name not in self._lent or self._lent[name].numel() < size:
            self._lent[name] = self._lease.swap(self._lent.get(name), size)
        return self._lent[name]

    def _lend_product(self, a: Tensor, channels: int) -> Tensor:
        """Memory for a product of ``[N, K, H, W]`` pixels, or of a ``[P, K]`` matrix's rows, with
        ``channels`` others or outputs."""
        sizes = a.numel() // a.shape[1], a.shape[1], channels
        return self._lend(workspace_bytes("product", torch.get_num_threads(), *sizes))

    # Forward.

    def conv(self, source: Tensor | Activation, weight: Tensor, geometry: Geometry) -> Tensor:
        operand = self._operand(source)
        size = (operand.shape[2], operand.shape[3])
        height, width = geometry.output_size(*size, (weight.shape[2], weight.shape[3]))
        out = result_empty((operand.shape[0], weight.shape[0], height, width), operand.dtype, True)
        self._conv_into(source, weight, geometry, out, 0)
        return out

    def _conv_into(
        self,
        source: Tensor | Activation,
        weight: Tensor,
        geometry: Geometry,
        out: Tensor,
        first: int,
    ) -> None:
        """``conv(source)`` from its first-th image on, into the same images of out."""
        operand, out = self._operand(source)[first:], out[first:]
        for i, j in self._chunks(out, weight.numel()):
            out[i:j] = conv2d(operand[i:j], weight, geometry)

    def kept(self, y: Tensor) -> Tensor:
        return self._result(y).copy_(y)

    def conv_again(
        self, source: Tensor | Activation, weight: Tensor, geometry: Geometry, kept: Tensor
    ) -> Tensor:
        count, first = self._operand(source).shape[0], kept.shape[0]
        y = self._lease.take((count, *kept.shape[1:]), kept.dtype)
        y[:first] = kept
        if first < count:
            self._conv_into(source, weight, geometry, y, first)
        return y

    def pooled(self, act: Activation, pool: Pool, channels_last: bool) -> tuple[Tensor, Tensor]:
        """Straight from y: the activation is never there."""
        y, mean, scale, beta, _ = act
        shape = (*y.shape[:2], *pool.output_size(y.shape[2], y.shape[3]))
        out = (
            result_empty(shape, y.dtype, True)
            if channels_last
            else self._lease.take(shape, y.dtype)
        )
        taps = torch.empty_like(out, dtype=torch.uint8)
        _passes.bn_relu_pool_(y, mean, scale, beta, _windows(pool), out, taps)
        return out if channels_last else self._from_channels_last(out), taps

    def _tail_shape(self, source: TailSource) -> tuple[int, ...]:
        if isinstance(source, Tensor):
            return tuple(source.shape)
        if isinstance(source, Normalised):
            return tuple(source.y.shape)
        n, _, h, w = self._operand(source.operand).shape
        return n, source.folded.weight.shape[0], h, w

    def tail_forward(
        self,
        terms: Sequence[FoldedTerm],
        residuals: Sequence[Tensor | Normalised],
        channels_last: bool,
    ) -> tuple[Tensor, Tensor]:
        first, second = self._tail_sources(terms, residuals)
        shape = self._tail_shape(first)
        n, channels, h, w = shape
        out = result_empty(shape, output_dtype(terms, residuals), channels_last)
        shift = self._tail_shift(first, second, out)
        mask = torch.empty(n * h * w, -(-channels // 8), dtype=torch.uint8)
        chunks = [(0, n)]
        if not channels_last or any(map(self._has_value, (first, second))):
            chunks = list(self._chunks(out, sum(term.folded.weight.numel() for term in terms)))
        buffer = out if channels_last else self._scratch(out[: chunks[0][1]])
        for i, j in chunks:
            rows = out[i:j] if channels_last else buffer[: j - i]
            self._tail_images(first, second, shift, i, j, rows, mask[i * h * w : j * h * w])
            if not channels_last:
                _passes.transpose_(_image_matrices(rows), out.flatten(2), i)
        return out, mask

    def _has_value(self, source: TailSource) -> bool:
        """Whether what a source adds is computed into a tensor of its own first."""
        return isinstance(source, FoldedTerm)

    def _value_chunk(self, source: FoldedTerm | Tensor, i: int, j: int) -> Tensor:
        """Images i to j of a residual, or of a term without its shift."""
        if isinstance(source, Tensor):
            return source[i:j]
        return conv2d(self._operand(source.operand)[i:j], pointwise(source.folded.weight))

    def _tail_images(
        self,
        first: TailSource,
        second: FoldedTerm | Tensor,
        shift: Tensor,
        i: int,
        j: int,
        out: Tensor,
        mask: Tensor,
    ) -> None:
        """``out = relu(first + second + shift)`` and its mask, of images i to j."""
        if isinstance(first, Normalised):
            value: Tensor | Normalised = first._replace(y=first.y[i:j])
        else:
            value = self._value_chunk(first, i, j)
        self._residual_relu(value, self._value_chunk(second, i, j), shift, out, mask)

    # Backward.

    def pooled_reduce(self, grad: PooledGrad, y: Tensor, mean: Tensor, invstd: Tensor) -> GradSums:
        windows = _windows(grad.pool)
        return GradSums(
            *_passes.pool_bn_backward_reduce(grad.grad_out, grad.taps, windows, y, mean, invstd)
        )

    def conv_backward(
        self,
        grad: ConvGrad,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        needs: tuple[bool, bool],
        channels_last: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Below a pooling for a few images at a time, so that no whole dy exists."""
        if not isinstance(grad.g, PooledGrad) or not any(needs):
            return super().conv_backward(grad, x, weight, geometry, needs, channels_last)
        chunks = list(self._chunks(grad.y, weight.numel()))
        if weight.dtype.itemsize == 2:  # each chunk's part of the weight's gradient is rounded
            chunks = [(0, len(x))]
        buffer = self._scratch(grad.y[: chunks[0][1]])
        grad_x = self._scratch_or_result(x, channels_last) if needs[0] else None
        grad_weight = None
        for i, j in chunks:
            part, images = grad._replace(g=grad.g.images(i, j), y=grad.y[i:j]), x[i:j]
            self._unpooled_conv_grad(part, buffer[: j - i])
            if needs[1]:
                value = self.conv_wgrad(part, images, weight, geometry)
                grad_weight = value if grad_weight is None else grad_weight.add_(value)
            if grad_x is not None:
                term = ConvTerm(part, weight, geometry)
                self._conv_input_grad_into(term, None, grad_x[i:j])
            self._materialised.clear()  # whose keys are the ids of this chunk's tensors
        if grad_x is not None and not channels_last:
            grad_x = self._from_channels_last(grad_x)
        return grad_x, grad_weight

    def _unpooled_conv_grad(self, grad: ConvGrad, out: Tensor) -> None:
        """dy below a pooling into out, where the stages of the convolution find it."""
        pooled, y, *coefficients = grad
        assert isinstance(pooled, PooledGrad)
        windows = _windows(pooled.pool)
        _passes.pool_bn_backward_(pooled.grad_out, pooled.taps, windows, y, *coefficients, out)
        self._materialised[operand_key(grad)] = out

    def input_dgrad(
        self,
        conv: ConvTerm,
        x: Tensor,
        identity: MaskedGrad | None,
        downsample: InputTerm | ConvTerm | None,
        channels_last: bool,
    ) -> Tensor:
        grad_x = self._scratch_or_result(x, channels_last)
        self._conv_input_grad_into(conv, identity, grad_x)
        if isinstance(downsample, InputTerm):
            self._add_folded_input_grad(grad_x, downsample)
        elif downsample is not None:
            self._add_conv_input_grad(grad_x, downsample)
        return grad_x if channels_last else self._from_channels_last(grad_x)

    def _conv_input_grad_into(
        self, conv: ConvTerm, identity: MaskedGrad | None, grad_x: Tensor
    ) -> None:
        """``grad_x = conv^T(dy) + g``."""
        dy = self._conv_grad(conv.grad)
        for i, j in self._chunks(grad_x, conv.weight.numel()):
            rows = grad_x[i:j]
            value = input_grad(dy[i:j], rows, conv.weight, conv.geometry)
            if identity is not None:
                self._add_masked(value, identity, i, j, rows)
            else:
                rows.copy_(value)
