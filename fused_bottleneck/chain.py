"""``FusedChain``: modules called one after the other, with each conv+BN+ReLU among them fused, and
the max pooling after it where there are passes for that."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, dispatch, functional, layout
from .functional import Conv, Unit
from .fused_module import FusedModule
from .layout import ChainLayout, Parts
from .modules import is_norm, pool_arguments
from .operands import Pool
from .rules import unit_pays

Named = tuple[str, Any]  # a module and its path
# One module, or a unit's convolution, normalisation and ReLU, with or without a max pooling.
Group = tuple[Named, ...]
_UNIT = 3


class _UnitCall(NamedTuple):
    """A unit that can be fused: its input, and what it stands for, cast where autocast is on; its
    pooling, or the module that is to be called on its output."""

    x: Tensor
    unit: Unit
    pool: Pool | None
    called: Group


class _Call(NamedTuple):
    """A chain that can be fused: the unit it starts with, if it does, and the groups after that."""

    first: _UnitCall | None
    groups: list[Group]


def is_sequential(module: nn.Module) -> bool:
    """Whether the module's class calls its children in turn, as nn.Sequential does."""
    kind = module.plain_class if isinstance(module, FusedModule) else type(module)
    return issubclass(kind, nn.Sequential) and all(
        getattr(kind, name) is getattr(nn.Sequential, name) for name in ("forward", "__iter__")
    )


def _modules(module: nn.Module, where: ChainLayout) -> list[Named]:
    """The modules that are called in turn."""
    if not where.names:
        return list(module._modules.items())
    found: list[Named] = []
    for name in where.names_in(module):
        child = getattr(module, name, None)
        if isinstance(child, nn.Sequential) and _stands_for_its_children(child):
            found += [(f"{name}.{inner}", m) for inner, m in child._modules.items()]
        else:
            found.append((name, child))
    return found


def _stands_for_its_children(module: nn.Sequential) -> bool:
    return is_sequential(module) and checks.child("", module, type(module)) is None


def _is_unit(modules: Sequence[Named]) -> bool:
    """Whether these look like a unit; ``plan`` tells whether they are one."""
    if len(modules) != _UNIT:
        return False
    (_, conv), (_, norm), (_, relu) = modules
    return isinstance(conv, nn.Conv2d) and is_norm(norm) and isinstance(relu, nn.ReLU)


def _groups(modules: Sequence[Named], where: ChainLayout) -> list[Group]:
    groups: list[Group] = []
    while modules:
        conv = modules[0][1]
        size = 1
        if _is_unit(modules[:_UNIT]) and (
            where.is_unit or unit_pays(conv.kernel_size, conv.groups)
        ):
            pooled = any(isinstance(m, nn.MaxPool2d) for _, m in modules[_UNIT : _UNIT + 1])
            size = _UNIT + pooled
        groups.append(tuple(modules[:size]))
        modules = modules[size:]
    return groups


def has_units(module: nn.Module, where: ChainLayout) -> bool:
    """Whether the chain has a convolution, normalisation and ReLU in a row that pay."""
    return any(len(group) >= _UNIT for group in _groups(_modules(module, where), where))


def plan(module: nn.Module, where: ChainLayout) -> list[Group] | str:
    """What the chain calls, in its order; or why not all its units are plain, or there are none."""
    modules = _modules(module, where)
    groups = _groups(modules, where)
    units = [group[:_UNIT] for group in groups if len(group) >= _UNIT]
    called = where.names_in(module)
    if not units and called != where.names:
        return f"the output of {called[-1]} is given out"
    if not units:
        kinds = ", ".join(f"{name} ({type(m).__name__})" for name, m in modules)
        return f"no conv+BN+ReLU that pays is in {kinds or 'it'}"
    for (conv, conv_module), (norm, norm_module), (relu, relu_module) in units:
        problem = layout.pair_reason(conv, conv_module, norm, norm_module)
        problem = problem or checks.child(relu, relu_module, nn.ReLU)
        if problem is not None:
            return problem
    for name, child in modules:
        if child is None:
            return f"{name} is missing"
    return groups


def _pool(group: Group, x: Tensor, conv: Conv) -> Pool | None:
    """The pooling of a unit's output as the passes take it; None where there is none such."""
    for name, module in group[_UNIT:]:
        if checks.child(name, module, nn.MaxPool2d) is not None or not dispatch.pools(x):
            continue
        pool = pool_arguments(module)
        kernel = (conv.weight.shape[2], conv.weight.shape[3])
        size = conv.geometry().output_size(x.shape[2], x.shape[3], kernel)
        if pool is not None and pool.fits(*size):
            return pool
    return None


def _unit_call(group: Group, x: Any) -> _UnitCall | str:
    """The unit on x, or the reason why its modules must be called."""
    reason = checks.environment(x)
    if reason is not None:
        return reason
    (_, conv), (_, norm), *_ = group
    parts = Parts([(conv, norm)], None)
    cast, units = functional.autocast(x, parts.units())
    problem = checks.conv_bn_relu(cast, units[0])
    if problem is not None:
        return str(problem)
    reason = layout.norm_promotion(parts, cast) or functional.why_no_kernels(cast, units)
    if reason is not None:
        return reason
    pool = _pool(group, cast, units[0][0])
    return _UnitCall(cast, units[0], pool, group[_UNIT:] if pool is None else ())


def _run_unit(call: _UnitCall) -> Any:
    out = functional.run_conv_bn_relu(call.x, call.unit, call.pool)
    return _run_modules(call.called, out)


def _run_modules(modules: Group, x: Any) -> Any:
    for _, module in modules:
        x = module(x)
    return x


def _run_group(group: Group, x: Any) -> Any:
    call = _unit_call(group, x) if len(group) >= _UNIT else None
    return _run_unit(call) if isinstance(call, _UnitCall) else _run_modules(group, x)


class FusedChain(FusedModule):
    """A module of any class with a ``ChainLayout``: what calls its children in turn, or starts so.

    In the second case a view of the module, with nothing in place of those children, does the rest.
    torch.compile gets the plain module of all but a single unit, as it fuses these by itself.
    """

    plain_layout: ClassVar[ChainLayout]

    def _run(self, x: Tensor, call: _Call) -> Tensor:
        out: Any = x if call.first is None else _run_unit(call.first)
        for group in call.groups:
            out = _run_group(group, out)
        return self._rest().composed(out) if self.plain_layout.has_rest else out

    def _rest(self) -> Any:
        view = object.__new__(type(self))
        names = self.plain_layout.names_in(self)
        idle: dict[str, nn.Module | None] = dict.fromkeys(names, nn.Identity())
        view.__dict__ = self.__dict__ | {"_modules": self._modules | idle}
        return view

    def _fused_call(self, x: Any) -> _Call | str:
        reason = checks.environment(x) or checks.global_hooks()
        if reason is None and torch.compiler.is_compiling() and not self.plain_layout.is_unit:
            reason = "torch.compile fuses conv, normalisation and ReLU by itself"
        groups = plan(self, self.plain_layout) if reason is None else reason
        if isinstance(groups, str):
            return groups
        if len(groups[0]) == 1:
            return _Call(None, groups)
        first = _unit_call(groups[0], x)
        return first if isinstance(first, str) else _Call(first, groups[1:])
