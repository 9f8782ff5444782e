"""The benchmarks' own arithmetic, on fake clocks and fixed records; nothing here is timed."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_block, checked, peers, records, report, roofline, tables, traffic
from benchmarks.cases import (
    BASELINE,
    NORM_BOUNDS,
    Case,
    Inputs,
    TorchCase,
    build_cases,
    build_inputs,
    disagreements,
)
from benchmarks.figures import figures
from benchmarks.harness import cpu_timer, measure, orders, summarize
from benchmarks.records import Run
from benchmarks.roofline import Peaks, measure_peaks, plan_floor
from benchmarks.shapes import NETWORKS, RESNET50, SHAPES, BlockShape
from fused_bottleneck import Bottleneck, FusedBottleneck

TINY = BlockShape(8, 2, 5, stride=1, downsample=False, count=1)
TINY_DOWNSAMPLE = BlockShape(6, 2, 5, stride=2, downsample=True, count=1)
GROUPED = BlockShape(8, 4, 5, stride=1, downsample=True, count=1, expansion=2, groups=2)
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
    assert list(NETWORKS["resnet50"]) == list(RESNET50)
    assert all(SHAPES[shape.name] is shape for shape in RESNET50)
    # 4.1 GFLOPs (multiply-adds) for an image, of which stem and classifier have 0.12.
    macs = sum(s.count * traffic.convolution_flops(s, 1) / 2 for s in RESNET50)
    assert macs == pytest.approx(3.97e9, rel=0.01)


# Billions of multiply-adds of an image, as published with the networks; stem and classifier, which
# are not counted here, have 0.12 of them. Blocks: of the four stages together.
PUBLISHED = {
    "resnet50": (4.09, 16),
    "resnet152": (11.51, 50),
    "resnext50_32x4d": (4.23, 16),
    "wide_resnet50_2": (11.40, 16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_their_published_size(name: str) -> None:
    shapes = NETWORKS[name]
    macs = sum(s.count * traffic.convolution_flops(s, 1) / 2e9 for s in shapes)
    assert (macs + 0.12, sum(s.count for s in shapes)) == pytest.approx(PUBLISHED[name], rel=0.01)


def test_every_shape_has_a_name_of_its_own() -> None:
    named = {
        (shape.name, *dataclasses.astuple(shape)[:5]) for s in NETWORKS.values() for shape in s
    }
    assert len({name for name, *_ in named}) == len(named) == len(SHAPES)


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
        CPU,
        torch.float32,
        1,
        2,
        copy_bytes=2**16,
        product_size=8,
        convolutions=((4, 4, 3, 8), (4, 8, 1, 8)),
    )
    assert peaks.product_rate > 0
    assert peaks.copy_bandwidth > 0
    assert peaks.convolution_rate > 0


def test_floor_is_the_slower_of_moving_and_computing() -> None:
    peaks = Peaks(copy_bandwidth=10.0, convolution_rate=2.0, product_rate=5.0)
    costs = {"F1": traffic.Cost(100.0, 10.0), "B1": traffic.Cost(10.0, 100.0)}
    assert plan_floor(costs, peaks) == 10.0 + 20.0
    assert plan_floor(costs, peaks, ["F1"]) == 10.0


def test_stages_add_up_to_the_plan() -> None:
    shape = SHAPES["256-128@56->28-ds"]
    stages = traffic.fused_stages(shape, 16, 4)
    assert len(stages) == 10
    assert sum(cost.moved for cost in stages.values()) == traffic.fused_bytes(shape, 16, 4)
    forward = sum(stages[name].operations for name in ("F1", "F2", "F4"))
    on_padding = traffic.convolution_flops(shape, 16) - forward
    # Of 28x28 outputs those at the top and at the left meet padding with one row or column of taps.
    conv2 = 2.0 * 16 * shape.width**2 * (28 * 28 * 9)
    assert on_padding == pytest.approx(conv2 * (1 - (83 / 84) ** 2))
    assert sum(s.operations for s in stages.values()) == pytest.approx(
        3 * forward + traffic.fused_extra_flops(shape, 16)
    )


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(7, 3, 1, 1), (8, 3, 2, 1), (9, 5, 2, 2), (6, 1, 1, 0)],
)
def test_pixel_share_is_what_a_convolution_sees(
    size: int, kernel: int, stride: int, padding: int
) -> None:
    ones = torch.ones(1, 1, size, size), torch.ones(1, 1, kernel, kernel)
    taps = nn.functional.conv2d(*ones, stride=stride, padding=padding)
    share = traffic.pixel_share(size, kernel, stride, padding)
    assert share == pytest.approx(taps.sum().item() / (taps.numel() * kernel**2))


def test_a_rate_counts_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a convolution that takes a second."""
    second = summarize([1.0])
    monkeypatch.setattr(roofline, "measure", lambda runs, *_: dict.fromkeys(runs, second))
    small = {"copy_bytes": 16, "product_size": 8}
    peaks = measure_peaks(CPU, torch.float32, 2, 2, **small, convolutions=[(4, 8, 3, 7)])
    assert peaks.convolution_rate == pytest.approx(2.0 * 2 * 4 * 8 * (3 * 7 - 2) ** 2)


