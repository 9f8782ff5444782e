"""Which implementation runs: the one place that knows about devices."""

from torch import Tensor

from . import extension
from .cpu import CpuStages
from .stages import Stages


def stages_for(x: Tensor) -> Stages:
    """The implementation of the stages for x's device, for one run of a program.

    CPU: the C++ passes where the extension is there; everything else: plain PyTorch.
    """
    if x.device.type == "cpu" and extension.loaded():
        return CpuStages()
    return Stages()
