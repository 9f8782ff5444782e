"""The straight-line programs: forward and backward of the bottleneck and of conv+BN+ReLU.

Each line is a stage (stages.py) or a formula (algebra.py). Nothing here knows about devices:
``dispatch.stages_for`` hands out the implementation.

A program's units are its convolutions with their normalisations, in the order conv1, conv2,
conv3[, downsample].
"""

from collections.abc import Sequence

from torch import Tensor

from . import algebra, collectives, sync_tail, tail
from .dispatch import stages_for
from .operands import (
    POINTWISE,
    Activation,
    ConvGrad,
    Geometry,
    MaskedGrad,
    Normalised,
    Pool,
    PooledGrad,
    StridedInput,
    pixels,
    strided,
)
from .stages import ConvTerm, GradSums, InputTerm, Operand, Stages
from .tail import TailBackward, TailForward, TailState
from .tail_plan import TailPlan, tail_plans
from .units import (
    Unit,
    UnitGrads,
    UnitState,
    activation,
    batch_activation,
    conv_grad,
    unit_grads,
    unit_state,
    unpack_state,
)


def _conv_unit(
    stages: Stages, source: Tensor | Activation, unit: Unit, group: str | None
) -> tuple[Activation, UnitState, list[Tensor]]:
    """F1, F2: a convolution's output, normalised, as an operand; the state of the normalisation,
    and what is reported."""
    if not unit.batch:
        y = stages.conv(source, unit.weight, unit.geometry)
        state = unit_state(unit, unit.fixed_moments())
        return activation(y, unit, state), state, []
    y, moments = stages.conv_forward(source, unit.weight, unit.geometry)
    return batch_activation(stages, y, unit, moments, group)


def _convolutions(units: Sequence[Unit]) -> list[tuple[Tensor, Geometry]]:
    return [(unit.weight, unit.geometry) for unit in units]


def _tail_operand(
    stages: Stages, act: Activation, unit2: Unit, unit3: Unit, plan: TailPlan
) -> Activation:
    """The operand of conv3. If it is centred then around relu(beta2), where batch statistics put
    BN2's output.

    Fixed ones may put it anywhere, and BN3's covariance then wants a centre taken from the data.
    """
    if not plan.centred:
        return act
    if unit3.batch and not unit2.batch:
        return act._replace(centre=stages.centre(act))
    return act._replace(centre=algebra.relu_of_shift(act.beta, act.mean))


def _downsample_operand(stages: Stages, x: Tensor, unit: Unit, plan: TailPlan) -> StridedInput:
    """The input of the downsample, centred if a covariance is taken of its pixels. Otherwise a
    centre is zero: with fixed statistics a NaN in x stays where it is."""
    stride = unit.geometry.stride
    if plan.gram:
        return StridedInput(x, stride, stages.centre(strided(x, stride)))
    if not plan.centred:
        return StridedInput(x, stride)
    return StridedInput(
        x, stride, x.new_zeros(x.shape[1], dtype=algebra.accumulation_dtype(x.dtype))
    )


def _plans(
    units: Sequence[Unit], x: Tensor, y1: Tensor, y2: Tensor, group: str | None
) -> list[TailPlan]:
    """Of the units of the tail."""
    return tail_plans([u.weight for u in units], [u.batch for u in units], x, y1, y2, group)


