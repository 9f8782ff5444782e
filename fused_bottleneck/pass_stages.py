"""Stages made of aten's convolutions (oneDNN, cuDNN) and the C++ passes around them.

Operands are materialised into scratch once per run and found again by the later stages. Where a
wide tensor goes in chunks of images is for the subclass to say, as is where memory comes from:
``CpuStages`` (cpu.py) and ``VendorStages`` (vendor.py).
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
    Normalised,
    StridedInput,
    matrix,
    pixels,
)
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

TailSource = FoldedTerm | Normalised | Tensor


def pointwise(weight: Tensor) -> Tensor:
    """A matrix as the weight of a 1x1 convolution."""
    return weight[:, :, None, None]


def operand_key(operand: Operand | ConvGrad) -> tuple[str, int]:
    """What names an operand within a run: its kind and the tensor that it is made from."""
    tensor = operand.x if isinstance(operand, StridedInput) else operand.y
    return type(operand).__name__, id(tensor)


def _bn_apply(act: Activation, out: Tensor) -> None:
    """The activation into out."""
    y, mean, scale, beta, centre = act
    _passes.bn_apply_(y, mean, scale, beta, centre, True, out)


def input_grad(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``conv^T(dy)`` in channels_last memory; of x only the shape matters."""
    grad_x, _ = conv2d_backward(dy, x, weight, geometry, (True, False))
    return grad_x.contiguous(memory_format=torch.channels_last)


def _total(sums: Sequence[GradSums]) -> GradSums:
    """The sum over chunks, in order."""
    return GradSums(*(sum(column[1:], column[0]) for column in zip(*sums, strict=True)))