def inputs_of(shape: BlockShape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    return build_inputs(shape, 2, dtype, CPU, seed=seed)


def disagreeing(cases: dict[str, Case], dtype: torch.dtype) -> dict[str, list[str]]:
    return disagreements(cases, NORM_BOUNDS[dtype], cases[BASELINE].results())


@pytest.mark.parametrize("shape", [TINY, TINY_DOWNSAMPLE, GROUPED], ids=lambda shape: shape.name)
def test_variants_agree(shape: BlockShape) -> None:
    assert disagreeing(build_cases(inputs_of(shape, torch.float64)), torch.float64) == {}


class WrongGradient(torch.autograd.Function):
    """The identity, with a gradient two per cent too large."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return 1.02 * grad


class WrongBlock(FusedBottleneck):
    """A block whose output is right and whose gradients are not."""

    def forward(self, x: Tensor) -> Tensor:
        return WrongGradient.apply(super().forward(x))


def with_wrong_variant(cases: dict[str, Case]) -> dict[str, Case]:
    """`cases` with the contiguous fused variant made wrong."""
    case = cases["fused contiguous"]
    assert isinstance(case, TorchCase)
    case.block.__class__ = WrongBlock
    return cases


def test_a_wrong_gradient_is_found_in_every_tensor() -> None:
    cases = with_wrong_variant(build_cases(inputs_of(TINY)))
    found = disagreeing(cases, torch.float32)
    assert list(found) == ["fused contiguous"]
    lines = found["fused contiguous"]
    assert all(line.startswith("fused contiguous: grad") for line in lines)
    # The gradients of the convolutions' biases are zero, right or wrong.
    assert len(lines) == 1 + 9


@pytest.fixture
def quick_tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a quick run of the block benchmark on a tiny shape, with made-up peaks."""
    monkeypatch.setitem(SHAPES, TINY.name, TINY)
    monkeypatch.setattr(bench_block, "measure_peaks", lambda *args: Peaks(1e9, 1e9))
    return ["--quick", "--shapes", TINY.name, "--batch", "2", "--rounds", "1"]


def test_disagreement_ends_the_run_without_a_report(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quick_tiny: list[str],
) -> None:
    arguments = [*quick_tiny, "--output"]
    assert bench_block.main([*arguments, str(tmp_path / "right.json")]) == 0
    right = capsys.readouterr()
    assert "Training step" in right.out
    assert len(json.loads((tmp_path / "right.json").read_text())["records"]) == 4

    monkeypatch.setattr(
        checked, "build_cases", lambda inputs: with_wrong_variant(build_cases(inputs))
    )
    assert bench_block.main([*arguments, str(tmp_path / "wrong.json")]) == 1
    wrong = capsys.readouterr()
    assert wrong.out == ""
    assert f"{TINY.name} is not reported" in wrong.err
    assert not (tmp_path / "wrong.json").exists()


def test_a_gradient_may_disagree_by_chance_but_not_on_every_data_set(
    monkeypatch: pytest.MonkeyPatch, quick_tiny: list[str]
) -> None:
    """What one ReLU on the other side of zero does: the first data set only."""
    built = []

    def wrong_at_first(inputs: Inputs) -> dict[str, Case]:
        built.append(inputs)
        cases = build_cases(inputs)
        return with_wrong_variant(cases) if len(built) == 1 else cases

    monkeypatch.setattr(checked, "build_cases", wrong_at_first)
    assert bench_block.main(quick_tiny) == 0
    assert len(built) == 2
    assert not torch.equal(built[0].x, built[1].x)


def test_peers_that_fail_or_disagree_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_tiny: list[str]
) -> None:
    def wrong(inputs: Inputs) -> Case:
        return with_wrong_variant(build_cases(inputs))["fused contiguous"]

    def missing(inputs: Inputs) -> Case:
        raise ImportError("no such library\nand more")

    def right(inputs: Inputs) -> Case:
        return inputs.case(Bottleneck, "channels_last")

    monkeypatch.setitem(peers.PEERS, "compile", wrong)
    monkeypatch.setitem(peers.PEERS, "jax", missing)
    monkeypatch.setitem(peers.PEERS, "timm", right)
    output = tmp_path / "run.json"
    arguments = ["--peers", "compile", "jax", "timm", "--output", str(output)]
    assert bench_block.main([*quick_tiny, *arguments]) == 0
    run = records.read(output)
    reasons = {r["variant"]: r["left_out"] for r in run["records"] if "left_out" in r}
    assert reasons.keys() == {"compile", "jax"}
    assert "is off by" in reasons["compile"]
    assert reasons["jax"] == "ImportError: no such library"
    header = tables.time_table(run, "step").splitlines()[0]
    assert "over timm" in header
    assert "compile" not in header


