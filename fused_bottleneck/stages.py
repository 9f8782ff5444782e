"""The stages of the program: meaning, formula and plain PyTorch implementation of each.

``Stages`` is the oracle of every other implementation and the fallback where there is none. The
ten stages of DESIGN are eight methods here, as two pairs differ in their operands only:

====  ==============  ===================================================================
F1    conv_forward    y1 = conv1(x), moments of y1
F2    conv_forward    y2 = conv2(relu(BN1(y1))), moments of y2
F3    gram            mean and covariance of the centred operand D
F4    tail_forward    out = relu(sum of D Wf^T + shift + residual), its bit mask
B1    tail_wgrad      S = g^T D, column sums of g
B2    tail_dgrad      g2 = (g A + D B + c) * [a2 > 0], its two sums
B3    conv_dgrad      g1 = conv2^T(dy2) * [a1 > 0], its two sums
B4    conv_wgrad      dW2 from dy2 and a1
B5    conv_wgrad      dW1 from dy1 and x
B6    input_dgrad     dx = conv1^T(dy1) + g, or + the downsample's g A + D B + c
====  ==============  ===================================================================

and two more serve the standalone conv+BN+ReLU unit: ``activation`` and ``relu_backward``.

Activations are ``[N, C, H, W]`` in channels_last memory; vectors and statistics are in the
accumulation dtype. Products over pixels (gram, tail_wgrad) are taken in the accumulation dtype:
what they feed is differences of large sums.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from .algebra import Folded, OperandGrad, accumulation_dtype
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

Operand = Activation | StridedInput


class Moments(NamedTuple):
    """Mean and biased variance per channel, ``[C]`` each."""

    mean: Tensor
    var: Tensor


class GradSums(NamedTuple):
    """``sum(g)`` and ``sum(g * xhat)`` per channel: dbeta and dgamma."""

    g: Tensor
    g_xhat: Tensor


class FoldedTerm(NamedTuple):
    """One product ``D weight^T + shift`` of the tail: operand and folded convolution."""

    operand: Operand
    folded: Folded


class InputTerm(NamedTuple):
    """The downsample's part of grad_x: operand and its gradient coefficients."""

    operand: StridedInput
    grad: OperandGrad


