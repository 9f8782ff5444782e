"""``FusedChain``: modules called one after the other, with each conv+BN+ReLU among them fused."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, functional, layout
from .functional import Unit
from .fused_module import FusedModule
from .layout import ChainLayout, Parts
from .modules import is_norm
from .rules import unit_pays

Named = tuple[str, Any]  # a module and its path
Group = tuple[Named, ...]  # one module, or a unit's convolution, normalisation and ReLU


class _UnitCall(NamedTuple):
    """A unit that can be fused: its input, and what it stands for, cast where autocast is on."""

    x: Tensor
    unit: Unit


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
    for name in where.names:
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
    if len(modules) != 3:
        return False
    (_, conv), (_, norm), (_, relu) = modules
    return isinstance(conv, nn.Conv2d) and is_norm(norm) and isinstance(relu, nn.ReLU)


def _groups(modules: Sequence[Named], where: ChainLayout) -> list[Group]:
    groups: list[Group] = []
    while modules:
        conv = modules[0][1]
        size = 1
        if _is_unit(modules[:3]) and (where.is_unit or unit_pays(conv.kernel_size, conv.groups)):
            size = 3
        groups.append(tuple(modules[:size]))
        modules = modules[size:]
    return groups


def has_units(module: nn.Module, where: ChainLayout) -> bool:
    """Whether the chain has a convolution, normalisation and ReLU in a row that pay."""
    return any(len(group) == 3 for group in _groups(_modules(module, where), where))


def plan(module: nn.Module, where: ChainLayout) -> list[Group] | str:
    """What the chain calls, in its order; or why not all its units are plain, or there are none."""
    given_out = getattr(module, where.given_out) if where.given_out else ()
    for name in where.names[:-1]:
        if name in given_out:
            return f"the output of {name} is given out"
    modules = _modules(module, where)
    groups = _groups(modules, where)
    units = [group for group in groups if len(group) == 3]
    if not units:
        kinds = ", ".join(f"{name} ({type(m).__name__})" for name, m in modules)
        return f"no conv+BN+ReLU that pays is in {kinds or 'it'}"
    for (conv, conv_module), (norm, norm_module), (relu, relu_module) in units:
        problem = layout.pair_reason(conv, conv_module, norm, norm_module)
        problem = problem or checks.child(relu, relu_module, nn.ReLU)
        if problem is not None:
            return problem
    return groups


def _unit_call(group: Group, x: Any) -> _UnitCall | str:
    """The unit on x, or the reason why its modules must be called."""
    reason = checks.environment(x)
    if reason is not None:
        return reason
    (_, conv), (_, norm), _ = group
    parts = Parts([(conv, norm)], None)
    cast, units = functional.autocast(x, parts.units())
    problem = checks.conv_bn_relu(cast, units[0])
    if problem is not None:
        return str(problem)
    reason = layout.norm_promotion(parts, cast) or functional.why_no_kernels(cast, units)
    return _UnitCall(cast, units[0]) if reason is None else reason


def _run_group(group: Group, x: Any) -> Any:
    call = _unit_call(group, x) if len(group) == 3 else None
    if isinstance(call, _UnitCall):
        return functional.run_conv_bn_relu(*call)
    for _, module in group:
        x = module(x)
    return x


class FusedChain(FusedModule):
    """A module of any class with a ``ChainLayout``: what calls its children in turn, or starts so.

    In the second case a view of the module, with nothing in place of those children, does the rest.
    torch.compile gets the plain module of all but a single unit, as it fuses these by itself.
    """

    plain_layout: ClassVar[ChainLayout]

    def _run(self, x: Tensor, call: _Call) -> Tensor:
        out: Any = x if call.first is None else functional.run_conv_bn_relu(*call.first)
        for group in call.groups:
            out = _run_group(group, out)
        return self._rest().composed(out) if self.plain_layout.has_rest else out

    def _rest(self) -> Any:
        view = object.__new__(type(self))
        idle: dict[str, nn.Module | None] = dict.fromkeys(self.plain_layout.names, nn.Identity())
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
