"""The autograd Functions: the custom ops and what they keep for backward.

Both Functions take ``(plan, observe, x[, shortcut], *tensors)`` with six tensors per unit (weight,
bias, gamma, beta, fixed mean, fixed variance; absent ones None) and return ``(out, *moments)``, the
batch mean and variance of each unit that uses them. ``observe``, if given, is called with the
moments before autograd saves anything: activation checkpointing stops the second forward there,
and the running statistics are to see it (as nn's do).

Differentiating the backward itself (``create_graph=True``) goes through
double_backward.py; the ordinary backward never does.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import double_backward
from .operands import Geometry, Pool
from .ops import pack_geometry, pack_pool

TENSORS_PER_UNIT = 6
Observer = Callable[[Sequence[Tensor]], None]
_ops = torch.ops.fused_bottleneck


class Plan(NamedTuple):
    """Everything about a program's units that is not a tensor, one entry per unit.

    batch: normalise with batch statistics. channels_last: layout of out and of grad_x.
    backend: what is to serve (dispatch.py); None for its choice. group: the name of the process
    group over whose ranks batch statistics are taken; None: over this process's batch.
    pool: the max pooling of the ReLU's output, of conv+BN+ReLU only.
    """

    eps: tuple[float, ...]
    geometries: tuple[Geometry, ...]
    batch: tuple[bool, ...]
    channels_last: tuple[bool, bool]
    backend: str | None = None
    group: str | None = None
    pool: Pool | None = None


def _forward_fields(plan: Plan, tensors: Sequence[Tensor | None]) -> list[Any]:
    columns = [list(tensors[i::TENSORS_PER_UNIT]) for i in range(TENSORS_PER_UNIT)]
    geometries = pack_geometry(plan.geometries)
    return [*columns, plan.eps, geometries, plan.channels_last[0], plan.backend, plan.group]


def _save(ctx: Any, x: Tensor, tensors: Sequence[Tensor | None], saved: Sequence[Tensor]) -> None:
    """Keep x, every unit's weight, bias, gamma and beta, and the program's own tensors.

    Never the fixed statistics: running statistics change without notice, so the program keeps
    what it derived from them instead.
    """
    parameters = [t for i, t in enumerate(tensors) if i % TENSORS_PER_UNIT < 4]
    ctx.save_for_backward(x, *parameters, *saved)


def _keep_moments_out(ctx: Any, moments: Sequence[Tensor]) -> None:
    """Moments take no part in backward, nor are zeros made for their gradients; torch.compile makes
    none anyway, and does not know how to ask for that."""
    ctx.mark_non_differentiable(*moments)
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


def _load(ctx: Any) -> tuple[Tensor, list[list[Tensor | None]], list[Tensor]]:
    """The inverse of ``_save``: x, the four columns of parameters, the program's tensors."""
    x, *rest = ctx.saved_tensors
    count = 4 * len(ctx.plan.batch)
    return x, [rest[i:count:4] for i in range(4)], rest[count:]


def _scatter(
    needs: Sequence[bool], grads: Sequence[Tensor], fixed: int
) -> tuple[Tensor | None, ...]:
    """Put the needed gradients in their places; fixed statistics get none."""
    source = iter(grads)
    placed = [next(source) if needed else None for needed in needs]
    units = placed[fixed:]
    result = placed[:fixed]
    for i in range(0, len(units), 4):
        result += [*units[i : i + 4], None, None]
    return tuple(result)


def _needs(ctx: Any, fixed: int) -> list[bool]:
    """needs_input_grad without plan, observer and the fixed statistics."""
    flags = list(ctx.needs_input_grad[2:])
    parameters = [n for i, n in enumerate(flags[fixed:]) if i % TENSORS_PER_UNIT < 4]
    return flags[:fixed] + parameters


class BottleneckFunction(torch.autograd.Function):
    """The bottleneck block; the residual is shortcut, a downsample (a fourth unit), or x."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        observe: Observer | None,
        x: Tensor,
        shortcut: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        out, saved, moments = _ops.bottleneck_forward(x, shortcut, *_forward_fields(plan, tensors))
        if observe is not None:
            observe(moments)
        ctx.plan = plan
        ctx.identity = shortcut is None and len(plan.batch) == 3
        _save(ctx, x, tensors, saved)
        _keep_moments_out(ctx, moments)
        return (out, *moments)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        x, (weights, biases, gammas, betas), saved = _load(ctx)
        needs = _needs(ctx, fixed=2)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            columns = (weights, biases, gammas, betas)
            grads = double_backward.bottleneck_grads(
                ctx.plan, grad_out, x, columns, saved, needs, ctx.identity
            )
        else:
            grads = _ops.bottleneck_backward(
                grad_out,
                x,
                ctx.identity,
                weights,
                gammas,
                betas,
                saved,
                pack_geometry(ctx.plan.geometries),
                ctx.plan.batch,
                needs,
                ctx.plan.channels_last[1],
                ctx.plan.backend,
                ctx.plan.group,
            )
        return None, None, *_scatter(needs, grads, fixed=2)


class ConvBNReLUFunction(torch.autograd.Function):
    """``relu(bn(conv(x)))``, one unit, or the max pooling of it."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, observe: Observer | None, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        fields = _forward_fields(plan, tensors)
        out, saved, moments = _ops.conv_bn_relu_forward(x, *fields, pack_pool(plan.pool))
        if observe is not None:
            observe(moments)
        ctx.plan = plan
        _save(ctx, x, tensors, saved)
        _keep_moments_out(ctx, moments)
        return (out, *moments)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        x, (weights, biases, gammas, betas), saved = _load(ctx)
        needs = _needs(ctx, fixed=1)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            columns = (weights, biases, gammas, betas)
            grads = double_backward.conv_bn_relu_grads(ctx.plan, grad_out, x, columns, saved, needs)
        else:
            grads = _ops.conv_bn_relu_backward(
                grad_out,
                x,
                weights,
                gammas,
                betas,
                saved,
                pack_geometry(ctx.plan.geometries),
                ctx.plan.batch,
                needs,
                ctx.plan.channels_last[1],
                ctx.plan.backend,
                ctx.plan.group,
                pack_pool(ctx.plan.pool),
            )
        return None, None, *_scatter(needs, grads, fixed=1)
