"""The straight-line programs: forward and backward of the bottleneck and of conv+BN+ReLU.

Each line is a stage (stages.py) or a formula (algebra.py). Nothing here knows about devices:
``dispatch.stages_for`` hands out the implementation.

A program's units are its convolutions with their normalisations, in the order conv1, conv2,
conv3[, downsample].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import algebra
from .dispatch import stages_for
from .operands import (
    POINTWISE,
    Activation,
    ConvGrad,
    Geometry,
    MaskedGrad,
    StridedInput,
    pixels,
)
from .stages import FoldedTerm, GradSums, InputTerm, Moments, Operand, Stages


class Unit(NamedTuple):
    """A convolution and the normalisation after it.

    weight ``[W, C/groups, kh, kw]``; gamma, beta ``[W]`` or None; ``batch``: whether the
    normalisation uses batch statistics. The rest is for forward only: bias ``[W]`` or None, eps,
    and where statistics are fixed fixed_mean and fixed_var ``[W]``.
    """

    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    geometry: Geometry
    batch: bool
    bias: Tensor | None = None
    fixed_mean: Tensor | None = None
    fixed_var: Tensor | None = None
    eps: float = 0.0

    def matrix(self) -> Tensor:
        """The weight of a 1x1 convolution as ``[W, C]`` in the accumulation dtype."""
        return self.weight.flatten(1).to(algebra.accumulation_dtype(self.weight.dtype))

    def fixed_moments(self) -> Moments:
        """The fixed statistics of the convolution's output without its bias, copied."""
        assert self.fixed_mean is not None and self.fixed_var is not None
        acc = algebra.accumulation_dtype(self.weight.dtype)
        mean = self.fixed_mean.to(acc, copy=True)
        if self.bias is not None:
            mean -= self.bias
        return Moments(mean, self.fixed_var.to(acc, copy=True))

    def reported(self, moments: Moments) -> list[Tensor]:
        """What the running statistics see: batch mean (with the bias) and variance; else none."""
        if not self.batch:
            return []
        # A new tensor even without a bias: the mean itself is kept for backward.
        mean = moments.mean.clone() if self.bias is None else moments.mean + self.bias
        return [mean, moments.var]


class NarrowState(NamedTuple):
    """What backward needs of a normalisation whose input is stored: ``[C]`` each."""

    mean: Tensor
    invstd: Tensor


class FoldedState(NamedTuple):
    """What backward needs of a folded unit: centre ``[K]``, invstd and offset ``[W]``, and with
    batch statistics mean_d ``[K]`` and cov ``[K, K]`` (empty tensors when fixed)."""

    centre: Tensor
    invstd: Tensor
    offset: Tensor
    mean_d: Tensor
    cov: Tensor


class UnitGrads(NamedTuple):
    """Gradients of a unit's parameters, in the accumulation dtype or the weight's."""

    weight: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor


def _narrow_state(unit: Unit, moments: Moments) -> tuple[NarrowState, list[Tensor]]:
    """State and reported statistics of a unit whose output has the given moments."""
    used = moments if unit.batch else unit.fixed_moments()
    return NarrowState(used.mean, algebra.inverse_std(used.var, unit.eps)), unit.reported(moments)


def _activation(y: Tensor, unit: Unit, state: NarrowState) -> Activation:
    return Activation(y, state.mean, algebra.bn_scale(unit.gamma, state.invstd), unit.beta)


def _fold(
    unit: Unit, stages: Stages, operand: Operand
) -> tuple[FoldedTerm, FoldedState, list[Tensor]]:
    """F3 and the fold of a 1x1 unit: its term of the tail, state, and reported statistics."""
    weight = unit.matrix()
    centre = operand.centre
    assert centre is not None
    if unit.batch:
        mean_d, cov = stages.gram(operand)
        moments = Moments(weight @ (mean_d + centre), algebra.folded_variance(weight, cov))
        offset = algebra.folded_offset(weight, centre, mean_d, None)
    else:
        mean_d = cov = None
        moments = unit.fixed_moments()
        offset = algebra.folded_offset(weight, centre, None, moments.mean)
    invstd = algebra.inverse_std(moments.var, unit.eps)
    scale = algebra.bn_scale(unit.gamma, invstd)
    folded = algebra.fold(weight, scale, offset, unit.beta, mean_d, unit.weight.dtype)
    state = FoldedState(
        centre,
        invstd,
        offset,
        centre.new_empty(0) if mean_d is None else mean_d,
        centre.new_empty(0) if cov is None else cov,
    )
    return FoldedTerm(operand, folded), state, unit.reported(moments)


