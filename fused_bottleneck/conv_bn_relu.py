"""``FusedConvBNReLU``: conv+BN+ReLU as a drop-in module, for a stem for example."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, functional, layout
from .functional import Unit
from .fused_module import FusedModule, composed_method
from .layout import UnitLayout
from .reference import ConvBNReLU


class _Call(NamedTuple):
    """A call that can be fused: x and the unit, cast where autocast is on."""

    x: Tensor
    unit: Unit


class FusedUnit(FusedModule):
    """A module of any class with a ``UnitLayout``: conv+BN+ReLU, or what starts with them.

    In the second case a view of the module, with nothing in place of the three, does the rest.
    torch.compile gets the plain module then, as it fuses these three well by itself.
    """

    plain_layout: ClassVar[UnitLayout]

    def _run(self, x: Tensor, call: _Call) -> Tensor:
        out = functional.run_conv_bn_relu(call.x, call.unit)
        if not self.plain_layout.has_rest:
            return out
        return self._rest().composed(out)

    def _rest(self) -> Any:
        names = (self.plain_layout.conv, self.plain_layout.norm, self.plain_layout.activation)
        view = object.__new__(type(self))
        idle: dict[str, nn.Module | None] = dict.fromkeys(names, nn.Identity())
        view.__dict__ = self.__dict__ | {"_modules": self._modules | idle}
        return view

    def _fused_call(self, x: Any) -> _Call | str:
        reason = checks.environment(x) or checks.global_hooks()
        reason = reason or layout.unit_reason(self, self.plain_layout)
        if reason is None and self.plain_layout.has_rest and torch.compiler.is_compiling():
            reason = "torch.compile fuses conv, normalisation and ReLU by itself"
        if reason is not None:
            return reason
        parts = layout.read_unit(self, self.plain_layout)
        cast, units = functional.autocast(x, parts.units())
        problem = checks.conv_bn_relu(cast, units[0])
        if problem is not None:
            return str(problem)
        reason = layout.norm_promotion(parts, cast) or functional.why_no_kernels(cast, units)
        return _Call(cast, units[0]) if reason is None else reason


class FusedConvBNReLU(FusedUnit, ConvBNReLU):
    """Drop-in replacement of ``ConvBNReLU``: same arguments, children, state_dict and results.

    Keeps the convolution's input and output for backward, and not what the normalisation and the
    ReLU return. Reads its children at every call, and runs composed where fusing would change
    what the user sees; ``why_not_fused`` tells.

    Shapes: x ``[N, C, H, W]`` to ``[N, W, H', W']``, channels_last if x or the weight is.
    """

    plain_class = ConvBNReLU
    plain_layout = UnitLayout("conv", "bn", "relu")
    composed = composed_method(ConvBNReLU)