def pack_bits(live: Tensor) -> Tensor:
    """Pack booleans ``[Q, W]`` into uint8 ``[Q, ceil(W/8)]``, channel 8j+k at bit k of byte j."""
    q, w = live.shape
    padded = torch.zeros(q, -(-w // 8) * 8, dtype=torch.uint8, device=live.device)
    padded[:, :w] = live
    weights = 2 ** torch.arange(8, device=live.device)
    return (padded.view(q, -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, channels: int) -> Tensor:
    """The inverse of ``pack_bits``: booleans ``[Q, channels]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, :, None] >> shifts) & 1).view(mask.shape[0], -1)[:, :channels].bool()


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def conv2d(x: Tensor, weight: Tensor, geometry: Geometry = POINTWISE) -> Tensor:
    """A convolution without bias, ``[N, C, H, W]`` to ``[N, W, H', W']``."""
    stride, padding, dilation, groups = geometry
    return torch.conv2d(x, weight, None, stride, padding, dilation, groups)


def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients (input, weight) of ``conv2d``; one that is not needed is None."""
    stride, padding, dilation, groups = geometry
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        groups,
        (*needs, False),
    )
    return grad_x, grad_weight


class Stages:
    """The plain PyTorch stages. One instance serves one run of a program, as a context manager."""

    def __enter__(self) -> "Stages":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    # Operands, materialised.

    def _normalised(self, act: Activation) -> Tensor:
        """``(y - mean) * scale + beta`` in the accumulation dtype."""
        z = (act.y.to(act.mean.dtype) - _per_channel(act.mean)) * _per_channel(act.scale)
        return z if act.beta is None else z + _per_channel(act.beta)

    def _live(self, act: Activation) -> Tensor:
        """Where the ReLU passes a gradient: everywhere but at values <= 0 (NaN passes)."""
        return ~(self._normalised(act) <= 0)

    def _operand(self, operand: Operand | Tensor) -> Tensor:
        """The operand as a tensor in the compute dtype."""
        if isinstance(operand, Tensor):
            return operand
        if isinstance(operand, StridedInput):
            value = operand.view().to(operand.centre.dtype) - _per_channel(operand.centre)
            return value.to(operand.x.dtype).contiguous(memory_format=torch.channels_last)
        value = torch.relu(self._normalised(operand))
        if operand.centre is not None:
            value = value - _per_channel(operand.centre)
        return value.to(operand.y.dtype)

    def _conv_grad(self, grad: ConvGrad) -> Tensor:
        """dy as a tensor in the compute dtype."""
        dy = grad.g.to(grad.scale.dtype)
        if grad.k0 is not None and grad.k1 is not None:
            centred = grad.y.to(grad.mean.dtype) - _per_channel(grad.mean)
            dy = dy - _per_channel(grad.k0) - centred * _per_channel(grad.k1)
        return (dy * _per_channel(grad.scale)).to(grad.y.dtype)

    def _masked(self, grad: MaskedGrad) -> Tensor:
        """g as a tensor in the compute dtype."""
        live = unpack_bits(grad.mask, grad.grad_out.shape[1])
        n, c, h, w = grad.grad_out.shape
        live = live.view(n, h, w, c).permute(0, 3, 1, 2)
        return torch.where(live, grad.grad_out, 0)

    def _moments(self, y: Tensor) -> Moments:
        """Two-pass mean and biased variance of the stored values, per channel."""
        var, mean = torch.var_mean(matrix(y).to(accumulation_dtype(y.dtype)), 0, correction=0)
        return Moments(mean, var)

    # Forward.

    def channels_last(self, t: Tensor) -> Tensor:
        """t in channels_last memory; t itself where it is already."""
        return t.contiguous(memory_format=torch.channels_last)

    def centre(self, source: Tensor | Activation) -> Tensor:
        """A constant near the channel means of the source, ``[C]``: those of a small chunk.

        Rounded to the compute dtype, so that ``source - centre`` is nearly exact. Any constant is
        right; a near one keeps the covariance free of cancellation.
        """
        if isinstance(source, Tensor):
            head = source[:1, :, :16, :16]
        else:
            head = Stages._operand(self, source._replace(y=source.y[:1, :, :16, :16]))
        mean = head.mean((0, 2, 3), dtype=accumulation_dtype(head.dtype))
        return mean.to(head.dtype).to(mean.dtype)

    def conv_forward(
        self, source: Tensor | Activation, weight: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Moments]:
        """F1, F2: ``y = conv(source)`` (zero padding after the prologue) and its moments."""
        y = conv2d(self._operand(source), weight, geometry)
        y = y.contiguous(memory_format=torch.channels_last)
        return y, self._moments(y)

    def activation(self, act: Activation, channels_last: bool) -> Tensor:
        """``relu((y - mean) * scale + beta) - centre`` as a fresh tensor."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return self._operand(act).contiguous(memory_format=layout)

    def gram(self, operand: Operand) -> tuple[Tensor, Tensor]:
        """F3: mean ``[K]`` and biased covariance ``[K, K]`` of the operand's rows."""
        d = matrix(self._operand(operand))
        d = d.to(accumulation_dtype(d.dtype))
        mean = d.mean(0)
        return mean, (d.t() @ d) / d.shape[0] - torch.outer(mean, mean)

    def tail_forward(
        self, terms: Sequence[FoldedTerm], residual: Tensor | None, channels_last: bool
    ) -> tuple[Tensor, Tensor]:
        """F4: ``out = relu(sum of D Wf^T + shift + residual)`` and the mask of its live elements.

        Returns out ``[N, W, H', W']`` and mask uint8 ``[Q, ceil(W/8)]``.
        """
        shift = sum(term.folded.shift for term in terms)
        assert isinstance(shift, Tensor)
        value = _per_channel(shift)
        for operand, folded in terms:
            value = value + conv2d(self._operand(operand), folded.weight[:, :, None, None])
        if residual is not None:
            value = value + residual
        mask = pack_bits(matrix(~(value <= 0)))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.relu(value).to(terms[0].folded.weight.dtype)
        return out.contiguous(memory_format=layout), mask

    # Backward.

    def tail_wgrad(
        self, grad: MaskedGrad, operands: Sequence[Operand], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """B1: column sums of g ``[W]``, and ``S = g^T D`` ``[W, K]`` for each operand.

        weights: each operand's gradient coefficient a, which B2 and B6 are to multiply g with. It
        does not depend on S, so that an implementation may take g a in the same pass over g.
        """
        g = matrix(self._masked(grad))
        g = g.to(accumulation_dtype(g.dtype))
        return g.sum(0), [g.t() @ matrix(self._operand(d)).to(g.dtype) for d in operands]

    def _operand_grad(self, g: Tensor, operand: Operand, grad: OperandGrad) -> Tensor:
        """``g a + D b + shift`` in the accumulation dtype."""
        value = conv2d(g, grad.a.t()[:, :, None, None]).to(accumulation_dtype(g.dtype))
        if grad.b is not None and grad.shift is not None:
            value = value + conv2d(self._operand(operand), grad.b.t()[:, :, None, None])
            value = value + _per_channel(grad.shift)
        return value

    def _through_relu(self, grad: Tensor, act: Activation, invstd: Tensor) -> tuple[Tensor, GradSums]:
        """g = grad * [a > 0] rounded to the compute dtype, and its two sums."""
        g = torch.where(self._live(act), grad, 0).to(act.y.dtype)
        g_acc = matrix(g).to(act.mean.dtype)
        xhat = (matrix(act.y).to(act.mean.dtype) - act.mean) * invstd
        return g, GradSums(g_acc.sum(0), (g_acc * xhat).sum(0))

    def relu_backward(
        self, grad_out: Tensor, act: Activation, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        """The unit's B2: ``g = grad_out * [a > 0]`` and its two sums."""
        return self._through_relu(grad_out, act, invstd)

    def tail_dgrad(
        self, grad: MaskedGrad, act: Activation, coefficients: OperandGrad, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        """B2: ``g2 = (g A + D B + c) * [a2 > 0]`` ``[N, M, H', W']`` and its two sums."""
        value = self._operand_grad(self._masked(grad), act, coefficients)
        return self._through_relu(value, act, invstd)

    def conv_dgrad(
        self, grad: ConvGrad, weight: Tensor, geometry: Geometry, act: Activation, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        """B3: ``g1 = conv^T(dy) * [a1 > 0]`` ``[N, C, H, W]`` and its two sums."""
        value, _ = conv2d_backward(self._conv_grad(grad), act.y, weight, geometry, (True, False))
        return self._through_relu(value, act, invstd)

    def conv_wgrad(
        self, grad: ConvGrad, source: Tensor | Activation, weight: Tensor, geometry: Geometry
    ) -> Tensor:
        """B4, B5: the gradient of the weight, from dy and the convolution's input."""
        dy = self._conv_grad(grad)
        return conv2d_backward(dy, self._operand(source), weight, geometry, (False, True))[1]

    def masked_grad(self, grad: MaskedGrad) -> Tensor:
        """``g = grad_out * bit`` as a fresh tensor: the gradient of a given shortcut."""
        return self._masked(grad)

    def input_dgrad(
        self,
        grad: ConvGrad,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        residual: MaskedGrad | None,
        downsample: InputTerm | None,
        channels_last: bool,
    ) -> Tensor:
        """B6: ``grad_x = conv^T(dy)``, plus g (identity) or the downsample's part (strided)."""
        grad_x, _ = conv2d_backward(self._conv_grad(grad), x, weight, geometry, (True, False))
        if downsample is not None:
            assert residual is not None
            term = self._operand_grad(self._masked(residual), *downsample)
            StridedInput(grad_x, downsample.operand.stride, term).view().add_(term)
        elif residual is not None:
            grad_x = grad_x + self._masked(residual)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return grad_x.contiguous(memory_format=layout)
