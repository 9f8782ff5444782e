"""Which implementation runs: the one place that knows about devices."""

import torch
from torch import Tensor

from . import extension
from .cpu import CpuStages
from .cpu_products import CpuProductStages
from .stages import Stages


def stages_for(x: Tensor) -> Stages:
    """The implementation of the stages for x's device, for one run of a program.

    CPU: the C++ passes where the extension is there, in float32 with fused 1x1 products where the
    instruction set has them; everything else: plain PyTorch.
    """
    if x.device.type != "cpu" or not extension.loaded():
        return Stages()
    if x.dtype == torch.float32 and extension.has_products():
        return CpuProductStages()
    return CpuStages()


def uses_gram(device: str, pixels: int, channels: int, width: int) -> bool:
    """Whether a tail unit ``[pixels, channels] -> [pixels, width]`` takes the gram way (tail.py).

    On CPU arithmetic decides: the gram way where it costs fewer multiply-adds. Elsewhere memory
    does, and the gram way always moves less of it.
    """
    if device != "cpu":
        return True
    gram = 2 * pixels * channels + 3 * width * channels
    return gram < pixels * width
