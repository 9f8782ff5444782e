"""``FusedBlock``: the fused forward of every bottleneck block, whatever its children are called."""

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from . import checks, functional, layout
from .functional import Unit
from .fused_module import FusedModule
from .layout import Layout


class _Call(NamedTuple):
    """A call that can be fused: x and the units, cast where autocast is on."""

    x: Tensor
    units: list[Unit]
    called: nn.Module | None


class FusedBlock(FusedModule):
    """A bottleneck block of any class with a ``Layout``."""

    plain_layout: ClassVar[Layout]

    def _run(self, x: Tensor, call: _Call) -> Tensor:
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
