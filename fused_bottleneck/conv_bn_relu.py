"""``FusedConvBNReLU``: conv+BN+ReLU as a drop-in module, for a stem for example."""

import torch
from torch import Tensor, nn

from . import checks, functional
from .functional import Unit
from .modules import batch_norm_arguments, conv_arguments
from .reference import ConvBNReLU


class FusedConvBNReLU(ConvBNReLU):
    """Drop-in replacement of ``ConvBNReLU``: same arguments, children, state_dict and results.

    Keeps the convolution's input and output for backward, and not what the normalisation and the
    ReLU return. Reads its children at every call, and runs composed where fusing would change
    what the user sees; ``why_not_fused`` tells.

    Shapes: x ``[N, C, H, W]`` to ``[N, W, H', W']``, channels_last if x or the weight is.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.composed(x)
        return self._forward(x)

    def composed(self, x: Tensor) -> Tensor:
        """The plain unit: its children called one by one."""
        return self.relu(self.bn(self.conv(x)))

    @torch.jit.unused
    def why_not_fused(self, x: Tensor) -> str | None:
        """The reason why ``self(x)`` would run composed, in one sentence; None if it is fused."""
        reason = self._module_reason(x)
        if reason is not None:
            return reason
        return self._input_reason(*functional.autocast(x, [self._unit()]))

    @torch.jit.unused
    def _forward(self, x: Tensor) -> Tensor:
        if self._module_reason(x) is not None:
            return self.composed(x)
        cast, units = functional.autocast(x, [self._unit()])
        if self._input_reason(cast, units) is not None:
            return self.composed(x)
        return functional.run_conv_bn_relu(cast, units[0])

    def _unit(self) -> Unit:
        return conv_arguments(self.conv), batch_norm_arguments(self.bn)

    def _input_reason(self, x: Tensor, units: list[Unit]) -> str | None:
        problem = checks.conv_bn_relu(x, units[0])
        return str(problem) if problem is not None else functional.why_no_kernels(x, units)

    def _module_reason(self, x: Tensor) -> str | None:
        return checks.environment(x) or checks.children(
            [
                ("conv", self.conv, nn.Conv2d),
                ("bn", self.bn, nn.BatchNorm2d),
                ("relu", self.relu, nn.ReLU),
            ]
        )
