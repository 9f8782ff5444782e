"""Configurations: their defaults, what tuning tries, and the file that keeps what it found."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

import fused_bottleneck
from benchmarks.shapes import RESNET50
from benchmarks.shapes import BlockShape as ResnetShape
from fused_bottleneck import BlockShape, FusedBottleneck, tuning
from fused_bottleneck.kernels import config, tuned
from fused_bottleneck.kernels.tuned import Config, Problem

HOPPER = (9, 0)
PROBLEMS = [
    Problem("conv1x1_forward", 802816, 64, 256, torch.bfloat16),
    Problem("tail_dgrad", 50176, 256, 1280, torch.float16),
    Problem("gram", 128, 128, 200704, torch.bfloat16),
    Problem("tail_wgrad", 2048, 512, 12544, torch.bfloat16),
    Problem("conv_wgrad_taps", 512, 512, 12544, torch.bfloat16),
    Problem("conv2d_dgrad", 77, 48, 16, torch.float32),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=Problem.key)
def test_candidates(problem: Problem) -> None:
    """The default is the first of several, all different, that can be launched."""
    candidates = config.candidates(problem, HOPPER)
    assert candidates[0] == config.default(problem, HOPPER)
    assert len(candidates) == len(set(candidates)) > 3
    for candidate in candidates:
        assert candidate.block_n % 32 == 0  # whole words of the output's mask
        assert problem.stage != "gram" or candidate.block_m == candidate.block_n


@pytest.mark.parametrize("problem", PROBLEMS, ids=Problem.key)
@pytest.mark.parametrize("architecture", [(8, 0), (8, 9), HOPPER, (10, 0), (12, 0)], ids=str)
def test_default(problem: Problem, architecture: tuple[int, int]) -> None:
    """A partial result is of whole steps, and of a bounded number of pixels."""
    chosen = config.default(problem, architecture)
    assert chosen.block_k >= 16
    if problem.stage in ("gram", "tail_wgrad", "conv_wgrad_taps"):
        assert chosen.rows % chosen.block_k == 0
        assert 0 < chosen.rows <= 9216
    else:
        assert chosen.rows == 0


@pytest.mark.parametrize("shape", RESNET50, ids=lambda shape: shape.name)
def test_products_over_pixels_fill_the_gpu(shape: ResnetShape) -> None:
    """In whole rounds of programs: at least four fifths of the multiprocessors have work."""
    pixels, small = 256 * shape.size**2, 256 * shape.out_size**2
    width, wide, channels = shape.width, shape.out_channels, shape.in_channels
    both = width + channels
    problems = {
        "gram": (width, width, small),
        "tail_wgrad_downsample" if shape.downsample else "tail_wgrad": (
            wide,
            both if shape.downsample else width,
            small,
        ),
        "conv_wgrad_pointwise": (width, channels, pixels),
        "conv_wgrad_taps": (width, width, small),
    }
    for stage, (m, n, k) in problems.items():
        chosen = config.default(Problem(stage, m, n, k, torch.bfloat16), HOPPER)
        tiles = config.blocks(m, chosen.block_m) * config.blocks(n, chosen.block_n)
        if stage == "gram":
            tiles = (tiles + config.blocks(m, chosen.block_m)) // 2
        if stage == "conv_wgrad_taps":
            tiles *= 9 // chosen.taps
        programs = tiles * config.blocks(k, chosen.rows)
        slots = 132 * (8 // chosen.num_warps)
        assert programs >= 0.8 * slots * config.blocks(programs, slots), stage


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "gpu.json"
    assert tuned.read(path) == {}
    entries = {p: config.default(p, HOPPER) for p in PROBLEMS}
    tuned.write(path, entries)
    assert tuned.read(path) == entries
    tuned.write(path, {})
    assert tuned.read(path) == {}
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        '{"gram 1 2": {}}',
        '{"gram 1 2 3 bfloat16": {"block_m": "64"}}',
        '{"gram 1 2 3 bfloat16": {"block_m": 64}}',
        '{"gram 1 2 3 nonsense": {"block_m": 64, "block_n": 64, "block_k": 64}}',
        '{"gram 1 2 3 bfloat16": {"block_m": 64, "block_n": 64, "block_k": 64, "x": 1}}',
        '{"gram 1 2 3 bfloat16": 7}',
    ],
)
def test_corrupted_file_is_ignored(text: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match=r"ignoring the tuned configurations in .*gpu\.json"):
        assert tuned.read(path) == {}


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv(tuned.CACHE_VARIABLE, raising=False)
    assert tuned.cache_directory() == tmp_path / "xdg" / "fused_bottleneck"
    monkeypatch.setenv(tuned.CACHE_VARIABLE, str(tmp_path / "own"))
    assert tuned.cache_directory() == tmp_path / "own"
    pytest.importorskip("triton")
    name = tuned.cache_file("NVIDIA H200/x y").name
    assert name.startswith("NVIDIA-H200-x-y-torch-")
    assert name.endswith(".json")


def test_choice_can_be_overridden_and_listed() -> None:
    problem = PROBLEMS[0]
    like = torch.empty(0, dtype=problem.dtype)
    other = Config(16, 16, 16)
    with config.asked() as problems:
        assert config.choose(*problem[:4], like) == config.default(problem, HOPPER)
        with config.overridden(problem, other):
            assert config.choose(*problem[:4], like) == other
        assert config.choose(*problem[:4], like) == config.default(problem, HOPPER)
    assert problems == [problem] * 3


def test_failing_candidates_lose() -> None:
    """What Triton's passes do not compile is infinitely slow; any other error is raised."""
    pytest.importorskip("triton")
    session = tuning._Session.__new__(tuning._Session)
    candidate = Config(64, 64, 64)

    def failing(message: str) -> None:
        raise RuntimeError(message)

    call = partial(failing, "PassManager::run failed")
    assert session._time(call, PROBLEMS[0], candidate) == float("inf")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        session._time(partial(failing, "illegal memory access"), PROBLEMS[0], candidate)


def test_tuning_needs_a_gpu_and_an_input() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        fused_bottleneck.tune([BlockShape(2, 64, 16, 8)], device="cpu")
    block = FusedBottleneck(64, 16)
    with pytest.raises(ValueError, match="needs an input x"):
        fused_bottleneck.tune(block)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        fused_bottleneck.tune(block, torch.randn(2, 64, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_bottleneck.tune([]) == 0
