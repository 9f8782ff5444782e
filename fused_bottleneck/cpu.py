"""The stages on CPU: oneDNN convolutions through aten, everything around them in C++ passes.

What is wide goes in chunks of images: the product of a chunk and the pass over it happen while it
is in cache, so that of the wide tensors only x, out, grad_out and grad_x touch memory. Narrow
operands are materialised into scratch once per run and found again by the later stages.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor

from .algebra import OperandGrad, accumulation_dtype
from .operands import (
    POINTWISE,
    Activation,
    ConvGrad,
    Geometry,
    MaskedGrad,
    StridedInput,
    matrix,
    pixels,
)
from .scratch import Lease, result_empty
from .stages import (
    ConvTerm,
    FoldedTerm,
    GradSums,
    InputTerm,
    Moments,
    Operand,
    Stages,
    conv2d,
    conv2d_backward,
)

_passes = torch.ops.fused_bottleneck

# A chunk of a wide tensor should stay in the last-level cache together with what it is made from,
# and be large against the weights, which every product reads anew.
_CHUNK_BYTES = 7 * 2**20
_CHUNK_PER_WEIGHT = 8


def _pointwise(weight: Tensor) -> Tensor:
    """A matrix as the weight of a 1x1 convolution."""
    return weight[:, :, None, None]


def operand_key(operand: Operand | ConvGrad) -> tuple[str, int]:
    """What names an operand within a run: its kind and the tensor that it is made from."""
    tensor = operand.x if isinstance(operand, StridedInput) else operand.y
    return type(operand).__name__, id(tensor)


def _image_matrices(t: Tensor) -> Tensor:
    """The ``[N, H*W, C]`` view of a channels_last ``[N, C, H, W]`` tensor."""
    return t.permute(0, 2, 3, 1).reshape(t.shape[0], -1, t.shape[1])


def _bn_apply(act: Activation, relu: bool, out: Tensor) -> None:
    """The activation, with or without its ReLU, into out."""
    y, mean, scale, beta, centre = act
    _passes.bn_apply_(matrix(y), mean, scale, beta, centre, relu, matrix(out))


def _input_grad(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``conv^T(dy)`` in channels_last memory; of x only the shape matters."""
    grad_x, _ = conv2d_backward(dy, x, weight, geometry, (True, False))
    return grad_x.contiguous(memory_format=torch.channels_last)


def _total(sums: Sequence[GradSums]) -> GradSums:
    """The sum over chunks, in order."""
    return GradSums(*(sum(column[1:], column[0]) for column in zip(*sums, strict=True)))


def _pixel_product(g: Tensor, d: Tensor) -> Tensor:
    """``g^T d`` over pixels, ``[W, K]``, in the accumulation dtype.

    In float32 it is the weight gradient of a 1x1 convolution: faster than the matrix product here.
    """
    if g.dtype == torch.float32:
        like = g.new_empty(g.shape[1], d.shape[1], 1, 1)
        return conv2d_backward(g, d, like, POINTWISE, (False, True))[1].flatten(1)
    if g.dtype == torch.float64:
        return matrix(g).t() @ matrix(d)
    return matrix(g).float().t() @ matrix(d).float()


