"""The functional custom ops: one pair, forward and backward, per unit of fusion.

Opaque to torch.compile (fake kernels give the shapes), free of mutated arguments, and without
autograd formulas of their own: autograd.py has them. A program's units travel as flat lists with
one entry per unit; what is absent (a bias, an affine parameter, a fixed statistic) is None there.

``needs`` says which gradients a backward op returns, in the order x, shortcut (bottleneck only),
then weight, bias, gamma and beta of each unit.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import program
from .algebra import accumulation_dtype
from .operands import Geometry, Pool
from .tail_plan import TailPlan, tail_plans
from .units import Unit, UnitGrads

_FORWARD = (
    "Tensor[] weights, Tensor?[] biases, Tensor?[] gammas, Tensor?[] betas, "
    "Tensor?[] means, Tensor?[] vars, float[] eps, int[] geometry, bool channels_last, "
    "str? backend, str? group"
)
_RESULT = "(Tensor, Tensor[], Tensor[])"
_BACKWARD = (
    "Tensor[] weights, Tensor?[] gammas, Tensor?[] betas, Tensor[] saved, "
    "int[] geometry, bool[] batch, bool[] needs, bool channels_last, str? backend, str? group"
)
_SCHEMAS = (
    f"bottleneck_forward(Tensor x, Tensor? shortcut, {_FORWARD}) -> {_RESULT}",
    f"bottleneck_backward(Tensor grad_out, Tensor x, bool identity, {_BACKWARD}) -> Tensor[]",
    f"conv_bn_relu_forward(Tensor x, {_FORWARD}, int[]? pool) -> {_RESULT}",
    f"conv_bn_relu_backward(Tensor grad_out, Tensor x, {_BACKWARD}, int[]? pool) -> Tensor[]",
)
_GEOMETRY_INTS = 7
_PARAMETERS_PER_UNIT = 4

Optionals = Sequence[Tensor | None]
ForwardResult = tuple[Tensor, list[Tensor], list[Tensor]]

library = torch.library.Library("fused_bottleneck", "FRAGMENT")
for _schema in _SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _implement(name: str, implementation: Callable, fake: Callable) -> None:
    """Register an op's kernel for every device, with autograd and autocast off, and its fake."""

    def kernel(*args, **kwargs):  # type: ignore[no-untyped-def]
        device = args[0].device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return implementation(*args, **kwargs)

    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_bottleneck::{name}", fake, lib=library)


def pack_geometry(geometries: Sequence[Geometry]) -> list[int]:
    """Geometries as a flat list of seven integers each."""
    return [i for g in geometries for i in (*g.stride, *g.padding, *g.dilation, g.groups)]


def _unpack_geometry(flat: Sequence[int]) -> list[Geometry]:
    rows = [flat[i : i + _GEOMETRY_INTS] for i in range(0, len(flat), _GEOMETRY_INTS)]
    return [Geometry((r[0], r[1]), (r[2], r[3]), (r[4], r[5]), r[6]) for r in rows]


def pack_pool(pool: Pool | None) -> list[int] | None:
    """A pooling as nine integers."""
    return None if pool is None else [*(i for pair in pool[:4] for i in pair), int(pool.ceil_mode)]


def _unpack_pool(flat: Sequence[int] | None) -> Pool | None:
    if flat is None:
        return None
    k, k2, s, s2, p, p2, d, d2, ceil_mode = flat
    return Pool((k, k2), (s, s2), (p, p2), (d, d2), bool(ceil_mode))


def _forward_arguments(*arguments: Any) -> tuple[list[Unit], bool, str | None, str | None]:
    """Units, channels_last, backend and group: what the forward ops have in common."""
    *fields, channels_last, backend, group = arguments
    return _forward_units(*fields), channels_last, backend, group


def _contiguous(vectors: Optionals) -> Optionals:
    """Parameters may be views with any stride; the stages read vectors element by element."""
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in vectors]


def _forward_units(
    weights: Sequence[Tensor],
    biases: Optionals,
    gammas: Optionals,
    betas: Optionals,
    means: Optionals,
    variances: Optionals,
    eps: Sequence[float],
    geometry: Sequence[int],
) -> list[Unit]:
    vectors = map(_contiguous, (biases, gammas, betas, means, variances))
    return [
        Unit(w, gamma, beta, geo, mean is None, bias, mean, var, e)
        for w, bias, gamma, beta, mean, var, e, geo in zip(
            weights, *vectors, eps, _unpack_geometry(geometry), strict=True
        )
    ]


def _backward_units(
    weights: Sequence[Tensor],
    gammas: Optionals,
    betas: Optionals,
    geometry: Sequence[int],
    batch: Sequence[bool],
) -> list[Unit]:
    vectors = map(_contiguous, (gammas, betas))
    return [
        Unit(*fields)
        for fields in zip(weights, *vectors, _unpack_geometry(geometry), batch, strict=True)
    ]


