"""The stages on CUDA from vendor libraries: cuDNN's convolutions and cuBLAS's products through
aten, everything around them in this library's CUDA passes (csrc/cuda).

For what the Triton kernels do not take (groups, any channel count, float64, older GPUs) and as
their baseline. Whole tensors at a time: a wide tensor is written and read once by a product and the
pass after it, and nothing wide is kept. Also runs on CPU tensors, whose passes have the same
schemas; that is how it is tested without a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .algebra import Folded, OperandGrad, accumulation_dtype
from .junctions import JunctionStages
from .operands import MaskedGrad, matrix
from .pass_stages import PassStages, input_grad, pointwise
from .stages import (
    ConvTerm,
    FoldBackward,
    FoldedTerm,
    FoldForward,
    InputTerm,
    Moments,
    conv2d,
)

_passes = torch.ops.fused_bottleneck

_SUM_ROWS = 4096  # of a second moment in float32; the sums of so many go on in float64


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` (of matrices, or of batches of them) in the accumulation dtype."""
    acc = accumulation_dtype(a.dtype)
    if a.dtype == acc:
        return a @ b
    if a.is_cuda:  # exact products of 16-bit operands, on tensor cores
        return (torch.bmm if a.dim() == 3 else torch.mm)(a, b, out_dtype=acc)
    return a.to(acc) @ b.to(acc)


class VendorStages(JunctionStages, PassStages):
    """``PassStages`` for CUDA tensors, with the coefficient kernels between the stages."""

    def _pixel_product(self, g: Tensor, d: Tensor) -> Tensor:
        return _product(matrix(g).t(), matrix(d))

    def _gram_sums(self, d: Tensor) -> tuple[Tensor, Tensor]:
        if d.dtype.itemsize > 2:
            return super()._gram_sums(d)
        rows = matrix(d)
        whole = len(rows) // _SUM_ROWS * _SUM_ROWS
        sums = []
        if whole:
            blocks = rows[:whole].view(-1, _SUM_ROWS, rows.shape[1])
            sums.append(_product(blocks.transpose(1, 2), blocks).sum(0, dtype=torch.float64))
        if whole < len(rows):
            sums.append(_product(rows[whole:].t(), rows[whole:]).double())
        mean = _passes.channel_moments(rows)[0]
        return mean.double() * len(rows), sum(sums[1:], sums[0])

    # Forward.

    def _value(self, source: FoldedTerm | Tensor) -> Tensor:
        """A residual, or a term without its shift."""
        if isinstance(source, Tensor):
            return source
        return conv2d(self._operand(source.operand), pointwise(source.folded.weight))

    def fold(
        self,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        centre: Tensor,
        mean_d: Tensor,
        cov: Tensor,
    ) -> FoldForward:
        """The product with the covariance, then one kernel."""
        rows, acc = weight.flatten(1).contiguous(), accumulation_dtype(weight.dtype)
        wide = torch.float32 if weight.dtype.itemsize == 2 else torch.float64
        product = (rows.to(wide) @ cov.to(wide)).to(acc)
        mean_d = mean_d.to(acc)
        folded, vectors = _passes.fold_rows(rows, product, gamma, beta, eps, centre, mean_d)
        mean, var, invstd, offset, shift = vectors.unbind()
        return FoldForward(Folded(folded, shift), Moments(mean, var), invstd, offset, product)

    def tail_forward(
        self, terms: Sequence[FoldedTerm], residuals: Sequence[Tensor], channels_last: bool
    ) -> tuple[Tensor, Tensor]:
        sources: list[FoldedTerm | Tensor] = list(terms)
        sources += [self.channels_last(residual) for residual in residuals]
        first, second = (self.channels_last(self._value(source)) for source in sources)
        n, channels, h, w = first.shape
        out = first if terms else self._result(first)  # a product is nobody else's
        shift = self._tail_shift(terms, first)
        mask = torch.empty(n * h * w, -(-channels // 8), dtype=torch.uint8, device=first.device)
        _passes.residual_relu_(matrix(first), None, None, shift, matrix(second), matrix(out), mask)
        return out if channels_last else self._from_channels_last(out), mask

    # Backward.

    def fold_backward(
        self,
        weight: Tensor,
        gamma: Tensor | None,
        invstd: Tensor,
        offset: Tensor,
        centre: Tensor,
        mean_d: Tensor | None,
        weight_cov: Tensor | None,
        a: Tensor,
        s: Tensor,
        sum_g: Tensor,
        count: int,
    ) -> FoldBackward:
        """Two kernels and, with batch statistics, a product."""
        rows = weight.flatten(1).contiguous()
        left = rows.to(s.dtype)
        grad_weight, dgamma, scaled = _passes.fold_backward_rows(
            rows, gamma, invstd, offset, centre, mean_d, weight_cov, s, sum_g, count
        )
        if mean_d is None:
            return FoldBackward(dgamma, grad_weight, OperandGrad(a, None, None))
        b = self._matrix_product(left.t(), scaled).to(a.dtype)
        shift = _passes.operand_shift(a, b, sum_g, mean_d, count)
        return FoldBackward(dgamma, grad_weight, OperandGrad(a, b, shift))

    def input_dgrad(
        self,
        conv: ConvTerm,
        x: Tensor,
        identity: MaskedGrad | None,
        downsample: InputTerm | ConvTerm | None,
        channels_last: bool,
    ) -> Tensor:
        grad_x = input_grad(self._conv_grad(conv.grad), x, conv.weight, conv.geometry)
        if identity is not None:
            self._add_masked(grad_x, identity, 0, len(grad_x), grad_x)
        elif isinstance(downsample, InputTerm):
            self._add_folded_input_grad(grad_x, downsample)
        elif downsample is not None:
            self._add_conv_input_grad(grad_x, downsample)
        return grad_x if channels_last else self._from_channels_last(grad_x)
