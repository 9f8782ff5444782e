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


def uses_gram(device: str, pixels: int, channels: int, width: int) -> bool:
    """Whether a tail unit ``[pixels, channels] -> [pixels, width]`` takes the gram way (tail.py).

    On CPU arithmetic decides: the gram way where it costs fewer multiply-adds. Elsewhere memory
    does, and the gram way always moves less of it.
    """
    if device != "cpu":
        return True
    gram = 2 * pixels * channels + 3 * width * channels
    return gram < pixels * width