def _same_memory_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are dense in one order (1x1 weights are so in both)."""
    layouts = (torch.contiguous_format, torch.channels_last)
    return any(
        a.is_contiguous(memory_format=f) and b.is_contiguous(memory_format=f) for f in layouts
    )


def _in_layout_of(leaf: Tensor, grad: Tensor) -> Tensor:
    """grad in the dtype, shape and strides of its leaf."""
    grad = grad.view(leaf.shape)
    if grad.dtype == leaf.dtype and _same_memory_order(grad, leaf):
        return grad.as_strided(leaf.shape, leaf.stride())
    return torch.empty_like(leaf).copy_(grad)


def _parameter_grads(units: Sequence[Unit], grads: Sequence[UnitGrads]) -> list[Tensor | None]:
    """The gradients of weight, bias, gamma, beta of each unit, as their leaves want them."""
    result: list[Tensor | None] = []
    for unit, grad in zip(units, grads, strict=True):
        result.append(_in_layout_of(unit.weight, grad.weight) if grad.weight.numel() else None)
        result.append(grad.bias.to(unit.weight.dtype))
        for leaf, value in ((unit.gamma, grad.gamma), (unit.beta, grad.beta)):
            result.append(None if leaf is None else value.to(leaf.dtype, copy=True))
    return result


def _select(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [g for g, needed in zip(grads, needs, strict=True) if needed and g is not None]


def _bottleneck_forward(x: Tensor, shortcut: Tensor | None, *arguments: Any) -> ForwardResult:
    return program.bottleneck_forward(x, shortcut, *_forward_arguments(*arguments))


def _bottleneck_backward(
    grad_out: Tensor,
    x: Tensor,
    identity: bool,
    weights: Sequence[Tensor],
    gammas: Optionals,
    betas: Optionals,
    saved: Sequence[Tensor],
    geometry: Sequence[int],
    batch: Sequence[bool],
    needs: Sequence[bool],
    channels_last: bool,
    backend: str | None,
    group: str | None,
) -> list[Tensor]:
    units = _backward_units(weights, gammas, betas, geometry, batch)
    needs_x, needs_shortcut, *needs_parameters = needs
    grad_x, grad_shortcut, grads = program.bottleneck_backward(
        grad_out,
        x,
        units,
        saved,
        needs_x,
        needs_shortcut,
        needs_parameters[::_PARAMETERS_PER_UNIT],
        identity,
        channels_last,
        backend,
        group,
    )
    return _select([grad_x, grad_shortcut, *_parameter_grads(units, grads)], needs)


def _conv_bn_relu_forward(x: Tensor, *arguments: Any) -> ForwardResult:
    *others, pool = arguments
    (unit,), channels_last, backend, group = _forward_arguments(*others)
    return program.conv_bn_relu_forward(x, unit, channels_last, backend, group, _unpack_pool(pool))


def _conv_bn_relu_backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Optionals,
    betas: Optionals,
    saved: Sequence[Tensor],
    geometry: Sequence[int],
    batch: Sequence[bool],
    needs: Sequence[bool],
    channels_last: bool,
    backend: str | None,
    group: str | None,
    pool: Sequence[int] | None,
) -> list[Tensor]:
    units = _backward_units(weights, gammas, betas, geometry, batch)
    needs_x, needs_weight = needs[:2]
    grad_x, grads = program.conv_bn_relu_backward(
        grad_out,
        x,
        units[0],
        saved,
        needs_x,
        needs_weight,
        channels_last,
        backend,
        group,
        _unpack_pool(pool),
    )
    return _select([grad_x, *_parameter_grads(units, [grads])], needs)


# Fake kernels: shapes, dtypes and strides of the results.


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _fake_conv(x: Tensor, unit: Unit, channels_last: bool = True) -> Tensor:
    height, width = unit.geometry.output_size(
        x.shape[2], x.shape[3], (unit.weight.shape[2], unit.weight.shape[3])
    )
    shape = (x.shape[0], unit.weight.shape[0], height, width)
    return x.new_empty(shape).to(memory_format=_layout(channels_last))


def _fake_vectors(x: Tensor, *sizes: int) -> list[Tensor]:
    return [x.new_empty(size, dtype=accumulation_dtype(x.dtype)) for size in sizes]


def _fake_unit_state(x: Tensor, unit: Unit, group: str | None) -> list[Tensor]:
    width = unit.weight.shape[0]
    shared = (width, 1) if unit.batch and group is not None else ()
    return _fake_vectors(x, width, width, *shared)


def _fake_tail_state(x: Tensor, unit: Unit, y: Tensor, plan: TailPlan) -> list[Tensor]:
    """y: the unit's output, of which the first images are kept in the product way."""
    width, channels = unit.weight.shape[:2]
    vectors = _fake_vectors(x, width, width, channels, channels)
    weight_cov = x.new_empty((width, channels), dtype=accumulation_dtype(x.dtype))
    if plan.folded:
        return [*vectors, weight_cov, *_fake_vectors(x, channels, 1)][: plan.state_length]
    return [*vectors[: plan.state_length - 1], torch.empty_like(y[: plan.images])]


