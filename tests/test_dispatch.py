"""Which implementation runs, and the reasons where it is not the kernels; needs no GPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fused_bottleneck import dispatch
from fused_bottleneck.cpu import CpuStages
from fused_bottleneck.kernels.launch import recording
from fused_bottleneck.operands import POINTWISE, Geometry
from fused_bottleneck.stages import Stages


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def convs(
    channels: int = 64, width: int = 16, wide: int = 64, groups: int = 1
) -> list[dispatch.Shape]:
    return [
        (meta(width, channels, 1, 1), POINTWISE),
        (meta(width, width // groups, 3, 3), Geometry(padding=(1, 1), groups=groups)),
        (meta(wide, width, 1, 1), POINTWISE),
    ]


@pytest.mark.parametrize(
    ("dtype", "shapes", "reason"),
    [
        (torch.float64, convs(), "float64"),
        (torch.bfloat16, convs(channels=40), "a convolution of 40 to 16"),
        (torch.bfloat16, convs(width=24), "multiples of 16"),
        (torch.bfloat16, convs(groups=2), "groups=2"),
        (torch.bfloat16, convs(wide=48), "multiples of 32, got 48"),
        (torch.bfloat16, [(meta(16, 64, 33, 1), Geometry())], "up to 32 taps a side"),
    ],
)
def test_why_no_kernels(dtype: torch.dtype, shapes: list[dispatch.Shape], reason: str) -> None:
    x = meta(2, 64, 6, 6, dtype=dtype)
    got = dispatch.why_no_kernels(x, shapes)
    assert got is not None
    assert reason in got
    with recording():
        assert type(dispatch.stages_for(x, shapes)) is Stages


@pytest.mark.parametrize("dtype", dispatch.KERNEL_DTYPES, ids=str)
def test_kernels_take(dtype: torch.dtype) -> None:
    x = meta(2, 64, 6, 6, dtype=dtype)
    assert dispatch.why_no_kernels(x, convs()) is None
    assert dispatch.why_no_kernels(x, convs()[:1]) is None


def test_stages_for() -> None:
    """CPU tensors never reach the kernels, meta tensors only while their calls are listed."""
    x = meta(2, 64, 6, 6)
    assert type(dispatch.stages_for(x, convs())) is Stages
    cpu = torch.empty(2, 3, 6, 6, dtype=torch.float64)
    assert dispatch.why_no_kernels(cpu, convs(groups=2)) is None
    assert type(dispatch.stages_for(cpu, convs(groups=2))) is CpuStages
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    with recording():
        stages = dispatch.stages_for(x, convs())
    assert type(stages).__name__ == "TritonStages"


def test_triton_is_not_imported_on_cpu() -> None:
    code = (
        "import sys, torch, fused_bottleneck as fb\n"
        "fb.FusedBottleneck(16, 4)(torch.randn(2, 16, 5, 5)).sum().backward()\n"
        "print('triton' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
