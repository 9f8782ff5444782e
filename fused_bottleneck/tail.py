"""The wide end of the block: a 1x1 convolution and its normalisation, without its output stored.

conv3+bn3 and the downsample are such units. Two exact ways:

* *gram*: statistics from the operand's mean and covariance, BN folded into the weights in forward
  and backward (algebra.py). The convolution's output never exists. Costs ``2 Q K^2 + 2 W K^2``
  multiply-adds more than the convolutions.
* *product*: the output is computed into scratch, normalised from there and computed again in
  backward, but for the images of it that were kept. Costs up to ``Q K W`` more, and passes over the
  wide scratch.

tail_plan.py has the choice. Fixed statistics need neither: they fold without a covariance.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from . import algebra
from .operands import (
    POINTWISE,
    Activation,
    ConvGrad,
    Geometry,
    MaskedGrad,
    Normalised,
    StridedInput,
)
from .stages import FoldedTerm, Operand, Stages
from .tail_plan import TailPlan
from .units import Unit, UnitGrads, UnitState, bessel, conv_grad, unit_grads


class TailState(NamedTuple):
    """What backward needs of a tail unit: invstd and offset ``[W]``, its operand's centre ``[K]``
    if it has one; for the gram way mean_d ``[K]`` and weight_cov ``[W, K]``, for the product way
    the first images of its output, perhaps none.

    The product and not cov: rounding it keeps what the differences in it have left. Of statistics
    over several ranks also deviation ``[K]``, the mean of this rank's operand less mean_d, and
    fraction ``[1]``, this rank's part of their pixels."""

    invstd: Tensor
    offset: Tensor
    centre: Tensor | None = None
    mean_d: Tensor | None = None
    weight_cov: Tensor | None = None
    deviation: Tensor | None = None
    fraction: Tensor | None = None
    output: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The tensors to keep; ``unpack_states`` is the inverse."""
        return [t for t in self if t is not None]


class TailForward(NamedTuple):
    """A tail unit's contribution to the output: a term of the product, or a wide tensor that is
    normalised as it is added."""

    term: FoldedTerm | None
    added: Normalised | None
    state: TailState
    reported: list[Tensor]


class TailBackward(NamedTuple):
    """A tail unit's parameter gradients, and where its operand's gradient comes from: the
    coefficients of a product with g, or the gradient of its output."""

    grads: UnitGrads
    coefficients: algebra.OperandGrad | None
    conv_grad: ConvGrad | None


def _source(operand: Operand, geometry: Geometry) -> tuple[Tensor | Activation, Geometry]:
    """What the convolution itself is applied to in the product way."""
    if isinstance(operand, StridedInput):
        return operand.x, geometry
    return operand, POINTWISE


def unpack_states(plans: Sequence[TailPlan], saved: Iterator[Tensor]) -> list[TailState]:
    """The states of the tail units from the tensors that were kept of them."""
    states = []
    for plan in plans:
        tensors = list(islice(saved, plan.state_length))
        if plan.folded:
            states.append(TailState(*tensors))
        else:
            states.append(TailState(*tensors[:-1])._replace(output=tensors[-1]))
    return states


def forward(
    unit: Unit, stages: Stages, operand: Operand, pixels: int, plan: TailPlan
) -> TailForward:
    """F3 and the fold, or the product and its normalisation, of one tail unit."""
    if plan.gram:
        return _folded_forward(unit, stages, operand, pixels)
    if plan.folded:
        return fixed_forward(unit, operand)
    return _product_forward(unit, stages, operand, pixels, plan.images)


def _folded_forward(unit: Unit, stages: Stages, operand: Operand, pixels: int) -> TailForward:
    centre = operand.centre
    assert centre is not None
    mean_d, cov = stages.gram(operand)
    folded, mean, var, invstd, offset, weight_cov = stages.fold(
        unit.weight, unit.gamma, unit.beta, unit.bias, unit.eps, centre, mean_d, cov
    )
    state = TailState(invstd, offset, centre, mean_d.to(invstd.dtype), weight_cov)
    reported = [mean, var * bessel(pixels)]
    return TailForward(FoldedTerm(operand, folded), None, state, reported)


def fixed_forward(unit: Unit, operand: Operand) -> TailForward:
    """The fold of a tail unit with fixed statistics."""
    centre = operand.centre
    assert centre is not None
    moments, weight = unit.fixed_moments(), unit.matrix()
    offset = algebra.folded_offset(weight, centre, None, moments.mean)
    invstd = algebra.inverse_std(moments.var, unit.eps)
    folded = algebra.fold(weight, unit.scale(invstd), offset, unit.beta, None, unit.weight.dtype)
    return TailForward(FoldedTerm(operand, folded), None, TailState(invstd, offset, centre), [])


def _product_forward(
    unit: Unit, stages: Stages, operand: Operand, pixels: int, images: int
) -> TailForward:
    source, geometry = _source(operand, unit.geometry)
    y, moments = stages.conv_forward(source, unit.weight, geometry)
    invstd = algebra.inverse_std(moments.var, unit.eps)
    beta = None if unit.beta is None else unit.beta.to(invstd.dtype)
    added = Normalised(y, moments.mean, unit.scale(invstd), beta)
    kept = stages.kept(y[:images])
    state = TailState(invstd, -moments.mean, operand.centre, output=kept)
    if isinstance(operand, Activation) and operand.centre is not None:  # y is that of the centred
        moments = moments._replace(mean=moments.mean + unit.matrix() @ operand.centre)
    return TailForward(None, added, state, unit.reported(moments, bessel(pixels)))


def operand_weight(unit: Unit, stages: Stages, state: TailState) -> Tensor:
    """The coefficient a of the operand's gradient in the folded way: the folded weight."""
    return stages.folded_weight(unit.weight, unit.gamma, state.invstd)


def folded_backward(
    unit: Unit, stages: Stages, state: TailState, a: Tensor, s: Tensor, sum_g: Tensor, count: int
) -> TailBackward:
    """Parameter gradients and operand-gradient coefficients from ``S = g^T D`` and sum_g."""
    invstd, offset, centre, mean_d, weight_cov = state[:5]
    assert centre is not None
    dweight, dgamma, dbias, coefficients = stages.fold_backward(
        unit.weight, unit.gamma, invstd, offset, centre, mean_d, weight_cov, a, s, sum_g, count
    )
    return TailBackward(UnitGrads(dweight, dbias, dgamma, sum_g), coefficients, None)


def product_backward(
    unit: Unit, stages: Stages, state: TailState, operand: Operand, grad: MaskedGrad, needed: bool
) -> TailBackward:
    """Parameter gradients and the output's gradient, with the rest of the output computed again."""
    source, geometry = _source(operand, unit.geometry)
    assert state.output is not None
    y = stages.conv_again(source, unit.weight, geometry, state.output)
    normalised = UnitState(-state.offset, state.invstd)
    sums = stages.masked_reduce(grad, y, normalised.mean, normalised.invstd)
    dy = conv_grad(stages, unit, y, normalised, grad, sums)
    dweight = sums.g.new_empty(0)
    if needed:
        dweight = stages.conv_wgrad(dy, source, unit.weight, geometry)
    return TailBackward(unit_grads(unit, dy, normalised, sums, dweight), None, dy)