class PassStages(Stages):
    """The stages with C++ passes (csrc); see ``Stages`` for what each computes."""

    def __init__(self) -> None:
        self._materialised: dict[tuple[str, int], Tensor] = {}
        self._products: dict[tuple[str, int], Tensor] = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._materialised.clear()
        self._products.clear()

    # Memory, chunks and the products over pixels.

    def _scratch(self, like: Tensor) -> Tensor:
        """Channels_last memory of the shape and dtype of a tensor, for this run."""
        return torch.empty_like(like, memory_format=torch.channels_last)

    def _result(self, like: Tensor, channels_last: bool = True) -> Tensor:
        """Memory of the shape and dtype of a tensor, for the user."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty_like(like, memory_format=layout)

    def _from_channels_last(self, t: Tensor) -> Tensor:
        """A contiguous copy of a channels_last tensor."""
        return t.contiguous()

    def _chunks(self, wide: Tensor, weight_elements: int) -> Iterator[tuple[int, int]]:
        """Ranges of images in which a wide tensor goes from its product to its pass."""
        yield 0, wide.shape[0]

    def _pixel_product(self, g: Tensor, d: Tensor) -> Tensor:
        """``g^T d`` over pixels, ``[W, K]``, in the accumulation dtype."""
        acc = accumulation_dtype(g.dtype)
        return matrix(g).to(acc).t() @ matrix(d).to(acc)

    # Operands, materialised once per run.

    def _operand(self, operand: Operand | Tensor) -> Tensor:
        if isinstance(operand, Tensor):
            return operand
        if isinstance(operand, StridedInput):
            return self._strided_input(operand)
        key = operand_key(operand)
        if key not in self._materialised:
            out = self._scratch(operand.y)
            _bn_apply(operand, out)
            self._materialised[key] = out
        return self._materialised[key]

    def _strided_input(self, operand: StridedInput) -> Tensor:
        key = operand_key(operand)
        if key not in self._materialised:
            source = operand.view()
            out = self._scratch(source)
            assert operand.centre is not None
            torch.sub(source, operand.centre.to(source.dtype).view(1, -1, 1, 1), out=out)
            self._materialised[key] = out
        return self._materialised[key]

    def _conv_grad(self, grad: ConvGrad) -> Tensor:
        """dy, in place of g, which nothing reads after it; of a masked one, in place of y."""
        key = operand_key(grad)
        if key not in self._materialised:
            g, y, *coefficients = grad
            if isinstance(g, Tensor):
                _passes.bn_backward_(g, y, *coefficients, g)
                self._materialised[key] = g
            else:
                assert isinstance(g, MaskedGrad)  # a pooled one is CpuStages'
                _passes.masked_bn_backward_(*g, y, *coefficients, y)
                self._materialised[key] = y
        return self._materialised[key]

    def _moments(self, y: Tensor) -> Moments:
        mean, m2 = _passes.channel_moments(y)
        return Moments(mean, m2 / pixels(y))

    # Forward.

    def activation(self, act: Activation, channels_last: bool) -> Tensor:
        if not channels_last:
            return self._from_channels_last(self._operand(act))
        out = self._result(act.y)
        _bn_apply(act, out)
        return out

    def _tail_sources(
        self, terms: Sequence[FoldedTerm], residuals: Sequence[Tensor | Normalised]
    ) -> tuple[TailSource, FoldedTerm | Tensor]:
        """What the output is the sum of; of residuals the first may be normalised as it is added,
        any other is so in place."""
        normalised = [r for r in residuals if isinstance(r, Normalised)]
        plain = [self.channels_last(r) for r in residuals if isinstance(r, Tensor)]
        sources: list[TailSource] = [*terms, *normalised, *plain]
        first, second = sources
        if isinstance(second, Normalised):
            y, mean, scale, beta = second
            _passes.bn_apply_(y, mean, scale, beta, None, False, y)
            second = y
        return first, second

    def _tail_shift(self, first: TailSource, second: TailSource, like: Tensor) -> Tensor:
        """The sum of what the sources are shifted by, ``[W]``, for an output like a tensor."""
        shifts = [s.folded.shift for s in (first, second) if isinstance(s, FoldedTerm)]
        if isinstance(first, Normalised) and first.beta is not None:
            shifts.append(first.beta)
        if not shifts:
            return like.new_zeros(like.shape[1], dtype=accumulation_dtype(like.dtype))
        return sum(shifts[1:], shifts[0])

    def _residual_relu(
        self,
        first: Tensor | Normalised,
        second: Tensor,
        shift: Tensor,
        out: Tensor,
        mask: Tensor,
    ) -> None:
        """``out = relu(first + second + shift)`` and its mask; shift has the beta of first."""
        if isinstance(first, Normalised):
            y, mean, scale = first[:3]
        else:
            y, mean, scale = first, None, None
        _passes.residual_relu_(y, mean, scale, shift, second, out, mask)

    # Backward.

    def tail_wgrad(
        self, grad: MaskedGrad, operands: Sequence[Operand], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """B1, and ``g a`` of every operand in the same pass over g (kept for B2 and B6)."""
        narrow = [self._operand(operand) for operand in operands]
        chunks = list(self._chunks(grad.grad_out, sum(a.numel() for a in weights)))
        buffer = self._scratch(grad.grad_out[: chunks[0][1]])
        kept = [self._scratch(d) for d in narrow] if len(chunks) > 1 else []
        sums: list[Tensor] = []
        products: list[list[Tensor]] = []
        for i, j in chunks:
            g, sum_g = self._masked_chunk(grad, i, j, buffer[: j - i])
            sums.append(sum_g)
            products.append([self._pixel_product(g, d[i:j]) for d in narrow])
            values = [
                input_grad(g, d[i:j], pointwise(a), POINTWISE)
                for d, a in zip(narrow, weights, strict=True)
            ]
            if kept:
                for product, value in zip(kept, values, strict=True):
                    product[i:j] = value
        self._products.update(zip(map(operand_key, operands), kept or values, strict=True))
        totals = [sum(column[1:], column[0]) for column in zip(*products, strict=True)]
        return sum(sums[1:], sums[0]), totals

    def _masked_chunk(
        self, grad: MaskedGrad, i: int, j: int, buffer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """g of images i to j, in the buffer, and its column sums."""
        size = grad.grad_out.shape[2] * grad.grad_out.shape[3]
        rows = grad.mask[i * size : j * size]
        return buffer, _passes.mask_grad_(grad.grad_out[i:j], rows, buffer)

    def _operand_grad_chunks(
        self, operand: Operand, grad: OperandGrad
    ) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        """Chunks of ``g a`` (from B1) and ``D b``: first image, last image, the two products."""
        d = self._operand(operand)
        product = self._products[operand_key(operand)]
        b = None if grad.b is None else pointwise(grad.b.t().contiguous())
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
            grad,
            addend,
            shift,
            act.y,
            act.mean,
            invstd,
            act.scale,
            act.beta,
            out,
        )
        return GradSums(*sums)

    def relu_backward(
        self, grad_out: Tensor, act: Activation, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        g = self._scratch(act.y)
        return g, self._reduce(self.channels_last(grad_out), None, None, act, invstd, g)

    def masked_reduce(self, grad: MaskedGrad, y: Tensor, mean: Tensor, invstd: Tensor) -> GradSums:
        return GradSums(*_passes.masked_bn_backward_reduce(*grad, y, mean, invstd))

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
            value = input_grad(dy[i:j], part.y, weight, geometry)
            sums.append(self._reduce(value, None, None, part, invstd, g[i:j]))
        return g, _total(sums)

    def masked_grad(self, grad: MaskedGrad) -> Tensor:
        g = self._result(grad.grad_out)
        self._masked_chunk(grad, 0, g.shape[0], g)
        return g

    def _add_masked(self, value: Tensor, grad: MaskedGrad, i: int, j: int, out: Tensor) -> None:
        """``out = value + g`` for images i to j."""
        size = value.shape[2] * value.shape[3]
        rows = grad.mask[i * size : j * size]
        _passes.masked_add_(value, grad.grad_out[i:j], rows, out)

    def _add_conv_input_grad(self, grad_x: Tensor, conv: ConvTerm) -> None:
        """``grad_x += conv^T(dy)``."""
        dy = self._conv_grad(conv.grad)
        for i, j in self._chunks(grad_x, conv.weight.numel()):
            grad_x[i:j].add_(input_grad(dy[i:j], grad_x[i:j], conv.weight, conv.geometry))

    def _add_folded_input_grad(self, grad_x: Tensor, term: InputTerm) -> None:
        """``grad_x[strided] += g a + D b + shift``."""
        target = term.operand._replace(x=grad_x).view()
        coefficients = term.coefficients
        for i, j, product, addend in self._operand_grad_chunks(term.operand, coefficients):
            if addend is not None and coefficients.shift is not None:
                product = product.add_(addend).add_(coefficients.shift.view(1, -1, 1, 1))
            target[i:j].add_(product)
