"""The Triton kernels in Triton's interpreter, on CPU tensors, against the plain stages.

The interpreter is chosen when kernels are defined, so that these tests run in a process of their
own, which the last one starts. In float32 and float16: the interpreter's dot is wrong in bfloat16.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_stages
import torch
from test_stages import STAGES, Data, tensors_of
from tolerances import SAME_FORMULA

from fused_bottleneck.stages import Stages

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")

if INTERPRETED:
    from fused_bottleneck.kernels import config
    from fused_bottleneck.kernels.config import Config
    from fused_bottleneck.triton_stages import TritonStages

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16]
# Several tiles in every dimension, the last one never full.
CHANNELS = {"C": 48, "M": 80, "W": 96}
PRODUCT_WAY = {"F4, two residuals", "B1, product", "normalise"}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Channels that the kernels take, and blocks that none of the sizes is a multiple of."""
    for name, value in CHANNELS.items():
        monkeypatch.setattr(test_stages, name, value)
    with config.forced(Config(32, 32, 32, rows=40)):
        yield


def assert_same(stage: Callable[[Stages, Data], Any], dtype: torch.dtype) -> None:
    """The kernels give what the plain stages give, to the rounding of one formula."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with Stages() as plain:
        want = tensors_of(stage(plain, Data(dtype)))
    with TritonStages(CPU) as stages:
        got = tensors_of(stage(stages, Data(dtype)))
    assert len(got) == len(want) > 0
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=SAME_FORMULA[dtype] * scale)


@interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", [name for name in STAGES if name not in PRODUCT_WAY])
def test_stage(stage: str, dtype: torch.dtype) -> None:
    assert_same(STAGES[stage], dtype)


def run_interpreted() -> None:
    """This file's tests, in a process where kernels are interpreted."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", str(Path(__file__))]
    result = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]


@pytest.mark.skipif(INTERPRETED, reason="this is the process")
def test_in_the_interpreter() -> None:
    run_interpreted()
