"""Which implementation runs, and the reasons where it is not the kernels; needs no GPU."""

import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fused_bottleneck import dispatch, extension, functional, program
from fused_bottleneck.cpu import CpuStages
from fused_bottleneck.kernels.launch import recording
from fused_bottleneck.operands import POINTWISE, Geometry
from fused_bottleneck.stages import Stages
from fused_bottleneck.vendor import VendorStages


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


CPU = torch.empty(2, 3, 6, 6)


def test_backend_by_argument_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    if not extension.load():
        pytest.skip(extension.reason())
    default = type(dispatch.stages_for(CPU, convs()))
    assert issubclass(default, CpuStages)
    assert type(dispatch.stages_for(CPU, convs(), "torch")) is Stages
    assert type(dispatch.stages_for(CPU, convs(), "vendor")) is CpuStages
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")
    assert type(dispatch.stages_for(CPU, convs())) is Stages
    assert type(dispatch.stages_for(CPU, convs(), "vendor")) is CpuStages  # the argument wins
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "")
    assert type(dispatch.stages_for(CPU, convs())) is default


def test_a_backend_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"'triton' was asked for.*do not run on cpu tensors"):
        dispatch.stages_for(CPU, convs(), "triton")
    with pytest.raises(ValueError, match="one of triton, vendor, torch, got 'cudnn'"):
        dispatch.stages_for(CPU, convs(), "cudnn")
    with recording(), pytest.raises(RuntimeError, match=r"'triton' was asked for.*groups=2"):
        dispatch.stages_for(meta(2, 64, 6, 6), convs(groups=2), "triton")
    monkeypatch.setattr(extension, "loaded", lambda: False)
    monkeypatch.setattr(extension, "reason", lambda: "it was left out")
    with pytest.raises(RuntimeError, match=r"'vendor' was asked for.*it was left out"):
        dispatch.stages_for(CPU, convs(), "vendor")


def test_backend_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward run on the backend of the call, whatever is set in between."""
    used: list[str | None] = []
    original = dispatch.stages_for

    def spy(x: Tensor, shapes: list[dispatch.Shape], backend: str | None = None) -> Stages:
        used.append(backend)
        return original(x, shapes, backend)

    monkeypatch.setattr(program, "stages_for", spy)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    weight = torch.randn(4, 8, 1, 1, requires_grad=True)
    out = functional.conv_bn_relu(x, functional.Conv(weight), functional.BatchNorm(), "torch")
    out.sum().backward()
    assert used == ["torch", "torch"]
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "vendor")
    out = functional.conv_bn_relu(x, functional.Conv(weight), functional.BatchNorm())
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE)
    out.sum().backward()
    assert used[2:] == ["vendor", "vendor"]


@pytest.fixture
def gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if meta tensors were on a GPU that has the passes."""
    monkeypatch.setattr(dispatch, "_why_no_passes", lambda x: None)


@pytest.mark.usefixtures("gpu_without_triton")
def test_vendor_takes_what_triton_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x = meta(2, 64, 6, 6)
    with recording():
        for shapes in (convs(groups=2), convs(channels=40), convs(wide=48)):
            assert dispatch.why_no_kernels(x, shapes) is None
            assert type(dispatch.stages_for(x, shapes)) is VendorStages
        assert dispatch.default_backend(x, convs()) == "triton"
        double = meta(2, 64, 6, 6, dtype=torch.float64)
        assert dispatch.default_backend(double, convs()) == "vendor"


class FakeCuda(NamedTuple):
    """What dispatch asks of a tensor."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]


def test_measured_table_wins_where_it_is_legal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    legal = {"triton", "vendor", "torch"}
    monkeypatch.setattr(
        dispatch, "_why_not", lambda name, *_: None if name in legal else "not legal here"
    )
    x: Any = FakeCuda(torch.device("cuda", 0), torch.bfloat16, (2, 64, 6, 6))
    assert dispatch.default_backend(x, convs()) == "triton"
    monkeypatch.setitem(dispatch.MEASURED, dispatch.measured_key(x, convs()), "vendor")
    assert dispatch.default_backend(x, convs()) == "vendor"
    assert dispatch.default_backend(x, convs(width=32)) == "triton"
    legal.remove("vendor")
    assert dispatch.default_backend(x, convs()) == "triton"