class CpuStages(Stages):
    """The stages with C++ passes (csrc/cpu); see ``Stages`` for what each computes."""

    def __init__(self) -> None:
        self._lease = Lease()
        self._materialised: dict[tuple[str, int], Tensor] = {}
        self._products: dict[tuple[str, int], Tensor] = {}

    def __enter__(self) -> "CpuStages":
        self._lease.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._materialised.clear()
        self._products.clear()
        self._lease.__exit__(kind, error, trace)

    def _scratch(self, like: Tensor) -> Tensor:
        return self._lease.take(like.shape, like.dtype)

    def channels_last(self, t: Tensor) -> Tensor:
        if t.is_contiguous(memory_format=torch.channels_last):
            return t
        out = self._scratch(t)
        if t.is_contiguous():
            _passes.transpose_(t.flatten(2), _image_matrices(out))
        else:
            out.copy_(t)
        return out

    # Operands, materialised once per run.

    def _operand(self, operand: Operand | Tensor) -> Tensor:
        if isinstance(operand, Tensor):
            return operand
        if isinstance(operand, StridedInput):
            return self._strided_input(operand)
        key = operand_key(operand)
        if key not in self._materialised:
            out = self._scratch(operand.y)
            _bn_apply(operand, True, out)
            self._materialised[key] = out
        return self._materialised[key]

    def _strided_input(self, operand: StridedInput) -> Tensor:
        key = operand_key(operand)
        if key not in self._materialised:
            source = operand.view()
            out = self._lease.take(source.shape, source.dtype)
            torch.sub(source, operand.centre.to(source.dtype).view(1, -1, 1, 1), out=out)
            self._materialised[key] = out
        return self._materialised[key]

    def _conv_grad(self, grad: ConvGrad) -> Tensor:
        """dy, in place of g: nothing reads g after it."""
        key = operand_key(grad)
        if key not in self._materialised:
            g = matrix(grad.g)
            _passes.bn_backward_(g, matrix(grad.y), *grad[2:], g)
            self._materialised[key] = grad.g
        return self._materialised[key]

    def _moments(self, y: Tensor) -> Moments:
        mean, m2 = _passes.channel_moments(matrix(y))
        return Moments(mean, m2 / pixels(y))

    def _chunks(self, wide: Tensor, weight_elements: int) -> Iterator[tuple[int, int]]:
        """Ranges of images whose part of a wide tensor stays in cache."""
        image = wide[0].numel() * wide.element_size()
        weight = weight_elements * wide.element_size()
        count = max(1, max(_CHUNK_BYTES, _CHUNK_PER_WEIGHT * weight) // image)
        for start in range(0, wide.shape[0], count):
            yield start, min(start + count, wide.shape[0])

    # Forward.

    def conv(self, source: Tensor | Activation, weight: Tensor, geometry: Geometry) -> Tensor:
        operand = self._operand(source)
        size = (operand.shape[2], operand.shape[3])
        height, width = geometry.output_size(*size, (weight.shape[2], weight.shape[3]))
        out = result_empty((operand.shape[0], weight.shape[0], height, width), operand.dtype, True)
        for i, j in self._chunks(out, weight.numel()):
            out[i:j] = conv2d(operand[i:j], weight, geometry)
        return out

    def _from_channels_last(self, t: Tensor) -> Tensor:
        """A contiguous copy of a channels_last tensor."""
        out = result_empty(t.shape, t.dtype)
        _passes.transpose_(_image_matrices(t), out.flatten(2))
        return out

    def activation(self, act: Activation, channels_last: bool) -> Tensor:
        if not channels_last:
            return self._from_channels_last(self._operand(act))
        out = result_empty(act.y.shape, act.y.dtype, channels_last=True)
        _bn_apply(act, True, out)
        return out

    def normalise_(self, act: Activation) -> Tensor:
        _bn_apply(act, False, act.y)
        return act.y

    def _value_chunk(self, source: FoldedTerm | Tensor, i: int, j: int) -> Tensor:
        """Images i to j of a residual, or of a term without its shift."""
        if isinstance(source, Tensor):
            return source[i:j]
        return conv2d(self._operand(source.operand)[i:j], _pointwise(source.folded.weight))

    def _tail_shape(self, source: FoldedTerm | Tensor) -> tuple[int, ...]:
        if isinstance(source, Tensor):
            return tuple(source.shape)
        n, _, h, w = self._operand(source.operand).shape
        return n, source.folded.weight.shape[0], h, w

    def tail_forward(
        self, terms: Sequence[FoldedTerm], residuals: Sequence[Tensor], channels_last: bool
    ) -> tuple[Tensor, Tensor]:
        sources: list[FoldedTerm | Tensor] = list(terms)
        sources += [self.channels_last(residual) for residual in residuals]
        first, second = sources
        shape = self._tail_shape(first)
        dtype = (first if isinstance(first, Tensor) else first.folded.weight).dtype
        n, channels, h, w = shape
        shift = torch.zeros(channels, dtype=accumulation_dtype(dtype))
        for term in terms:
            shift += term.folded.shift
        out = result_empty(shape, dtype, channels_last)
        mask = torch.empty(n * h * w, -(-channels // 8), dtype=torch.uint8)
        chunks = list(self._chunks(out, sum(term.folded.weight.numel() for term in terms)))
        buffer = out if channels_last else self._scratch(out[: chunks[0][1]])
        for i, j in chunks:
            rows = out[i:j] if channels_last else buffer[: j - i]
            self._tail_images(first, second, shift, i, j, rows, mask[i * h * w : j * h * w])
            if not channels_last:
                _passes.transpose_(_image_matrices(rows), out[i:j].flatten(2))
        return out, mask

    def _tail_images(
        self,
        first: FoldedTerm | Tensor,
        second: FoldedTerm | Tensor,
        shift: Tensor,
        i: int,
        j: int,
        out: Tensor,
        mask: Tensor,
    ) -> None:
        """``out = relu(first + second + shift)`` and its mask, of images i to j."""
        value, residual = self._value_chunk(first, i, j), self._value_chunk(second, i, j)
        _passes.residual_relu_(
            matrix(value), None, None, shift, matrix(residual), matrix(out), mask
        )

    # Backward.

    def tail_wgrad(
        self, grad: MaskedGrad, operands: Sequence[Operand], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """B1, and ``g a`` of every operand in the same pass over g (kept for B2 and B6)."""
        narrow = [self._operand(operand) for operand in operands]
        kept = [self._scratch(d) for d in narrow]
        self._products.update(zip(map(operand_key, operands), kept, strict=True))
        sums: list[Tensor] = []
        products: list[list[Tensor]] = []
        chunks = list(self._chunks(grad.grad_out, sum(a.numel() for a in weights)))
        buffer = self._scratch(grad.grad_out[: chunks[0][1]])
        for i, j in chunks:
            g, sum_g = self._masked_chunk(grad, i, j, buffer[: j - i])
            sums.append(sum_g)
            products.append([_pixel_product(g, d[i:j]) for d in narrow])
            for d, a, product in zip(narrow, weights, kept, strict=True):
                product[i:j] = _input_grad(g, d[i:j], _pointwise(a), POINTWISE)
        totals = [sum(column[1:], column[0]) for column in zip(*products, strict=True)]
        return sum(sums[1:], sums[0]), totals

    def _masked_chunk(
        self, grad: MaskedGrad, i: int, j: int, buffer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """g of images i to j, in the buffer, and its column sums."""
        size = grad.grad_out.shape[2] * grad.grad_out.shape[3]
        rows = grad.mask[i * size : j * size]
        return buffer, _passes.mask_grad_(matrix(grad.grad_out[i:j]), rows, matrix(buffer))

    def _operand_grad_chunks(
        self, operand: Operand, grad: OperandGrad
    ) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        """Chunks of ``g a`` (from B1) and ``D b``: first image, last image, the two products."""
        d = self._operand(operand)
        product = self._products[operand_key(operand)]
        b = None if grad.b is None else _pointwise(grad.b.t().contiguous())
        for i, j in self._chunks(d, 0 if b is None else b.numel()):
            yield i, j, product[i:j], None if b is None else conv2d(d[i:j], b)

    def _reduce(
        self,
        grad: Tensor,
        addend: Tensor | None,
        shift: Tensor | None,
        act: Activation,
        invstd: Tensor,
        out: Tensor,
    ) -> GradSums:
        """``out = (grad + addend + shift) * [a > 0]`` and its two sums."""
        sums = _passes.bn_backward_reduce_(
            matrix(grad),
            None if addend is None else matrix(addend),
            shift,
            matrix(act.y),
            act.mean,
            invstd,
            act.scale,
            act.beta,
            True,
            matrix(out),
        )
        return GradSums(*sums)

    def relu_backward(
        self, grad_out: Tensor, act: Activation, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        g = self._scratch(act.y)
        return g, self._reduce(self.channels_last(grad_out), None, None, act, invstd, g)

    def masked_reduce(
        self, grad: MaskedGrad, y: Tensor, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        g = self._scratch(y)
        self._masked_chunk(grad, 0, y.shape[0], g)
        rows = matrix(g)
        sums = _passes.bn_backward_reduce_(
            rows, None, None, matrix(y), mean, invstd, None, None, False, rows
        )
        return g, GradSums(*sums)

    def tail_dgrad(
        self, grad: MaskedGrad, act: Activation, coefficients: OperandGrad, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        g = self._scratch(act.y)
        sums: list[GradSums] = []
        for i, j, product, addend in self._operand_grad_chunks(act, coefficients):
            part = act._replace(y=act.y[i:j])
            sums.append(self._reduce(product, addend, coefficients.shift, part, invstd, g[i:j]))
        return g, _total(sums)

    def conv_dgrad(
        self, grad: ConvGrad, weight: Tensor, geometry: Geometry, act: Activation, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        dy = self._conv_grad(grad)
        g = self._scratch(act.y)
        sums: list[GradSums] = []
        for i, j in self._chunks(act.y, weight.numel()):
            part = act._replace(y=act.y[i:j])
            value = _input_grad(dy[i:j], part.y, weight, geometry)
            sums.append(self._reduce(value, None, None, part, invstd, g[i:j]))
        return g, _total(sums)

    def masked_grad(self, grad: MaskedGrad) -> Tensor:
        g = result_empty(grad.grad_out.shape, grad.grad_out.dtype, channels_last=True)
        self._masked_chunk(grad, 0, g.shape[0], g)
        return g

    def input_dgrad(
        self,
        conv: ConvTerm,
        x: Tensor,
        identity: MaskedGrad | None,
        downsample: InputTerm | ConvTerm | None,
        channels_last: bool,
    ) -> Tensor:
        grad_x = result_empty(x.shape, x.dtype, True) if channels_last else self._scratch(x)
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
            value = _input_grad(dy[i:j], rows, conv.weight, conv.geometry)
            if identity is not None:
                self._add_masked(value, identity, i, j, rows)
            else:
                rows.copy_(value)

    def _add_masked(self, value: Tensor, grad: MaskedGrad, i: int, j: int, out: Tensor) -> None:
        """``out = value + g`` for images i to j."""
        size = value.shape[2] * value.shape[3]
        rows = grad.mask[i * size : j * size]
        _passes.masked_add_(matrix(value), matrix(grad.grad_out[i:j]), rows, matrix(out))

    def _add_conv_input_grad(self, grad_x: Tensor, conv: ConvTerm) -> None:
        """``grad_x += conv^T(dy)``."""
        dy = self._conv_grad(conv.grad)
        for i, j in self._chunks(grad_x, conv.weight.numel()):
            grad_x[i:j].add_(_input_grad(dy[i:j], grad_x[i:j], conv.weight, conv.geometry))

    def _add_folded_input_grad(self, grad_x: Tensor, term: InputTerm) -> None:
        """``grad_x[strided] += g a + D b + shift``."""
        target = term.operand._replace(x=grad_x).view()
        coefficients = term.coefficients
        for i, j, product, addend in self._operand_grad_chunks(term.operand, coefficients):
            if addend is not None and coefficients.shift is not None:
                product = product.add_(addend).add_(coefficients.shift.view(1, -1, 1, 1))
            target[i:j].add_(product)