def bottleneck_forward(
    x: Tensor,
    shortcut: Tensor | None,
    units: Sequence[Unit],
    channels_last: bool,
    backend: str | None = None,
    group: str | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Forward of the block.

    Args:
        x: ``[N, C, H, W]``, any strides.
        shortcut: the residual ``[N, 4M, H', W']``; None: the downsample if there are four units,
            else x.
        units: conv1, conv2, conv3[, downsample].
        channels_last: layout of out.
        backend: see ``dispatch.stages_for``.
        group: the name of the process group over whose ranks batch statistics are taken; None for
            this process alone.

    Returns:
        out ``[N, 4M, H', W']``; what backward needs: ``[y1, y2, mask, *states]``; the mean and
        unbiased variance of every batch that a normalisation used, in the order of the units.
    """
    _require_agreement(x, units, group)
    with stages_for(x, _convolutions(units), backend) as stages:
        whole = None if group else stages.whole_forward(x, shortcut, units, channels_last)
        if whole is not None:
            return whole
        x = stages.channels_last(x)
        act1, state1, reported1 = _conv_unit(stages, x, units[0], group)
        act2, state2, reported2 = _conv_unit(stages, act1, units[1], group)
        plans = _plans(units[2:], x, act1.y, act2.y, group)
        operands: list[Operand] = [_tail_operand(stages, act2, units[1], units[2], plans[0])]
        residuals: list[Tensor | Normalised] = []
        if len(units) > 3:
            operands.append(_downsample_operand(stages, x, units[3], plans[1]))
        else:
            residuals.append(x if shortcut is None else shortcut)
        tails = _tails_forward(stages, units[2:], operands, pixels(act2.y), plans, group)
        terms = [t.term for t in tails if t.term is not None]
        residuals += [t.added for t in tails if t.added is not None]
        out, mask = stages.tail_forward(terms, residuals, channels_last)
    saved = [act1.y, act2.y, mask, *state1.tensors(), *state2.tensors()]
    saved += [s for t in tails for s in t.state.tensors()]
    return out, saved, [*reported1, *reported2, *(r for t in tails for r in t.reported)]


def _tails_forward(
    stages: Stages,
    units: Sequence[Unit],
    operands: Sequence[Operand],
    count: int,
    plans: Sequence[TailPlan],
    group: str | None,
) -> list[TailForward]:
    """F3 and the folds."""
    if group is not None:
        return sync_tail.forward(units, stages, operands, count, group)
    rows = zip(units, operands, plans, strict=True)
    return [tail.forward(unit, stages, operand, count, plan) for unit, operand, plan in rows]


def _require_agreement(x: Tensor, units: Sequence[Unit], group: str | None) -> None:
    if group is not None:
        shapes = [f"{list(unit.weight.shape)}{'' if unit.batch else ' fixed'}" for unit in units]
        collectives.require_agreement(group, "weights " + ", ".join(shapes), x.device)


def _tails_backward(
    stages: Stages,
    units: Sequence[Unit],
    states: Sequence[TailState],
    plans: Sequence[TailPlan],
    operands: Sequence[Operand],
    grad: MaskedGrad,
    count: int,
    needed: Sequence[bool],
    group: str | None,
) -> list[TailBackward]:
    """B1 and the coefficients of the tail units: one pass over g for the folded ones."""
    folded = [i for i, plan in enumerate(plans) if plan.folded]
    results: dict[int, TailBackward] = {}
    if folded:
        weights = [tail.operand_weight(units[i], stages, states[i]) for i in folded]
        sum_g, products = stages.tail_wgrad(grad, [operands[i] for i in folded], weights)
        if group is not None:  # where all are folded
            return sync_tail.backward(units, stages, states, weights, products, sum_g, count, group)
        for i, a, s in zip(folded, weights, products, strict=True):
            results[i] = tail.folded_backward(units[i], stages, states[i], a, s, sum_g, count)
    for i, unit in enumerate(units):
        if i not in results:
            results[i] = tail.product_backward(
                unit, stages, states[i], operands[i], grad, needed[i]
            )
    return [results[i] for i in range(len(units))]


def _operand_gradient(
    stages: Stages,
    result: TailBackward,
    grad: MaskedGrad,
    weight: Tensor,
    act: Activation,
    invstd: Tensor,
) -> tuple[Tensor, GradSums]:
    """B2: the gradient of conv3's operand, through its ReLU."""
    if result.conv_grad is not None:
        return stages.conv_dgrad(result.conv_grad, weight, POINTWISE, act, invstd)
    assert result.coefficients is not None
    return stages.tail_dgrad(grad, act, result.coefficients, invstd)


def _downsample_term(
    unit: Unit, operand: Operand, result: TailBackward, grad: MaskedGrad
) -> InputTerm | ConvTerm:
    """The downsample's part of grad_x."""
    if result.conv_grad is not None:
        return ConvTerm(result.conv_grad, unit.weight, unit.geometry)
    assert isinstance(operand, StridedInput)
    assert result.coefficients is not None
    return InputTerm(operand, result.coefficients, grad)


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
    backend: str | None = None,
    group: str | None = None,
) -> tuple[Tensor | None, Tensor | None, list[UnitGrads]]:
    """Backward of the block: gradients of x, of a given shortcut, and of every unit's parameters.

    Args:
        grad_out: ``[N, 4M, H', W']``, any strides.
        x, units: as in forward.
        saved: as returned by ``bottleneck_forward``.
        needs_x, needs_shortcut, needs_weight: what to compute.
        identity: whether the residual was x itself.
        channels_last: layout of grad_x.
        backend: see ``dispatch.stages_for``.
        group: as in forward.
    """
    with stages_for(x, _convolutions(units), backend) as stages:
        x = stages.channels_last(x)
        grad = MaskedGrad(stages.channels_last(grad_out), saved[2])
        arguments = grad, x, units, saved, needs_x, needs_weight, identity, channels_last
        found = None if group else stages.whole_backward(*arguments)
        grad_x, grads = found or _backward_in_lines(stages, *arguments, group)
        grad_shortcut = stages.masked_grad(grad) if needs_shortcut else None
    return grad_x, grad_shortcut, grads


