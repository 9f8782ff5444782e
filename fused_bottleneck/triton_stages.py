"""The stages on CUDA: one Triton kernel each (kernels/), and a small one to combine its partials.

Operands are computed on load, or written to scratch first where they are loaded often
(``rules.writes_operand``). Nothing else is materialised but what a stage returns.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from . import extension, rules
from .algebra import FoldBackward, FoldForward, OperandGrad
from .junctions import JunctionStages
from .kernels import conv1x1, conv2d, fold, gram, pointwise, tail, wgrad
from .operands import POINTWISE, Activation, ConvGrad, Geometry, MaskedGrad, Normalised
from .stages import (
    ConvTerm,
    FoldedTerm,
    GradSums,
    InputTerm,
    Moments,
    Operand,
)


def input_precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: "tf32" where torch's convolutions are, else "ieee".

    All of a block's products are a convolution's or its gradient's, so that
    ``torch.backends.cudnn`` rules (``allow_tf32``, ``conv.fp32_precision``), as it does in nn.
    """
    is_tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if is_tf32 and dtype == torch.float32 else "ieee"


def _affine(act: Activation) -> Activation:
    """The activation with a beta, zero if it has none."""
    return act if act.beta is not None else act._replace(beta=torch.zeros_like(act.mean))


def _is_pointwise(weight: Tensor, geometry: Geometry) -> bool:
    """A 1x1 convolution whose output has its input's pixels."""
    return geometry == POINTWISE and weight.shape[2] == weight.shape[3] == 1


def _in_layout(t: Tensor, channels_last: bool) -> Tensor:
    return t if channels_last else t.contiguous()


class TritonStages(JunctionStages):
    """The stages with Triton kernels; see ``Stages`` for what each computes."""

    def __init__(self, x: Tensor) -> None:
        """x: the program's input, for its device and dtype."""
        self._device: Any = torch.cuda.device(x.device) if x.device.type == "cuda" else None
        self._precision = input_precision(x.dtype)
        self.has_junctions = x.device.type == "cuda" and not extension.why_no_cuda()
        self._written: tuple[ConvGrad, Tensor] | None = None

    def __enter__(self) -> "TritonStages":
        if self._device is not None:
            self._device.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._device is not None:
            self._device.__exit__(kind, error, trace)

    # Operands.

    def _source(self, source: Tensor | Activation, weight: Tensor) -> Tensor | Activation:
        """A convolution's input as its product takes it: written, or to be computed on load."""
        if isinstance(source, Tensor):
            return source
        source = _affine(source)
        taps = weight.shape[2] * weight.shape[3]
        return pointwise.activation(source) if rules.writes_operand(taps) else source

    def _dy(self, grad: ConvGrad) -> Tensor | ConvGrad:
        """The gradient of a convolution's output as products take it.

        Two of them do, one after the other (B3 and B4, B5 and B6): it is kept until another is
        asked for.
        """
        if not rules.writes_operand(2):
            return grad
        if self._written is None or self._written[0] is not grad:
            self._written = grad, pointwise.conv_grad(grad)
        return self._written[1]

    # Forward.

    def conv_forward(
        self, source: Tensor | Activation, weight: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Moments]:
        if isinstance(source, Tensor) and _is_pointwise(weight, geometry):
            return conv1x1.conv1x1_forward(source, weight.contiguous(), self._precision)
        source = self._source(source, weight)
        return conv2d.conv2d_forward(source, weight, geometry, self._precision)

    def conv(self, source: Tensor | Activation, weight: Tensor, geometry: Geometry) -> Tensor:
        return self.conv_forward(source, weight, geometry)[0]

    def activation(self, act: Activation, channels_last: bool) -> Tensor:
        return _in_layout(pointwise.activation(_affine(act)), channels_last)

    def gram(self, operand: Operand) -> tuple[Tensor, Tensor]:
        if isinstance(operand, Activation):
            operand = _affine(operand)
        return gram.gram(operand, self._precision)

    def fold(
        self,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centre: Tensor,
        mean_d: Tensor,
        cov: Tensor,
    ) -> FoldForward:
        if self.has_junctions:
            return super().fold(weight, gamma, beta, bias, eps, centre, mean_d, cov)
        return fold.fold(weight.contiguous(), gamma, beta, bias, eps, centre, mean_d, cov)

    def tail_forward(
        self,
        terms: Sequence[FoldedTerm],
        residuals: Sequence[Tensor | Normalised],
        channels_last: bool,
    ) -> tuple[Tensor, Tensor]:
        first, *others = terms
        assert isinstance(first.operand, Activation)
        first = first._replace(operand=_affine(first.operand))
        residual = None
        if residuals:
            assert isinstance(residuals[0], Tensor)  # a normalised one is of the product way
            residual = self.channels_last(residuals[0])
        out, mask = tail.tail_forward([first, *others], residual, self._precision)
        return _in_layout(out, channels_last), mask

    # Backward.

    def folded_weight(self, weight: Tensor, gamma: Tensor | None, invstd: Tensor) -> Tensor:
        if self.has_junctions:
            return super().folded_weight(weight, gamma, invstd)
        return fold.folded_weight(weight.contiguous(), gamma, invstd)

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
        if self.has_junctions or mean_d is None or weight_cov is None:
            return super().fold_backward(
                weight, gamma, invstd, offset, centre, mean_d, weight_cov, a, s, sum_g, count
            )
        return fold.fold_backward(
            weight.contiguous(), gamma, invstd, offset, mean_d, weight_cov, a, s, sum_g, count
        )

    def tail_wgrad(
        self, grad: MaskedGrad, operands: Sequence[Operand], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        act, *others = operands
        if not isinstance(act, Activation):
            return super().tail_wgrad(grad, operands, weights)
        return wgrad.tail_wgrad(grad, [_affine(act), *others], self._precision)

    def tail_dgrad(
        self, grad: MaskedGrad, act: Activation, coefficients: OperandGrad, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        return tail.tail_dgrad(grad, _affine(act), coefficients, invstd, self._precision)

    def relu_backward(
        self, grad_out: Tensor, act: Activation, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        return pointwise.relu_backward(self.channels_last(grad_out), _affine(act), invstd)

    def conv_dgrad(
        self, grad: ConvGrad, weight: Tensor, geometry: Geometry, act: Activation, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        act = _affine(act)
        g, sums = conv2d.conv2d_dgrad(
            self._dy(grad), weight, geometry, act.y, self._precision, act, invstd
        )
        assert sums is not None
        return g, sums

    def conv_wgrad(
        self, grad: ConvGrad, source: Tensor | Activation, weight: Tensor, geometry: Geometry
    ) -> Tensor:
        source = self._source(source, weight)
        return wgrad.conv_wgrad(self._dy(grad), source, weight, geometry, self._precision)

    def masked_grad(self, grad: MaskedGrad) -> Tensor:
        return pointwise.masked_grad(grad)

    def input_dgrad(
        self,
        conv: ConvTerm,
        x: Tensor,
        identity: MaskedGrad | None,
        downsample: InputTerm | ConvTerm | None,
        channels_last: bool,
    ) -> Tensor:
        if isinstance(downsample, ConvTerm):
            return super().input_dgrad(conv, x, identity, downsample, channels_last)
        weight, geometry, grad = conv.weight, conv.geometry, self._dy(conv.grad)
        if _is_pointwise(weight, geometry):
            out = conv1x1.input_dgrad(
                grad, weight.contiguous(), x, identity, downsample, self._precision
            )
        else:
            out, _ = conv2d.conv2d_dgrad(grad, weight, geometry, x, self._precision)
        return _in_layout(out, channels_last)
