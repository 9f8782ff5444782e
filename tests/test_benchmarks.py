"""The benchmarks' own arithmetic, on fake clocks and fixed records; nothing here is timed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import bench_block, records, report, tables, traffic
from benchmarks.cases import BASELINE, Case, build_cases, disagreements, saved_bytes
from benchmarks.figures import figures
from benchmarks.harness import cpu_timer, measure, orders, summarize
from benchmarks.records import Run
from benchmarks.roofline import Peaks, measure_peaks
from benchmarks.shapes import RESNET50, SHAPES, BlockShape
from fused_bottleneck import FusedBottleneck

TINY = BlockShape(8, 2, 5, stride=1, downsample=False, count=1)
TINY_DOWNSAMPLE = BlockShape(6, 2, 5, stride=2, downsample=True, count=1)
CPU = torch.device("cpu")

# Gigabytes of one step at batch 256 in 16-bit, worked out by hand: eager, compiled, fused.
TRAFFIC = {
    "256-64@56": (14.2, 11.5, 5.3),
    "64-64@56-ds": (17.2, 12.9, 4.4),
    "256-128@56->28-ds": (14.8, 12.1, 4.9),
    "512-128@28": (7.1, 5.8, 2.7),
    "1024-256@14": (3.5, 2.9, 1.3),
    "2048-512@7": (1.8, 1.4, 0.67),
}


def test_shapes_are_resnet50() -> None:
    assert sum(shape.count for shape in RESNET50) == 16
    assert len(SHAPES) == len(RESNET50)
    # 4.1 GFLOPs (multiply-adds) for an image, of which stem and classifier have 0.12.
    macs = sum(s.count * traffic.convolution_flops(s, 1) / 2 for s in RESNET50)
    assert macs == pytest.approx(3.97e9, rel=0.01)


@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic_figures(name: str) -> None:
    plans = (traffic.eager_bytes, traffic.inductor_bytes, traffic.fused_bytes)
    computed = [plan(SHAPES[name], 256, 2) / 1e9 for plan in plans]
    # The expected figures have one decimal: half of it, and a little for how they were rounded.
    assert computed == pytest.approx(TRAFFIC[name], abs=0.056)


def test_step_flops() -> None:
    shape = SHAPES["256-64@56"]
    assert traffic.step_flops(shape, 256) == pytest.approx(0.33e12, rel=0.02)
    assert 0.02 < traffic.fused_extra_flops(shape, 256) / traffic.step_flops(shape, 256) < 0.06


def test_each_variant_runs_once_in_every_place() -> None:
    cycle = list(orders(["a", "b", "c"], rounds=3))
    assert all(sorted(order) == ["a", "b", "c"] for order in cycle)
    assert all(sorted(place) == ["a", "b", "c"] for place in zip(*cycle, strict=True))
    assert list(orders(["a", "b", "c"], 9, seed=1)) == list(orders(["a", "b", "c"], 9, seed=1))


def test_measure_interleaves_and_charges_each_variant_its_own_time() -> None:
    now = 0.0
    calls: list[str] = []

    def spend(name: str, seconds: float) -> None:
        nonlocal now
        calls.append(name)
        now += seconds

    variants = {"fast": lambda: spend("fast", 1.0), "slow": lambda: spend("slow", 3.0)}
    timings = measure(variants, 4, 1, lambda run: cpu_timer(run, clock=lambda: now))
    assert (timings["fast"].median, timings["slow"].median) == (1.0, 3.0)
    assert timings["fast"].rounds == 4
    assert len(calls) == 2 * (1 + 4)
    assert all({"fast", "slow"} == set(calls[i : i + 2]) for i in range(0, len(calls), 2))


def test_quantiles() -> None:
    timing = summarize([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (timing.q20, timing.median, timing.q80) == (2.0, 3.5, 5.0)
    assert summarize([7.0]).q80 == 7.0
    with pytest.raises(ValueError, match="at least one time"):
        summarize([])


def test_peaks_are_rates() -> None:
    peaks = measure_peaks(
        CPU, torch.float32, 1, 2, copy_bytes=2**16, convolutions=((4, 4, 3, 8), (4, 8, 1, 8))
    )
    assert peaks.copy_bandwidth > 0
    assert peaks.convolution_rate > 0


@pytest.mark.parametrize("shape", [TINY, TINY_DOWNSAMPLE], ids=lambda shape: shape.name)
def test_variants_agree(shape: BlockShape) -> None:
    assert disagreements(build_cases(shape, 2, torch.float64, CPU), torch.float64) == []


class WrongGradient(torch.autograd.Function):
    """The identity, with a gradient one per cent too large."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return 1.01 * grad


class WrongBlock(FusedBottleneck):
    """A block whose output is right and whose gradients are not."""

    def forward(self, x: Tensor) -> Tensor:
        return WrongGradient.apply(super().forward(x))


def with_wrong_variant(cases: dict[str, Case]) -> dict[str, Case]:
    """`cases` with the contiguous fused variant made wrong."""
    cases["fused contiguous"].block.__class__ = WrongBlock
    return cases


def test_a_wrong_gradient_is_found_in_every_tensor() -> None:
    cases = with_wrong_variant(build_cases(TINY, 2, torch.float32, CPU))
    lines = disagreements(cases, torch.float32)
    assert lines
    assert all(line.startswith("fused contiguous: grad") for line in lines)
    # The gradients of the convolutions' biases are zero, right or wrong.
    assert len(lines) == 1 + 9


