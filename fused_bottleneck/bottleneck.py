"""``FusedBottleneck``: the bottleneck block as a drop-in module."""

import torch
from torch import Tensor, nn

from . import checks, functional
from .functional import Unit
from .modules import batch_norm_arguments, conv_arguments, conv_bn_of
from .reference import Bottleneck


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

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.composed(x)
        return self._forward(x)

    def composed(self, x: Tensor) -> Tensor:
        """The plain block: its children called one by one."""
        return self._join(self.branch(x), self.residual(x))

    def _join(self, out: Tensor, residual: Tensor) -> Tensor:
        out += residual
        return self.relu(out)

    @torch.jit.unused
    def why_not_fused(self, x: Tensor) -> str | None:
        """The reason why ``self(x)`` would run composed, in one sentence; None if it is fused.

        Runs nothing; the output of a downsample that is not conv1x1+BN is taken on trust.
        """
        reason = self._module_reason(x)
        if reason is not None:
            return reason
        return self._input_reason(*functional.autocast(x, self._units()))

    @torch.jit.unused
    def _forward(self, x: Tensor) -> Tensor:
        if self._module_reason(x) is not None:
            return self.composed(x)
        cast, units = functional.autocast(x, self._units())
        if self._input_reason(cast, units) is not None:
            return self.composed(x)
        shortcut = None
        downsample = self._called_downsample()
        if downsample is not None:
            called = downsample(x)
            shortcut = functional.autocast_shortcut(called, cast)
            if checks.residual(cast, units, shortcut) is not None:
                return self._join(self.branch(x), called)
        return functional.run_bottleneck(cast, units, shortcut)

    def _called_downsample(self) -> nn.Module | None:
        """The downsample, if it is one that must be called as a module."""
        downsample = self.identity_downsample
        return None if conv_bn_of(downsample) is not None else downsample

    def _pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The convolutions and normalisations to fuse."""
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]
        downsample = conv_bn_of(self.identity_downsample)
        return pairs if downsample is None else [*pairs, downsample]

    def _units(self) -> list[Unit]:
        return [(conv_arguments(conv), batch_norm_arguments(bn)) for conv, bn in self._pairs()]

    def _input_reason(self, x: Tensor, units: list[Unit]) -> str | None:
        problem = checks.bottleneck(x, units)
        if problem is None and self._called_downsample() is None:
            problem = checks.residual(x, units, None)
        return str(problem) if problem is not None else functional.why_no_kernels(x, units)

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
