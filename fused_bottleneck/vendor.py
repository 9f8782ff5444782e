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

from .algebra import accumulation_dtype
from .junctions import JunctionStages
from .operands import MaskedGrad, Normalised, StridedInput, matrix
from .pass_stages import PassStages, input_grad, pointwise
from .stages import (
    ConvTerm,
    FoldedTerm,
    InputTerm,
    Operand,
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

    def gram(self, operand: Operand) -> tuple[Tensor, Tensor]:
        """The mean rounded to the accumulation dtype, as the coefficient kernels read it."""
        mean, cov = super().gram(operand)
        source = operand.x if isinstance(operand, StridedInput) else operand.y
        return mean.to(accumulation_dtype(source.dtype)), cov

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
        value = conv2d(self._operand(source.operand), pointwise(source.folded.weight))
        return self.channels_last(value)

    def tail_forward(
        self,
        terms: Sequence[FoldedTerm],
        residuals: Sequence[Tensor | Normalised],
        channels_last: bool,
    ) -> tuple[Tensor, Tensor]:
        first, second = self._tail_sources(terms, residuals)
        value = first if isinstance(first, Normalised) else self._value(first)
        residual = self._value(second)
        # A product is nobody else's.
        out = value if terms and isinstance(value, Tensor) else self._result(residual)
        shift = self._tail_shift(first, second, out)
        n, channels, h, w = out.shape
        mask = torch.empty(n * h * w, -(-channels // 8), dtype=torch.uint8, device=out.device)
        self._residual_relu(value, residual, shift, out, mask)
        return out if channels_last else self._from_channels_last(out), mask

    # Backward.

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