def _fake_moments(x: Tensor, units: Sequence[Unit]) -> list[Tensor]:
    sizes = [unit.weight.shape[0] for unit in units if unit.batch for _ in range(2)]
    return _fake_vectors(x, *sizes)


def _bottleneck_forward_fake(x: Tensor, shortcut: Tensor | None, *arguments: Any) -> ForwardResult:
    units, channels_last, _, group = _forward_arguments(*arguments)
    y1 = _fake_conv(x, units[0])
    y2 = _fake_conv(y1, units[1])
    out = _fake_conv(y2, units[2], channels_last)
    rows = out.shape[0] * out.shape[2] * out.shape[3]
    mask = x.new_empty((rows, -(-out.shape[1] // 8)), dtype=torch.uint8)
    narrow = [t for unit in units[:2] for t in _fake_unit_state(x, unit, group)]
    weights, batch = [unit.weight for unit in units[2:]], [unit.batch for unit in units[2:]]
    plans = tail_plans(weights, batch, x, y1, y2, group)
    wide = _fake_conv(y2, units[2])
    folded = [
        t
        for unit, plan in zip(units[2:], plans, strict=True)
        for t in _fake_tail_state(x, unit, wide, plan)
    ]
    return out, [y1, y2, mask, *narrow, *folded], _fake_moments(x, units)


def _conv_bn_relu_forward_fake(x: Tensor, *arguments: Any) -> ForwardResult:
    *others, packed = arguments
    units, channels_last, _, group = _forward_arguments(*others)
    pool = _unpack_pool(packed)
    out = _fake_conv(x, units[0], channels_last)
    saved = [torch.empty_like(out, memory_format=torch.channels_last)]
    saved += _fake_unit_state(x, units[0], group)
    if pool is not None:
        size = pool.output_size(out.shape[2], out.shape[3])
        out = out.new_empty(*out.shape[:2], *size).to(memory_format=_layout(channels_last))
        saved.append(torch.empty_like(out, dtype=torch.uint8, memory_format=torch.channels_last))
    return out, saved, _fake_moments(x, units)


def _fake_grads(
    inputs: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    gammas: Optionals,
    betas: Optionals,
    needs: Sequence[bool],
) -> list[Tensor]:
    grads = [None if t is None else torch.empty_like(t) for t in inputs]
    for weight, gamma, beta in zip(weights, gammas, betas, strict=True):
        grads.append(torch.empty_like(weight))
        grads.append(weight.new_empty(weight.shape[0]))
        grads.extend(None if t is None else torch.empty_like(t) for t in (gamma, beta))
    return _select(grads, needs)


def _bottleneck_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    identity: bool,
    weights: Sequence[Tensor],
    gammas: Optionals,
    betas: Optionals,
    saved: Sequence[Tensor],
    geometry: Sequence[int],
    batch: Sequence[bool],
    needs: Sequence[bool],
    channels_last: bool,
    backend: str | None,
    group: str | None,
) -> list[Tensor]:
    grad_x = x.new_empty(x.shape).to(memory_format=_layout(channels_last))
    grad_shortcut = grad_out.new_empty(grad_out.shape).to(memory_format=torch.channels_last)
    return _fake_grads([grad_x, grad_shortcut], weights, gammas, betas, needs)


def _conv_bn_relu_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Optionals,
    betas: Optionals,
    saved: Sequence[Tensor],
    geometry: Sequence[int],
    batch: Sequence[bool],
    needs: Sequence[bool],
    channels_last: bool,
    backend: str | None,
    group: str | None,
    pool: Sequence[int] | None,
) -> list[Tensor]:
    grad_x = x.new_empty(x.shape).to(memory_format=_layout(channels_last))
    return _fake_grads([grad_x], weights, gammas, betas, needs)


_implement("bottleneck_forward", _bottleneck_forward, _bottleneck_forward_fake)
_implement("bottleneck_backward", _bottleneck_backward, _bottleneck_backward_fake)
_implement("conv_bn_relu_forward", _conv_bn_relu_forward, _conv_bn_relu_forward_fake)
_implement("conv_bn_relu_backward", _conv_bn_relu_backward, _conv_bn_relu_backward_fake)
