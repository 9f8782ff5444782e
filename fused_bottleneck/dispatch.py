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
