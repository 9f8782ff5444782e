"""Backward of backward: the programs composed from aten operations, differentiable twice.

Used only where grad mode is on inside backward. The forward value is rebuilt from the saved
inputs; the final ReLU of the block is the saved mask, a constant, as its second derivative is
zero.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .stages import conv2d, unpack_bits
from .tail import TailState, unpack_states
from .tail_plan import tail_plans
from .units import UnitState

if TYPE_CHECKING:
    from .autograd import Plan

Column = Sequence[Tensor | None]


def _normalise(
    y: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    fixed: UnitState | None,
    eps: float,
) -> Tensor:
    """BN of a convolution's output y (without its bias); fixed: mean without the bias, invstd."""
    if fixed is None:
        y = y if bias is None else y + bias.view(1, -1, 1, 1)
        return F.batch_norm(y, None, None, gamma, beta, True, 0.0, eps)
    value = (y.to(fixed.mean.dtype) - fixed.mean.view(1, -1, 1, 1)) * fixed.invstd.view(1, -1, 1, 1)
    if bias is not None:  # its value is in fixed.mean; this adds its gradient
        value = value + ((bias - bias.detach()) * fixed.invstd).view(1, -1, 1, 1)
    if gamma is not None:
        value = value * gamma.view(1, -1, 1, 1)
    if beta is not None:
        value = value + beta.view(1, -1, 1, 1)
    return value.to(y.dtype)


def _statistics(weight: Tensor, state: TailState) -> UnitState:
    """The statistics of a tail unit: the mean is ``weight centre - offset``."""
    if state.centre is None:
        return UnitState(-state.offset, state.invstd)
    matrix = weight.detach().flatten(1).to(state.centre.dtype)
    return UnitState(matrix @ state.centre - state.offset, state.invstd)


class _Unit(NamedTuple):
    """One unit's differentiable tensors, as aliases of the caller's.

    Aliases, so that a tensor used twice gets each use's gradient in its own place.
    """

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None


def _alias(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.view_as(t)


def _units(columns: Sequence[Column]) -> list[_Unit]:
    return [_Unit(*(_alias(t) for t in row)) for row in zip(*columns, strict=True)]  # type: ignore


def _apply(x: Tensor, unit: _Unit, plan: "Plan", index: int, fixed: UnitState | None) -> Tensor:
    """BN(conv(x)) of the unit at that index."""
    y = conv2d(x, unit.weight, plan.geometries[index])
    state = None if plan.batch[index] else fixed
    return _normalise(y, unit.bias, unit.gamma, unit.beta, state, plan.eps[index])


def _differentiate(
    out: Tensor, grad_out: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The needed gradients of out, with a graph; zeros where out does not depend on an input."""
    wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed and t is not None]
    grads = torch.autograd.grad(out, wanted, grad_out, create_graph=True, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]


def _require_local(plan: "Plan") -> None:
    """As the backward of nn.SyncBatchNorm, which is not differentiable either."""
    if plan.group is not None:
        raise RuntimeError(
            "a backward through batch statistics over several processes cannot be differentiated "
            "(create_graph=True): nn.SyncBatchNorm's cannot"
        )


def bottleneck_grads(
    plan: "Plan",
    grad_out: Tensor,
    x: Tensor,
    columns: Sequence[Column],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    identity: bool,
) -> list[Tensor]:
    """The needed gradients of the block in the order of ``needs``, themselves differentiable.

    Args:
        plan, x: as in autograd.py; columns: weights, biases, gammas, betas.
        saved: what the forward program kept.
        needs: for x, shortcut, then weight, bias, gamma, beta of each unit.
        identity: whether the residual was x.
    """
    _require_local(plan)
    source, units = x.view_as(x), _units(columns)
    y1, y2, mask, *rest = saved
    n, _, h, w = y2.shape
    live = unpack_bits(mask, grad_out.shape[1]).view(n, h, w, -1).permute(0, 3, 1, 2)
    g = torch.where(live, grad_out, 0)
    weights = [unit.weight for unit in units[2:]]
    plans = tail_plans(weights, plan.batch[2:], x, y1, y2, None)
    states = unpack_states(plans, iter(rest[4:]))
    a1 = torch.relu(_apply(source, units[0], plan, 0, UnitState(*rest[0:2])))
    a2 = torch.relu(_apply(a1, units[1], plan, 1, UnitState(*rest[2:4])))
    z = _apply(a2, units[2], plan, 2, _statistics(units[2].weight, states[0]))
    if len(units) > 3:
        z = z + _apply(source, units[3], plan, 3, _statistics(units[3].weight, states[1]))
    if identity:
        z = z + source
    inputs = [source, *(t for unit in units for t in unit)]
    needs_x, needs_shortcut, *others = needs
    grads = _differentiate(z, g, inputs, [needs_x, *others])
    if needs_shortcut:
        grads.insert(1 if needs_x else 0, g)
    return grads


def conv_bn_relu_grads(
    plan: "Plan",
    grad_out: Tensor,
    x: Tensor,
    columns: Sequence[Column],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of ``relu(bn(conv(x)))``, pooled or not, themselves differentiable."""
    _require_local(plan)
    source, units = x.view_as(x), _units(columns)
    out = torch.relu(_apply(source, units[0], plan, 0, UnitState(*saved[1:3])))
    if plan.pool is not None:
        out = F.max_pool2d(out, *plan.pool)
    return _differentiate(out, grad_out, [source, *units[0]], needs)
