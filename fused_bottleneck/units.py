"""A unit (convolution + normalisation) as the programs see it, its state and its gradients."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from . import algebra, collectives
from .collectives import Part
from .operands import Activation, ConvGrad, Geometry, MaskedGrad, PooledGrad, pixels
from .stages import GradSums, Moments, Stages


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

    def scale(self, invstd: Tensor) -> Tensor:
        """``gamma * invstd``, ``[W]``."""
        return algebra.bn_scale(self.gamma, invstd)

    def fixed_moments(self) -> Moments:
        """The fixed statistics of the convolution's output without its bias, copied."""
        assert self.fixed_mean is not None
        assert self.fixed_var is not None
        acc = algebra.accumulation_dtype(self.weight.dtype)
        mean = self.fixed_mean.to(acc, copy=True)
        if self.bias is not None:
            mean -= self.bias
        return Moments(mean, self.fixed_var.to(acc, copy=True))

    def reported(self, moments: Moments, correction: float | Tensor) -> list[Tensor]:
        """What the running statistics see: mean (with the bias) and unbiased variance of a batch
        with those moments; nothing where statistics are fixed."""
        if not self.batch:
            return []
        # A new tensor even without a bias: the mean itself is kept for backward.
        mean = moments.mean.clone() if self.bias is None else moments.mean + self.bias
        return [mean, moments.var * correction]


class UnitState(NamedTuple):
    """What backward needs of a normalisation of y: mean and invstd, ``[W]`` each.

    Of statistics over several ranks also deviation ``[W]``, this rank's mean less that of all, and
    fraction ``[1]``, this rank's part of their pixels.
    """

    mean: Tensor
    invstd: Tensor
    deviation: Tensor | None = None
    fraction: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The tensors to keep; ``unpack_state`` is the inverse."""
        return [t for t in self if t is not None]


def unpack_state(unit: Unit, saved: Iterator[Tensor], group: str | None) -> UnitState:
    """The state of a unit from the tensors that were kept of it."""
    return UnitState(*islice(saved, 4 if unit.batch and group is not None else 2))


class UnitGrads(NamedTuple):
    """Gradients of a unit's parameters, in the accumulation dtype or the weight's.

    An empty weight gradient is one that was not needed.
    """

    weight: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor


def bessel(count: int) -> float:
    """What makes the variance of that many values unbiased."""
    return count / (count - 1)


def unit_state(unit: Unit, moments: Moments) -> UnitState:
    """The state of a unit whose normalisation uses the given moments."""
    return UnitState(moments.mean, algebra.inverse_std(moments.var, unit.eps))


def batch_activation(
    stages: Stages, y: Tensor, unit: Unit, moments: Moments, group: str | None
) -> tuple[Activation, UnitState, list[Tensor]]:
    """relu(BN(y)) with batch statistics as an operand, its state, and what is reported.

    moments: of y. group: see ``program.bottleneck_forward``.
    """
    if group is not None:
        return _synchronised_activation(stages, y, unit, moments, group)
    invstd, scale, beta, mean = stages.bn_forward(
        moments, unit.gamma, unit.beta, unit.bias, unit.eps
    )
    reported = [mean, moments.var * bessel(pixels(y))]
    return Activation(y, moments.mean, scale, beta), UnitState(moments.mean, invstd), reported


def _synchronised_activation(
    stages: Stages, y: Tensor, unit: Unit, moments: Moments, group: str
) -> tuple[Activation, UnitState, list[Tensor]]:
    (whole,) = collectives.all_reduce_moments(group, [Part(pixels(y), moments)])
    mean, var = (t.to(moments.mean.dtype) for t in whole.moments)
    invstd, scale, beta, reported = stages.bn_forward(
        Moments(mean, var), unit.gamma, unit.beta, unit.bias, unit.eps
    )
    state = UnitState(mean, invstd, moments.mean - mean, whole.fraction.to(mean.dtype))
    unbiased = var * whole.correction.to(var.dtype)
    return Activation(y, mean, scale, beta), state, [reported, unbiased]


def activation(y: Tensor, unit: Unit, state: UnitState) -> Activation:
    """relu(BN(y)) as an operand."""
    beta = None if unit.beta is None else unit.beta.to(state.mean.dtype)
    return Activation(y, state.mean, unit.scale(state.invstd), beta)


def conv_grad(
    stages: Stages,
    unit: Unit,
    y: Tensor,
    state: UnitState,
    g: Tensor | MaskedGrad | PooledGrad,
    sums: GradSums,
    scale: Tensor | None = None,
    group: str | None = None,
) -> ConvGrad:
    """The gradient of the convolution's output y, as an operand, from that of BN's output.

    sums: this rank's. scale: the unit's, if it is known already. group: that of forward.
    """
    scale = unit.scale(state.invstd) if scale is None else scale
    if state.fraction is not None:
        assert group is not None
        sums = GradSums(*collectives.all_reduce_fraction(group, sums, state.fraction))
    # No pixels are a fraction of zero of all.
    count = max(pixels(y), 1)
    bn = stages.bn_backward(scale, state.invstd, sums, count, unit.batch)
    return ConvGrad(g, y, state.mean, *bn)


def _bias_grad(unit: Unit, grad: ConvGrad, state: UnitState, sum_g: Tensor) -> Tensor:
    """The sum of dy: zero before the statistics of a batch, which take any bias out again, but not
    over a part of that batch."""
    if not unit.batch:
        return grad.scale * sum_g
    if state.deviation is None:
        return torch.zeros_like(sum_g)
    assert grad.k0 is not None
    assert grad.k1 is not None
    return grad.scale * (sum_g - pixels(grad.y) * (grad.k0 + grad.k1 * state.deviation))


def unit_grads(
    unit: Unit, grad: ConvGrad, state: UnitState, sums: GradSums, weight: Tensor
) -> UnitGrads:
    """The gradients of a unit's parameters, given that of the weight; sums: this rank's."""
    return UnitGrads(weight, _bias_grad(unit, grad, state, sums.g), sums.g_xhat, sums.g)