def _tail_operand(stages: Stages, act: Activation, unit2: Unit, unit3: Unit) -> Activation:
    """The centred operand of conv3: around relu(beta2), where batch statistics put BN2's output.

    Fixed ones may put it anywhere, and BN3's covariance then wants a centre taken from the data.
    """
    if unit3.batch and not unit2.batch:
        return act._replace(centre=stages.centre(act))
    return act._replace(centre=algebra.relu_of_shift(act.beta, act.mean))


def _downsample_operand(stages: Stages, x: Tensor, unit: Unit) -> StridedInput:
    """The centred input of the downsample. With fixed statistics no covariance is taken and the
    centre is zero, so that a NaN in x stays where it is."""
    centre = stages.centre(x)
    return StridedInput(x, unit.geometry.stride, centre if unit.batch else torch.zeros_like(centre))


def bottleneck_forward(
    x: Tensor, shortcut: Tensor | None, units: Sequence[Unit], channels_last: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Forward of the block.

    Args:
        x: ``[N, C, H, W]``, any strides.
        shortcut: the residual ``[N, 4M, H', W']``; None: the downsample if there are four units,
            else x.
        units: conv1, conv2, conv3[, downsample].
        channels_last: layout of out.

    Returns:
        out ``[N, 4M, H', W']``; what backward needs: ``[y1, y2, mask, *states]``; the batch mean
        and variance of every normalisation that uses them, in the order of the units.
    """
    with stages_for(x) as stages:
        x = stages.channels_last(x)
        y1, moments1 = stages.conv_forward(x, units[0].weight, POINTWISE)
        state1, reported1 = _narrow_state(units[0], moments1)
        act1 = _activation(y1, units[0], state1)
        y2, moments2 = stages.conv_forward(act1, units[1].weight, units[1].geometry)
        state2, reported2 = _narrow_state(units[1], moments2)
        act2 = _tail_operand(stages, _activation(y2, units[1], state2), units[1], units[2])
        term3, state3, reported = _fold(units[2], stages, act2)
        terms, states = [term3], [state3]
        if len(units) > 3:
            source = _downsample_operand(stages, x, units[3])
            term, state, more = _fold(units[3], stages, source)
            terms, states, reported = [term3, term], [state3, state], reported + more
        residual = None if len(units) > 3 else (x if shortcut is None else shortcut)
        out, mask = stages.tail_forward(terms, residual, channels_last)
    saved = [y1, y2, mask, *state1, *state2]
    for state in states:
        saved.extend(state)
    return out, saved, reported1 + reported2 + reported


def _narrow_backward(
    unit: Unit, y: Tensor, state: NarrowState, g: Tensor, sums: GradSums
) -> ConvGrad:
    """The gradient of a unit's convolution output, as an operand."""
    scale = algebra.bn_scale(unit.gamma, state.invstd)
    bn = algebra.bn_backward_coefficients(
        scale, state.invstd, sums.g, sums.g_xhat, pixels(y), unit.batch
    )
    return ConvGrad(g, y, state.mean, *bn)


def _narrow_grads(unit: Unit, grad: ConvGrad, sums: GradSums, weight: Tensor) -> UnitGrads:
    """A bias before batch statistics has gradient zero, before fixed ones the sum of dy."""
    bias = torch.zeros_like(sums.g) if unit.batch else grad.scale * sums.g
    return UnitGrads(weight, bias, sums.g_xhat, sums.g)


def _operand_weight(unit: Unit, state: FoldedState) -> Tensor:
    """The coefficient a of the operand's gradient: the folded weight ``[W, K]``."""
    scale = algebra.bn_scale(unit.gamma, state.invstd)
    return algebra.folded_weight(unit.matrix(), scale, unit.weight.dtype)


def _folded_backward(
    unit: Unit, state: FoldedState, a: Tensor, s: Tensor, sum_g: Tensor, count: int
) -> tuple[UnitGrads, algebra.OperandGrad]:
    """Parameter gradients and operand-gradient coefficients of a folded unit."""
    weight = unit.matrix()
    scale = algebra.bn_scale(unit.gamma, state.invstd)
    mean_d, cov = (state.mean_d, state.cov) if unit.batch else (None, None)
    dgamma = algebra.folded_dgamma(weight, state.invstd, state.offset, s, sum_g)
    dweight = algebra.folded_dweight(
        weight, scale, state.invstd, state.centre, mean_d, cov, s, sum_g, dgamma
    )
    coefficients = algebra.folded_operand_grad(
        weight, a, scale, state.invstd, mean_d, sum_g, dgamma, count
    )
    bias = torch.zeros_like(sum_g) if unit.batch else scale * sum_g
    return UnitGrads(dweight, bias, dgamma, sum_g), coefficients


def bottleneck_backward(
    grad_out: Tensor,
    x: Tensor,
    units: Sequence[Unit],
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_shortcut: bool,
    needs_weight: Sequence[bool],
    identity: bool,
    channels_last: bool,
) -> tuple[Tensor | None, Tensor | None, list[UnitGrads]]:
    """Backward of the block: gradients of x, of a given shortcut, and of every unit's parameters.

    Args:
        grad_out: ``[N, 4M, H', W']``, any strides.
        x, units: as in forward.
        saved: as returned by ``bottleneck_forward``.
        needs_x, needs_shortcut, needs_weight: what to compute; an unneeded conv1 or conv2 weight
            gradient is an empty tensor.
        identity: whether the residual was x itself.
        channels_last: layout of grad_x.
    """
    y1, y2, mask = saved[:3]
    state1, state2 = NarrowState(*saved[3:5]), NarrowState(*saved[5:7])
    states = [FoldedState(*saved[i : i + 5]) for i in range(7, len(saved), 5)]
    with stages_for(x) as stages:
        x = stages.channels_last(x)
        grad = MaskedGrad(grad_out, mask)
        act2 = _activation(y2, units[1], state2)._replace(centre=states[0].centre)
        operands: list[Operand] = [act2]
        if len(units) > 3:
            operands.append(StridedInput(x, units[3].geometry.stride, states[1].centre))
        weights = [_operand_weight(u, s) for u, s in zip(units[2:], states, strict=True)]
        sum_g, products = stages.tail_wgrad(grad, operands, weights)
        count = pixels(y2)
        folded = [
            _folded_backward(unit, state, a, s, sum_g, count)
            for unit, state, a, s in zip(units[2:], states, weights, products, strict=True)
        ]
        g2, sums2 = stages.tail_dgrad(grad, act2, folded[0][1], state2.invstd)
        dy2 = _narrow_backward(units[1], y2, state2, g2, sums2)
        act1 = _activation(y1, units[0], state1)
        geometry = units[1].geometry
        g1, sums1 = stages.conv_dgrad(dy2, units[1].weight, geometry, act1, state1.invstd)
        empty = sum_g.new_empty(0)
        dw1 = dw2 = empty
        if needs_weight[1]:
            dw2 = stages.conv_wgrad(dy2, act1, units[1].weight, geometry)
        dy1 = _narrow_backward(units[0], y1, state1, g1, sums1)
        if needs_weight[0]:
            dw1 = stages.conv_wgrad(dy1, x, units[0].weight, POINTWISE)
        grad_x = grad_shortcut = None
        if needs_x:
            downsample = InputTerm(operands[1], folded[1][1]) if len(units) > 3 else None
            residual = grad if identity or downsample is not None else None
            grad_x = stages.input_dgrad(
                dy1, x, units[0].weight, POINTWISE, residual, downsample, channels_last
            )
        if needs_shortcut:
            grad_shortcut = stages.masked_grad(grad)
    grads = [
        _narrow_grads(units[0], dy1, sums1, dw1),
        _narrow_grads(units[1], dy2, sums2, dw2),
        *(pair[0] for pair in folded),
    ]
    return grad_x, grad_shortcut, grads


def conv_bn_relu_forward(
    x: Tensor, unit: Unit, channels_last: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Forward of ``relu(bn(conv(x)))``: out, ``[y, mean, invstd]``, and the batch statistics."""
    with stages_for(x) as stages:
        y, moments = stages.conv_forward(stages.channels_last(x), unit.weight, unit.geometry)
        state, reported = _narrow_state(unit, moments)
        out = stages.activation(_activation(y, unit, state), channels_last)
    return out, [y, *state], reported


def conv_bn_relu_backward(
    grad_out: Tensor,
    x: Tensor,
    unit: Unit,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_weight: bool,
    channels_last: bool,
) -> tuple[Tensor | None, UnitGrads]:
    """Backward of ``relu(bn(conv(x)))``: gradients of x and of the unit's parameters."""
    y, state = saved[0], NarrowState(*saved[1:])
    with stages_for(x) as stages:
        x = stages.channels_last(x)
        act = _activation(y, unit, state)
        g, sums = stages.relu_backward(grad_out, act, state.invstd)
        dy = _narrow_backward(unit, y, state, g, sums)
        dweight = sums.g.new_empty(0)
        if needs_weight:
            dweight = stages.conv_wgrad(dy, x, unit.weight, unit.geometry)
        grad_x = None
        if needs_x:
            grad_x = stages.input_dgrad(
                dy, x, unit.weight, unit.geometry, None, None, channels_last
            )
    return grad_x, _narrow_grads(unit, dy, sums, dweight)
