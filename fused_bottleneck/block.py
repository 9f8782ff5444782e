"""``FusedBlock``: the fused forward of every bottleneck block, whatever its children are called."""

from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, functional, layout
from .functional import Unit
from .layout import Layout


def composed_method(plain: type[nn.Module]) -> Callable[..., Tensor]:
    """The forward of a plain class, under the name of a method of its fused class.

    torch.jit compiles a method by the name that its function has, and forward is another one.
    """
    forward = plain.forward
    if not isinstance(forward, FunctionType):
        return forward
    code, defaults = forward.__code__, forward.__defaults__
    method = FunctionType(code, forward.__globals__, "composed", defaults, forward.__closure__)
    method.__kwdefaults__ = forward.__kwdefaults__
    method.__annotations__ = forward.__annotations__
    return method


class _Call(NamedTuple):
    """A call that can be fused: x and the units, cast where autocast is on."""

    x: Tensor
    units: list[Unit]
    called: nn.Module | None


class FusedBlock(nn.Module):
    """Base of the fused classes, each of which also derives from the plain class it stands for.

    Geometry, modes and parameters are read from the children at every call. Where fusing would
    change what the user sees, the plain class's own forward runs.

    Class attributes: ``plain_class``; ``plain_layout``, where it keeps its parts; ``composed``, its
    forward.
    """

    plain_class: ClassVar[type[nn.Module]]
    plain_layout: ClassVar[Layout]
    composed: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.composed(x)
        return self._forward(x)

    @torch.jit.unused
    def why_not_fused(self, x: Tensor) -> str | None:
        """The reason why ``self(x)`` would run composed, in one sentence; None if it is fused.

        Runs nothing; the output of a downsample that is not conv1x1+BN is taken on trust.
        """
        call = self._fused_call(x)
        return call if isinstance(call, str) else None

    @torch.jit.unused
    def _forward(self, x: Tensor) -> Tensor:
        call = self._fused_call(x)
        if isinstance(call, str):
            return self.composed(x)
        shortcut = None
        if call.called is not None:
            residual = call.called(x)
            shortcut = residual
            if self.plain_layout.adds_in_place:  # which casts to the branch's dtype
                shortcut = functional.autocast_shortcut(residual, call.x)
            if checks.residual(call.x, call.units, shortcut) is not None:
                return layout.composed_with(self, self.plain_layout, x, residual)
        return functional.run_bottleneck(call.x, call.units, shortcut)

    def _fused_call(self, x: Any) -> _Call | str:
        """The call on x, or the reason why it must run composed."""
        reason = checks.environment(x) or checks.global_hooks()
        reason = reason or layout.reason(self, self.plain_layout)
        if reason is not None:
            return reason
        parts = layout.read(self, self.plain_layout)
        cast, units = functional.autocast(x, parts.units())
        problem = checks.bottleneck(cast, units)
        if problem is None and parts.called is None:
            problem = checks.residual(cast, units, None)
        if problem is not None:
            return str(problem)
        reason = layout.promotion(parts, self.plain_layout, x, cast)
        reason = reason or functional.why_no_kernels(cast, units)
        return _Call(cast, units, parts.called) if reason is None else reason