def test_disagreement_ends_the_run_without_a_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, TINY.name, TINY)
    monkeypatch.setattr(bench_block, "measure_peaks", lambda *args: Peaks(1e9, 1e9))
    arguments = ["--shapes", TINY.name, "--batch", "2", "--rounds", "1", "--output"]
    assert bench_block.main([*arguments, str(tmp_path / "right.json")]) == 0
    right = capsys.readouterr()
    assert "Training step" in right.out
    assert len(json.loads((tmp_path / "right.json").read_text())["records"]) == 4

    monkeypatch.setattr(
        bench_block, "build_cases", lambda *args: with_wrong_variant(build_cases(*args))
    )
    assert bench_block.main([*arguments, str(tmp_path / "wrong.json")]) == 1
    wrong = capsys.readouterr()
    assert wrong.out == ""
    assert f"{TINY.name} is not reported" in wrong.err
    assert not (tmp_path / "wrong.json").exists()


def test_a_variant_that_would_run_unfused_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, TINY.name, TINY)
    monkeypatch.setattr(bench_block, "measure_peaks", lambda *args: Peaks(1e9, 1e9))
    monkeypatch.setenv("FUSED_BOTTLENECK_DISABLE", "1")
    assert bench_block.main(["--quick", "--shapes", TINY.name]) == 1
    assert "would run unfused" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch", "--rounds", "--threads"])
def test_numbers_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_block.parse_arguments([option, "0"])
    assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err


def test_saved_bytes_of_the_reference() -> None:
    """x, y1, a1, y2, a2 (narrow but x), y3 and out; two statistics for each batch norm."""
    case = build_cases(TINY, 2, torch.float32, CPU)[BASELINE]
    pixels = 2 * 5 * 5
    elements = pixels * (8 + 4 * 2 + 2 * 8) + 2 * (2 + 2 + 8)
    assert saved_bytes(case) == 4 * elements


def fixed_run(**settings: object) -> Run:
    """A run with round numbers: contiguous 200 to 100 ms, channels_last 150 to 120 ms."""
    step_ms = {
        "reference contiguous": 200.0,
        "reference channels_last": 150.0,
        "fused contiguous": 100.0,
        "fused channels_last": 120.0,
    }

    def timing(ms: float) -> dict[str, float]:
        quantiles = {"median": ms / 1e3, "q20": 0.9 * ms / 1e3, "q80": 1.1 * ms / 1e3}
        return {**quantiles, "rounds": 20, "percent_of_floor": 50.0}

    return {
        "environment": {
            "git_sha": "0123456789abcdef",
            "dirty": True,
            "date": "2030-01-02",
            "cpu": "A processor",
            "cores": 2,
            "device": "cpu",
            "torch": "2.13.0",
        },
        "settings": {
            "device": "cpu",
            "dtype": "float32",
            "batch": 16,
            "threads": 2,
            "rounds": 20,
            **settings,
        },
        "peaks": {"copy_bandwidth": 20e9, "convolution_rate": 200e9},
        "records": [
            {
                "shape": "256-64@56",
                "variant": variant,
                "forward": timing(ms / 4),
                "step": timing(ms),
                "saved_bytes": 2**20 * (10 if variant.startswith("reference") else 4),
            }
            for variant, ms in step_ms.items()
        ],
    }


def test_figures_met_and_missed() -> None:
    rows = {figure.description: (figure.value, figure.met) for figure in figures(fixed_run())}
    assert rows == {
        "256-64@56, speed-up contiguous": (2.0, True),
        "256-64@56, speed-up channels_last": (1.25, False),
        "256-64@56, kept for backward": (0.4, True),
    }
    assert figures(fixed_run(batch=2)) == []
    assert "float32" in tables.figures_table(fixed_run(batch=2))


def test_report_fills_the_regions_and_notices_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    records.write(fixed_run(), results / "block.json")
    region = "<!-- bench:{0}:start -->\n<!-- bench:{0}:end -->\n"
    readme.write_text("before\n" + "".join(map(region.format, report.REGIONS)) + "after\n")

    assert report.main(["--check"], readme, results) == 1
    assert "not up to date" in capsys.readouterr().err
    assert report.main([], readme, results) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "revision 0123456789 with local changes" in text
    rows = [line.replace(" ", "") for line in text.splitlines()]
    step = ["200.0(180.0-220.0)", "150.0(135.0-165.0)", "100.0(90.0-110.0)", "120.0(108.0-132.0)"]
    assert f"|256-64@56|{'|'.join(step)}|2.00|1.25|50%|" in rows
    assert "|256-64@56|10.0|4.0|0.40|" in rows
    assert "|256-64@56,speed-upchannels_last|1.25|atleast1.50|missed|" in rows
    assert (results / "block.png").read_bytes().startswith(b"\x89PNG")
    assert report.main(["--check"], readme, results) == 0

    changed = copy.deepcopy(fixed_run())
    changed["records"][0]["step"]["median"] = 0.3
    records.write(changed, results / "block.json")
    assert report.main(["--check"], readme, results) == 1


def test_report_without_runs_and_with_an_unknown_region() -> None:
    empty = "<!-- bench:step:start -->\nold\n<!-- bench:step:end -->"
    assert "Nothing measured yet" in report.fill(empty, {})
    with pytest.raises(ValueError, match=r"must be one of traffic, .*, got speed"):
        report.fill(empty.replace("step", "speed"), {})
