"""The wide end of the block with batch statistics over several ranks: see tail.py.

Every rank folds with the moments of all, around a centre of its own. conv3 and the downsample share
their collectives. Always the gram way, whose kernels these are too; between them is algebra.
"""

from collections.abc import Sequence

from torch import Tensor

from . import algebra, collectives
from .algebra import FoldForward
from .collectives import Part, Whole
from .stages import FoldedTerm, Moments, Operand, Stages
from .tail import TailBackward, TailForward, TailState, fixed_forward, folded_backward
from .units import Unit, UnitGrads


def forward(
    units: Sequence[Unit], stages: Stages, operands: Sequence[Operand], pixels: int, group: str
) -> list[TailForward]:
    """F3 and the fold of the tail units, on this rank's pixels of the output."""
    pairs = list(zip(units, operands, strict=True))
    folds = [_local_fold(unit, stages, operand) for unit, operand in pairs if unit.batch]
    parts = [Part(pixels, Moments(fold.mean, fold.var), mean) for fold, mean in folds]
    wholes = collectives.all_reduce_moments(group, parts) if parts else []
    source = iter(zip(folds, wholes, strict=True))
    results = []
    for unit, operand in pairs:
        if unit.batch:
            (fold, mean), whole = next(source)
            results.append(_shared_fold(unit, stages, operand, fold, mean, whole))
        else:
            results.append(fixed_forward(unit, operand))
    return results


def _local_fold(unit: Unit, stages: Stages, operand: Operand) -> tuple[FoldForward, Tensor]:
    """The fold with this rank's statistics, of which the moments and ``weight cov`` are wanted, and
    the mean of the operand in float64."""
    assert operand.centre is not None
    mean_d, cov = stages.gram(operand)
    arguments = unit.gamma, unit.beta, None, unit.eps, operand.centre, mean_d, cov
    fold = stages.fold(unit.weight, *arguments)
    return fold, mean_d.double() + operand.centre


def _shared_fold(
    unit: Unit, stages: Stages, operand: Operand, fold: FoldForward, mean: Tensor, whole: Whole
) -> TailForward:
    """The fold with the statistics of all ranks; mean: of this rank's operand."""
    centre = operand.centre
    assert centre is not None
    assert whole.operand_mean is not None
    acc = fold.invstd.dtype
    mean_d = (whole.operand_mean - centre).to(acc)
    deviation = (mean - whole.operand_mean).to(acc)
    weight = unit.matrix()
    invstd = algebra.inverse_std(whole.moments.var, unit.eps).to(acc)
    offset = algebra.folded_offset(weight, centre, mean_d, None)
    folded = algebra.fold(weight, unit.scale(invstd), offset, unit.beta, mean_d, unit.weight.dtype)
    fraction = whole.fraction.to(acc)
    state = TailState(invstd, offset, centre, mean_d, fold.weight_cov, deviation, fraction)
    moments = Moments(*(t.to(acc) for t in whole.moments))
    reported = unit.reported(moments, whole.correction.to(acc))
    return TailForward(FoldedTerm(operand, folded), None, state, reported)


def backward(
    units: Sequence[Unit],
    stages: Stages,
    states: Sequence[TailState],
    weights: Sequence[Tensor],
    products: Sequence[Tensor],
    sum_g: Tensor,
    pixels: int,
    group: str,
) -> list[TailBackward]:
    """Parameter gradients and operand-gradient coefficients of the tail units from this rank's
    products ``S = g^T D`` and sum_g; weights: the coefficients a (tail.operand_weight)."""
    rows = list(zip(units, states, weights, products, strict=True))
    dgammas = [
        algebra.folded_dgamma(unit.matrix(), state.invstd, state.offset, s, sum_g)
        for unit, state, _, s in rows
        if unit.batch
    ]
    shared = _shared_sums([sum_g, *dgammas], states, group) if dgammas else []
    source = iter(zip(dgammas, shared[1:], strict=True))
    results = []
    for unit, state, a, s in rows:
        if unit.batch:
            dgamma, total = next(source)
            fractions = (shared[0], total)
            results.append(_shared_backward(unit, state, a, s, sum_g, dgamma, fractions, pixels))
        else:
            results.append(folded_backward(unit, stages, state, a, s, sum_g, pixels))
    return results


def _shared_sums(sums: Sequence[Tensor], states: Sequence[TailState], group: str) -> list[Tensor]:
    """This rank's fraction, which is that of all the units, of sums over all ranks."""
    fraction = next(state.fraction for state in states if state.fraction is not None)
    return collectives.all_reduce_fraction(group, sums, fraction)


def _shared_backward(
    unit: Unit,
    state: TailState,
    a: Tensor,
    s: Tensor,
    sum_g: Tensor,
    dgamma: Tensor,
    shared: tuple[Tensor, Tensor],
    pixels: int,
) -> TailBackward:
    """shared: this rank's fraction of the sums of sum_g and dgamma over all ranks."""
    invstd, _, centre, mean_d, weight_cov, deviation = state[:6]
    assert centre is not None
    assert mean_d is not None
    assert weight_cov is not None
    assert deviation is not None
    weight, scale = unit.matrix(), unit.scale(invstd)
    dweight, dbias = algebra.synchronised_dweight(
        weight, scale, invstd, centre, mean_d, weight_cov, deviation, s, sum_g, *shared
    )
    coefficients = algebra.folded_operand_grad(weight, a, scale, invstd, mean_d, *shared, pixels)
    return TailBackward(UnitGrads(dweight, dbias, dgamma, sum_g), coefficients, None)