def _backward_in_lines(
    stages: Stages,
    grad: MaskedGrad,
    x: Tensor,
    units: Sequence[Unit],
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_weight: Sequence[bool],
    identity: bool,
    channels_last: bool,
    group: str | None,
) -> tuple[Tensor | None, list[UnitGrads]]:
    """The gradients of x and of the parameters, stage by stage."""
    y1, y2, _, *rest = saved
    source = iter(rest)
    state1, state2 = (unpack_state(unit, source, group) for unit in units[:2])
    plans = _plans(units[2:], x, y1, y2, group)
    states = tail.unpack_states(plans, source)
    act1 = activation(y1, units[0], state1)
    act2 = activation(y2, units[1], state2)._replace(centre=states[0].centre)
    operands: list[Operand] = [act2]
    if len(units) > 3:
        operands.append(StridedInput(x, units[3].geometry.stride, states[1].centre))
    tails = _tails_backward(
        stages, units[2:], states, plans, operands, grad, pixels(y2), needs_weight[2:], group
    )
    g2, sums2 = _operand_gradient(stages, tails[0], grad, units[2].weight, act2, state2.invstd)
    dy2 = conv_grad(stages, units[1], y2, state2, g2, sums2, act2.scale, group)
    geometry = units[1].geometry
    g1, sums1 = stages.conv_dgrad(dy2, units[1].weight, geometry, act1, state1.invstd)
    dw2 = _weight_grad(stages, dy2, act1, units[1], needs_weight[1])
    dy1 = conv_grad(stages, units[0], y1, state1, g1, sums1, act1.scale, group)
    dw1 = _weight_grad(stages, dy1, x, units[0], needs_weight[0])
    grad_x = None
    if needs_x:
        downsample = None
        if len(units) > 3:
            downsample = _downsample_term(units[3], operands[1], tails[1], grad)
        term = ConvTerm(dy1, units[0].weight, POINTWISE)
        identity_grad = grad if identity else None
        grad_x = stages.input_dgrad(term, x, identity_grad, downsample, channels_last)
    grads = [
        unit_grads(units[0], dy1, state1, sums1, dw1),
        unit_grads(units[1], dy2, state2, sums2, dw2),
        *(t.grads for t in tails),
    ]
    return grad_x, grads


def _weight_grad(
    stages: Stages, grad: ConvGrad, source: Tensor | Activation, unit: Unit, needed: bool
) -> Tensor:
    """B4, B5: the gradient of a unit's weight; empty if it is not needed."""
    if not needed:
        return grad.scale.new_empty(0)
    return stages.conv_wgrad(grad, source, unit.weight, unit.geometry)


def conv_bn_relu_forward(
    x: Tensor,
    unit: Unit,
    channels_last: bool,
    backend: str | None = None,
    group: str | None = None,
    pool: Pool | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Forward of ``relu(bn(conv(x)))``, or of the max pooling of it.

    Returns out; ``[y, *state]``, and with a pooling its taps (``PooledGrad``); the statistics of
    the batch.
    """
    _require_agreement(x, [unit], group)
    with stages_for(x, _convolutions([unit]), backend) as stages:
        act, state, reported = _conv_unit(stages, stages.channels_last(x), unit, group)
        saved = [act.y, *state.tensors()]
        if pool is None:
            out = stages.activation(act, channels_last)
        else:
            out, taps = stages.pooled(act, pool, channels_last)
            saved.append(taps)
    return out, saved, reported


def conv_bn_relu_backward(
    grad_out: Tensor,
    x: Tensor,
    unit: Unit,
    saved: Sequence[Tensor],
    needs_x: bool,
    needs_weight: bool,
    channels_last: bool,
    backend: str | None = None,
    group: str | None = None,
    pool: Pool | None = None,
) -> tuple[Tensor | None, UnitGrads]:
    """Backward of ``relu(bn(conv(x)))``: gradients of x and of the unit's parameters."""
    y, rest = saved[0], iter(saved[1:])
    state = unpack_state(unit, rest, group)
    with stages_for(x, _convolutions([unit]), backend) as stages:
        x = stages.channels_last(x)
        act = activation(y, unit, state)
        g: Tensor | PooledGrad
        if pool is None:
            g, sums = stages.relu_backward(grad_out, act, state.invstd)
        else:
            g = PooledGrad(stages.channels_last(grad_out), next(rest), pool)
            sums = stages.pooled_reduce(g, y, state.mean, state.invstd)
        dy = conv_grad(stages, unit, y, state, g, sums, act.scale, group)
        needs = needs_x, needs_weight
        grad_x, dweight = stages.conv_backward(
            dy, x, unit.weight, unit.geometry, needs, channels_last
        )
    if dweight is None:
        dweight = dy.scale.new_empty(0)
    return grad_x, unit_grads(unit, dy, state, sums, dweight)
