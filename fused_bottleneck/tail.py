"""The wide end of the block: a 1x1 convolution and its normalisation, without its output stored.

conv3+bn3 and the downsample are such units. Two exact ways:

* *gram*: statistics from the operand's mean and covariance, BN folded into the weights in forward
  and backward (algebra.py). The convolution's output never exists. Costs ``2 Q K^2 + 2 W K^2``
  multiply-adds more than the convolutions.
* *product*: the output is computed into scratch, normalised from there and computed again in
  backward, but for the images of it that were kept. Costs up to ``Q K W`` more, and passes over the
  wide scratch.

``rules.uses_gram`` chooses. Fixed statistics need neither: they fold without a covariance.
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
from .rules import images_to_keep, uses_gram
from .stages import FoldedTerm, Operand, Stages
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


def has_gram(weight: Tensor, batch: bool, pixels: int, group: str | None) -> bool:
    """Whether a tail unit over that many output pixels goes the gram way.

    With statistics over several ranks it always does: ranks of unequal batches must go one way.
    """
    width, channels = weight.shape[:2]
    if not batch:
        return False
    if group is not None:
        return True
    return uses_gram(weight.device.type, weight.dtype, pixels, channels, width)


def is_folded(weight: Tensor, batch: bool, pixels: int, group: str | None) -> bool:
    """Whether a tail unit's normalisation is folded into its weight: not in the product way."""
    return not batch or has_gram(weight, batch, pixels, group)


def has_centre(weight: Tensor, batch: bool, pixels: int, group: str | None) -> bool:
    """Whether a tail unit's operand has a centre: where it is folded, and in 16 bits, so that what
    is rounded is the deviation from it."""
    return weight.dtype.itemsize == 2 or is_folded(weight, batch, pixels, group)


def state_length(weight: Tensor, batch: bool, pixels: int, group: str | None) -> int:
    """How many tensors of a ``TailState`` there are."""
    if has_gram(weight, batch, pixels, group):
        return 5 if group is None else 7
    if is_folded(weight, batch, pixels, group):
        return 3
    return 4 if has_centre(weight, batch, pixels, group) else 3


def unpack_states(
    weights: Sequence[Tensor],
    batch: Sequence[bool],
    pixels: int,
    saved: Iterator[Tensor],
    group: str | None,
) -> list[TailState]:
    """The states of the tail units from the tensors that were kept of them."""
    states = []
    for weight, own in zip(weights, batch, strict=True):
        tensors = list(islice(saved, state_length(weight, own, pixels, group)))
        if is_folded(weight, own, pixels, group):
            states.append(TailState(*tensors))
        else:
            states.append(TailState(*tensors[:-1])._replace(output=tensors[-1]))
    return states


def kept_images(
    units: Sequence[Unit], x: Tensor, y1: Tensor, y2: Tensor, group: str | None
) -> list[int]:
    """Of how many images each tail unit keeps its output; the last unit's comes first.

    x: the block's input; y1, y2: the outputs of its first convolutions.
    """
    if group is not None:  # no outputs then
        return [0] * len(units)
    count, item = y2.numel() // y2.shape[1], y2.dtype.itemsize
    wide = count * units[0].weight.shape[0]
    narrow = y1.numel() + y2.numel()
    plain = item * (x.numel() + 2 * narrow + (len(units) + 1) * wide)
    kept = item * (x.numel() + narrow) + wide // 8
    kept += _coefficient_bytes(units, y1, y2)
    result = []
    for unit in reversed(units):
        image, images = item * wide // y2.shape[0], 0
        if not is_folded(unit.weight, unit.batch, count, None):
            images = images_to_keep(y2.shape[0], image, kept, plain)
        kept += images * image
        result.append(images)
    return result[::-1]


def _coefficient_bytes(units: Sequence[Unit], y1: Tensor, y2: Tensor) -> int:
    """Of the vectors and matrices that are kept of all units, without a group."""
    elements = 2 * (y1.shape[1] + y2.shape[1])
    for unit in units:
        width, channels = unit.weight.shape[:2]
        elements += 2 * (width + channels)
        if has_gram(unit.weight, unit.batch, y2.numel() // y2.shape[1], None):
            elements += width * channels
    return elements * algebra.accumulation_dtype(y2.dtype).itemsize


def forward(unit: Unit, stages: Stages, operand: Operand, pixels: int, images: int) -> TailForward:
    """F3 and the fold, or the product and its normalisation, of one tail unit; images: of how many
    to keep the product."""
    if not unit.batch:
        return fixed_forward(unit, operand)
    if has_gram(unit.weight, unit.batch, pixels, None):
        return _folded_forward(unit, stages, operand, pixels)
    return _product_forward(unit, stages, operand, pixels, images)


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
