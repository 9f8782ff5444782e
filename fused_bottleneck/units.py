"""A unit (convolution + normalisation) as the programs see it, its state and its gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import algebra
from .operands import Activation, ConvGrad, Geometry, pixels
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

    def reported(self, moments: Moments) -> list[Tensor]:
        """What the running statistics see: batch mean (with the bias) and variance; else none."""
        if not self.batch:
            return []
        # A new tensor even without a bias: the mean itself is kept for backward.
        mean = moments.mean.clone() if self.bias is None else moments.mean + self.bias
        return [mean, moments.var]


class UnitState(NamedTuple):
    """What backward needs of a normalisation of y: mean and invstd, ``[W]`` each."""

    mean: Tensor
    invstd: Tensor


class UnitGrads(NamedTuple):
    """Gradients of a unit's parameters, in the accumulation dtype or the weight's.

    An empty weight gradient is one that was not needed.
    """

    weight: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor


def unit_state(unit: Unit, moments: Moments) -> UnitState:
    """The state of a unit whose normalisation uses the given moments."""
    return UnitState(moments.mean, algebra.inverse_std(moments.var, unit.eps))


def batch_activation(
    stages: Stages, y: Tensor, unit: Unit, moments: Moments
) -> tuple[Activation, UnitState, list[Tensor]]:
    """relu(BN(y)) with batch statistics as an operand, its state, and what is reported."""
    invstd, scale, beta, mean = stages.bn_forward(
        moments, unit.gamma, unit.beta, unit.bias, unit.eps
    )
    state = UnitState(moments.mean, invstd)
    return Activation(y, moments.mean, scale, beta), state, [mean, moments.var]


def activation(y: Tensor, unit: Unit, state: UnitState) -> Activation:
    """relu(BN(y)) as an operand."""
    beta = None if unit.beta is None else unit.beta.to(state.mean.dtype)
    return Activation(y, state.mean, unit.scale(state.invstd), beta)


def conv_grad(
    stages: Stages,
    unit: Unit,
    y: Tensor,
    state: UnitState,
    g: Tensor,
    sums: GradSums,
    scale: Tensor | None = None,
) -> ConvGrad:
    """The gradient of the convolution's output y, as an operand, from that of BN's output.

    scale: the unit's, if it is known already.
    """
    scale = unit.scale(state.invstd) if scale is None else scale
    bn = stages.bn_backward(scale, state.invstd, sums, pixels(y), unit.batch)
    return ConvGrad(g, y, state.mean, *bn)


def bias_grad(unit: Unit, scale: Tensor, sum_g: Tensor) -> Tensor:
    """The sum of dy: zero before batch statistics, which take any bias out again."""
    return torch.zeros_like(sum_g) if unit.batch else scale * sum_g


def unit_grads(unit: Unit, grad: ConvGrad, sums: GradSums, weight: Tensor) -> UnitGrads:
    """The gradients of a unit's parameters, given that of the weight."""
    return UnitGrads(weight, bias_grad(unit, grad.scale, sums.g), sums.g_xhat, sums.g)
