"""The Triton kernels in Triton's interpreter, on CPU tensors, against the plain stages.

The interpreter is chosen when kernels are defined, so that these tests run in a process of their
own, which the last one starts. In float32 and float16: the interpreter's dot is wrong in bfloat16.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import test_stages
import torch
from helpers import Case, Result, assert_criterion, channels_last, errors, in_dtype, run
from test_stages import CONV2, STAGES, Data, tensors_of
from tolerances import SAME_FORMULA

from fused_bottleneck import collectives, modules, program, rules, tail_plan
from fused_bottleneck.operands import POINTWISE, Geometry
from fused_bottleneck.stages import ConvTerm, Stages

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")

if INTERPRETED:
    from fused_bottleneck.kernels import config
    from fused_bottleneck.kernels.config import Config
    from fused_bottleneck.triton_stages import TritonStages

DTYPES = [torch.float32, torch.float16]
# Several tiles in every dimension, the last one never full.
C, M, W, H = 80, 48, 96, 7
CHANNELS = {"C": C, "M": M, "W": W}
PRODUCT_WAY = {"F4, two residuals", *(name for name in STAGES if "product" in name)}


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
    with TritonStages(torch.empty(0, dtype=dtype)) as stages:
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


@interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "stage",
    ["F1", "F2", "F3, strided input", "F4, downsample", "B1, B2", "B3", "B4", "B6, downsample"],
)
def test_even_blocks(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels that are whole blocks, so that the kernels mask none."""
    for name, value in {"C": 64, "M": 32}.items():
        monkeypatch.setattr(test_stages, name, value)
    assert_same(STAGES[stage], torch.float32)


@interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("stage", ["F2", "B3", "B3, fixed", "B4", "B5", "B6, identity"])
def test_operands_computed_on_load(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that the rules do not take for these stages."""
    monkeypatch.setattr(rules, "LEAST_READS_TO_WRITE", 99)
    assert_same(STAGES[stage], torch.float32)


NARROW = 16, 48  # channels in and out of the geometries' convolutions


def convolution(
    kernel: tuple[int, int], geometry: Geometry, size: tuple[int, int]
) -> Callable[[Stages, Data], Any]:
    """A standalone unit's stages: forward, gradient of the input, with a ReLU, of the weight."""

    def stage(stages: Stages, data: Data) -> Any:
        height, width = geometry.output_size(*size, kernel)
        x, act = data.rectangle(NARROW[0], *size), data.activation(NARROW[0], 1)
        act = act._replace(y=data.rectangle(NARROW[0], *size))
        weight = data.weight(NARROW[1], NARROW[0], *kernel)
        grad = data.conv_grad(NARROW[1], 1)
        output = {name: data.rectangle(NARROW[1], height, width) for name in ("g", "y")}
        grad = grad._replace(**output)
        return [
            stages.conv_forward(x, weight, geometry),
            stages.conv_forward(
                act, weight.contiguous(memory_format=torch.channels_last), geometry
            ),
            stages.input_dgrad(ConvTerm(grad, weight, geometry), x, None, None, True),
            stages.conv_dgrad(grad, weight, geometry, act, data.vector(NARROW[0]).abs()),
            stages.conv_wgrad(grad, x, weight, geometry),
            stages.conv_wgrad(grad, act, weight, geometry),
        ]

    return stage


GEOMETRIES = {
    "1x1": ((1, 1), POINTWISE, (5, 3)),
    "1x1, stride 2": ((1, 1), Geometry((2, 2)), (5, 4)),
    "1x1, stride 3, 1": ((1, 1), Geometry((3, 1)), (7, 3)),
    "3x3, several steps": ((3, 3), Geometry((1, 1), (1, 1)), (7, 5)),  # 5 does not divide one
    "3x3, stride 2, several steps": ((3, 3), Geometry((2, 2), (1, 1)), (9, 13)),
    "3x3, stride 3": ((3, 3), Geometry((3, 3), (1, 1)), (8, 7)),
    "3x3, dilation 2": ((3, 3), Geometry((1, 1), (2, 2), (2, 2)), (6, 5)),
    "3x3, stride 2, dilation 2": ((3, 3), Geometry((2, 2), (2, 2), (2, 2)), (7, 6)),
    "3x3, stride 2, dilation 3": ((3, 3), Geometry((2, 2), (3, 3), (3, 3)), (8, 7)),
    "3x3, no padding": ((3, 3), Geometry(), (5, 4)),
    "2x4, stride 1, 2": ((2, 4), Geometry((1, 2), (0, 2), (1, 1)), (4, 5)),
    "one pixel wide": ((3, 3), Geometry((2, 2), (1, 1)), (4, 1)),
}


@interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry(geometry: str) -> None:
    assert_same(convolution(*GEOMETRIES[geometry]), torch.float32)


def without_beta(stages: Stages, data: Data) -> Any:
    """affine=False: neither scale nor shift is a parameter, and beta is None."""
    act = data.activation(M, H, centred=True)._replace(beta=None)
    return [
        stages.conv_forward(act, data.weight(M, M, 3, 3), CONV2),
        test_stages.gram(stages, act),
        stages.activation(act, True),
        stages.relu_backward(data.image(M, H), act, data.vector(M)),
    ]


@interpreted
@pytest.mark.usefixtures("small_blocks")
def test_without_beta() -> None:
    assert_same(without_beta, torch.float32)


@interpreted
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(value: float) -> None:
    """A NaN passes the ReLUs forward and backward, and only masks stop a gradient."""

    def stage(stages: Stages, data: Data) -> Any:
        act = data.activation(M, H, centred=True)
        act.y[1, 3, 2, 2] = value
        grad = data.masked()
        grad.grad_out[0, 40] = value
        out = stages.activation(act, True)
        g, _ = stages.relu_backward(data.image(M, H), act, data.vector(M).abs())
        y, _ = stages.conv_forward(act, data.weight(M, M, 3, 3), CONV2)
        return [t.nan_to_num(9, 8, -8) for t in (out, g, y, stages.masked_grad(grad))]

    assert_same(stage, torch.float32)


@pytest.fixture
def triton_block(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The programs with the Triton stages, on the way that CUDA takes."""
    monkeypatch.setattr(program, "stages_for", lambda x, convs, backend=None: TritonStages(x))
    monkeypatch.setattr(tail_plan, "uses_gram", lambda *sizes: True)
    with config.forced(Config(64, 32, 32, rows=50)):
        yield


BLOCKS = {
    "identity": Case(64, 16, size=(2, 7, 5)),
    "downsample": Case(32, 16, downsample="conv", bias=False, size=(2, 5, 7)),
    "stride 2": Case(48, 16, 2, "conv", size=(2, 7, 6)),
    "stride 3": Case(32, 16, 3, "conv", size=(3, 7, 8)),
    "dilation 2": Case(64, 16, options={"dilation": 2}, size=(2, 6, 5)),
    "shortcut": Case(32, 16, 2, "pool", size=(2, 6, 6)),
    "wide": Case(48, 48, 2, "conv", options={"expansion": 2}, size=(1, 5, 5)),
}
HALF_CASES = {("identity", "none"), ("stride 2", "none"), ("stride 2", "bn2, bn3")}
FROZEN = {"none": (), "bn1": ("bn1",), "bn2, bn3": ("bn2", "bn3"), "all": ("bn1", "bn2", "bn3")}


def results(case: Case, dtype: torch.dtype, frozen: Sequence[str], seed: int) -> list[Result]:
    """The plain block in float64, then the plain and the fused one in dtype."""
    reference, fused = case.pair(seed)
    for module in (reference, fused):
        for name in frozen:
            getattr(module, name).eval()
    x = case.input(seed + 100)
    lower = [in_dtype(module, dtype) for module in (reference, fused)]
    rounded = copy.deepcopy(lower[0]).double()
    low = channels_last(x.to(dtype))
    return [run(rounded, low.double()), run(lower[0], low), run(lower[1], low)]


@interpreted
@pytest.mark.usefixtures("triton_block")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "frozen"),
    [(case, "none") for case in BLOCKS]
    + [("identity", "all"), ("stride 2", "all"), ("stride 2", "bn2, bn3"), ("identity", "bn1")],
)
def test_block(case: str, frozen: str, dtype: torch.dtype) -> None:
    """The whole block, forward and backward, is as accurate as the plain one."""
    if dtype == torch.float16 and (case, frozen) not in HALF_CASES:
        pytest.skip("one case of each kind is enough in float16")
    rows = []
    for seed in range(2):
        oracle, eager, fused = results(BLOCKS[case], dtype, FROZEN[frozen], seed)
        skip = {n for n, g in oracle.grads.items() if n.endswith("bias") and n.startswith("conv")}
        rows.append([errors(r, oracle, skip) for r in (fused, eager)])
    assert_criterion([row[0] for row in rows], [row[1] for row in rows], dtype)


@pytest.fixture
def equal_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is one of two ranks that have the same batch."""
    monkeypatch.setattr(modules, "_group", lambda bn: "two" if bn.training else None)
    monkeypatch.setattr(collectives, "require_agreement", lambda *block: None)
    both = lambda group, tensors: [2 * t.double() for t in tensors]  # noqa: E731
    monkeypatch.setattr(collectives, "all_reduce", both)


@interpreted
@pytest.mark.usefixtures("triton_block", "equal_ranks")
@pytest.mark.parametrize("frozen", ["none", "bn2, bn3"])
def test_synchronised_block(frozen: str) -> None:
    """As accurate as the plain block, whose statistics and gradients are those of each rank."""
    rows = []
    for seed in range(2):
        oracle, eager, fused = results(BLOCKS["stride 2"], torch.float32, FROZEN[frozen], seed)
        skip = {n for n, g in oracle.grads.items() if n.endswith("bias") and n.startswith("conv")}
        skip |= {n for n in oracle.buffers if n.endswith("running_var")}  # of twice the pixels
        rows.append([errors(r, oracle, skip) for r in (fused, eager)])
    assert_criterion([row[0] for row in rows], [row[1] for row in rows], torch.float32)


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


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process")
def test_in_the_interpreter() -> None:
    run_interpreted()