def test_a_variant_that_would_run_unfused_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_tiny: list[str]
) -> None:
    monkeypatch.setenv("FUSED_BOTTLENECK_DISABLE", "1")
    assert bench_block.main(quick_tiny) == 1
    assert "would run unfused" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch", "--rounds", "--threads"])
def test_numbers_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_block.parse_arguments([option, "0"])
    assert f"argument {option}: must be at least 1, got 0" in capsys.readouterr().err


def test_saved_bytes_of_the_reference() -> None:
    """x, y1, a1, y2, a2 (narrow but x), y3 and out; two statistics for each batch norm."""
    case = build_cases(inputs_of(TINY))[BASELINE]
    pixels = 2 * 5 * 5
    elements = pixels * (8 + 4 * 2 + 2 * 8) + 2 * (2 + 2 + 8)
    assert case.saved_bytes() == 4 * elements


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
        return {**quantiles, "rounds": 20}

    return {
        "benchmark": "block",
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
            "bias": True,
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


def least_seconds(run: Run) -> float:
    peaks = Peaks(**run["peaks"])
    return plan_floor(traffic.fused_stages(SHAPES["256-64@56"], 16, 4), peaks)


def test_figures_met_and_missed() -> None:
    rows = {figure.description: (figure.value, figure.met) for figure in figures(fixed_run())}
    share = least_seconds(fixed_run()) / 0.12
    assert rows == {
        "256-64@56, speed-up contiguous": (2.0, (True, False)),
        "256-64@56, speed-up channels_last": (1.25, (False, False)),
        "256-64@56, kept for backward": (0.4, (True, True)),
        "256-64@56, floor over time": (share, (True, True)),
    }
    keeping = fixed_run()
    keeping["environment"]["preloaded"] = ["libtcmalloc_minimal.so.4"]
    assert [(f.value, f.met) for f in figures(keeping)] == [
        (1.25, (True, True)),
        (0.4, (True, True)),
        (share, (True, True)),
    ]
    assert "libtcmalloc_minimal.so.4 preloaded" in tables.caption(keeping)
    faster = fixed_run()
    faster["peaks"]["convolution_rate"] *= 2
    assert figures(faster)[-1].met == (False, False)
    assert figures(fixed_run(batch=2)) == []
    assert "float32" in tables.figures_table(fixed_run(batch=2))


def test_report_fills_the_regions_and_notices_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    records.write(fixed_run(), results / "block.json")
    folder = ["--results", str(results)]
    region = "<!-- bench:{0}:start -->\n<!-- bench:{0}:end -->\n"
    readme.write_text("before\n" + "".join(map(region.format, report.REGIONS)) + "after\n")

    assert report.main(["--check", *folder], [readme]) == 1
    assert "not up to date" in capsys.readouterr().err
    assert report.main(folder, [readme]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "revision 0123456789 with local changes" in text
    rows = [line.replace(" ", "") for line in text.splitlines()]
    floor = 100 * least_seconds(fixed_run()) / 0.12
    step = ["200.0(180.0-220.0)", "150.0(135.0-165.0)", "100.0(90.0-110.0)", "120.0(108.0-132.0)"]
    assert f"|256-64@56|{'|'.join(step)}|2.00|1.25|{floor:.0f}%|" in rows
    assert "|256-64@56|10.0|4.0|0.40|" in rows
    assert "|256-64@56,speed-upchannels_last|1.25|atleast1.50:missed|atleast2.20:missed|" in rows
    assert (results / "block.png").read_bytes().startswith(b"\x89PNG")
    assert report.main(["--check", *folder], [readme]) == 0

    changed = copy.deepcopy(fixed_run())
    changed["records"][0]["step"]["median"] = 0.3
    records.write(changed, results / "block.json")
    assert report.main(["--check", *folder], [readme]) == 1


def test_report_without_runs_and_with_an_unknown_region() -> None:
    empty = "<!-- bench:step:start -->\nold\n<!-- bench:step:end -->"
    assert "Nothing measured yet" in report.fill(empty, {})
    with pytest.raises(ValueError, match=r"must be one of traffic, .*, got speed"):
        report.fill(empty.replace("step", "speed"), {})
