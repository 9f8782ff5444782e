"""``FusedBottleneck``: the bottleneck block as a drop-in module."""

import torch
from torch import Tensor, nn

from . import checks, functional
from .functional import Unit
from .modules import batch_norm_arguments, conv_arguments, count_batches
from .reference import Bottleneck


def is_conv_bn(module: nn.Module) -> bool:
    """Whether a downsample is exactly conv1x1 + BN, so that it can be fused rather than called."""
    if type(module) is not nn.Sequential or len(module) != 2:
        return False
    conv, bn = module[0], module[1]
    own = checks.child("downsample", module, nn.Sequential)
    if own or checks.child("conv", conv, nn.Conv2d) or checks.child("bn", bn, nn.BatchNorm2d):
        return False
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


class FusedBottleneck(Bottleneck):
    """Drop-in replacement of ``Bottleneck``: same arguments, children, state_dict and results.

    Constructor: see ``Bottleneck``. Geometry, modes and parameters are read from the children at
    every call, so that freezing a normalisation or patching a stride works as on plain modules.
    An ``identity_downsample`` that is exactly ``Sequential(conv1x1, BatchNorm2d)`` is fused; any
    other module is called as it is. Where fusing would change what the user sees (hooks on
    children, torch.func, export, an input that does not fit) the composed block runs instead;
    ``why_not_fused`` tells.

    Shapes: x ``[N, C, H, W]`` to ``[N, 4*M, H', W']``, channels_last if x or a weight is.
    """

    composed = Bottleneck.forward

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.composed(x)
        return self._forward(x)

    @torch.jit.unused
    def why_not_fused(self, x: Tensor) -> str | None:
        """The reason why ``self(x)`` would run composed, in one sentence; None if it is fused.

        Runs nothing; the output of a downsample that is not conv1x1+BN is taken on trust.
        """
        reason = self._module_reason(x)
        if reason is not None:
            return reason
        x, units = functional.autocast(x, self._units())
        problem = self._problem(x, units)
        return None if problem is None else str(problem)

    @torch.jit.unused
    def _forward(self, x: Tensor) -> Tensor:
        if self._module_reason(x) is not None:
            return self.composed(x)
        cast, units = functional.autocast(x, self._units())
        if self._problem(cast, units) is not None:
            return self.composed(x)
        shortcut = None
        if self._calls_downsample():
            called = self.identity_downsample(x)
            shortcut = functional.autocast_shortcut(called, cast)
            if checks.residual(cast, units, shortcut) is not None:
                return self._add_composed(x, called)
        out = functional.run_bottleneck(cast, units, shortcut)
        count_batches(self._norms())
        return out

    def _add_composed(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """The composed block on a residual that is there already."""
        out = self.branch(x)
        out += shortcut
        return self.relu(out)

    def _calls_downsample(self) -> bool:
        downsample = self.identity_downsample
        return downsample is not None and not is_conv_bn(downsample)

    def _norms(self) -> list[nn.BatchNorm2d]:
        norms = [self.bn1, self.bn2, self.bn3]
        if self.identity_downsample is not None and not self._calls_downsample():
            norms.append(self.identity_downsample[1])
        return norms

    def _units(self) -> list[Unit]:
        convs = [self.conv1, self.conv2, self.conv3]
        norms = self._norms()
        if len(norms) > 3:
            convs.append(self.identity_downsample[0])
        return [
            (conv_arguments(conv), batch_norm_arguments(bn))
            for conv, bn in zip(convs, norms, strict=True)
        ]

    def _problem(self, x: Tensor, units: list[Unit]) -> checks.Problem:
        problem = checks.bottleneck(x, units)
        if problem is None and not self._calls_downsample():
            problem = checks.residual(x, units, None)
        return problem

    def _module_reason(self, x: Tensor) -> str | None:
        return checks.environment(x) or checks.children(
            [
                ("conv1", self.conv1, nn.Conv2d),
                ("bn1", self.bn1, nn.BatchNorm2d),
                ("conv2", self.conv2, nn.Conv2d),
                ("bn2", self.bn2, nn.BatchNorm2d),
                ("conv3", self.conv3, nn.Conv2d),
                ("bn3", self.bn3, nn.BatchNorm2d),
                ("relu", self.relu, nn.ReLU),
            ]
        )
