"""The benchmarks of stages, networks, scaling and convergence: their arithmetic and refusals."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from test_benchmarks import CPU, TINY, TINY_DOWNSAMPLE, WrongBlock, inputs_of

from benchmarks import (
    bench_junctions,
    bench_resnet50,
    bench_scaling,
    bench_stages,
    cases,
    convergence_report,
    harness,
    model_zoo,
    networks,
    options,
    peers,
    records,
    report,
    resnet_report,
    scaling_report,
    watch,
)
from benchmarks.roofline import Peaks
from benchmarks.shapes import NETWORKS, SHAPES, BlockShape, network
from benchmarks.traffic import fused_stages
from fused_bottleneck import Bottleneck, FusedBottleneck

pytestmark = pytest.mark.slow


class Ticks:
    """A clock that advances by one at each look."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> float:
        self.now += 1
        return float(self.now)


@pytest.mark.parametrize("shape", [TINY, TINY_DOWNSAMPLE], ids=lambda shape: shape.name)
def test_every_stage_is_seen(shape: BlockShape, implementation: str) -> None:
    """Each implementation and way through a block shows all ten stages, each once a step."""
    case = cases.build_cases(inputs_of(shape))["fused channels_last"]
    expected = case.results()
    clock = watch.CpuClock(Ticks())
    with watch.watched(clock):
        results = case.results()
    spent = clock.seconds()
    assert set(fused_stages(shape, 1, 4)) <= set(spent)
    # Each of these is one call, of one tick.
    assert all(spent[name] == 1 for name in ("F1", "F2", "F4", "B2", "B3", "B4", "B5", "B6"))
    assert all(torch.equal(results[name], expected[name]) for name in expected)
    assert clock.seconds() == {}
    case.step()
    assert clock.seconds() == {}  # the watch is over


STAGES_BATCH = 1024 // TINY.size**2 + 1  # pixels enough for the gram way, whose stages are ten


@pytest.fixture
def tiny_stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(SHAPES, TINY.name, TINY)
    monkeypatch.setattr(bench_stages, "measure_peaks", lambda *args: Peaks(1e9, 1e9))
    return ["--quick", "--shapes", TINY.name, "--batch", str(STAGES_BATCH), "--rounds", "1"]


@pytest.fixture
def tiny_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A network of one block."""
    monkeypatch.setitem(NETWORKS, "resnet50", network((1,)))
    return ["--quick", "--size", "32", "--batch", "2", "--rounds", "1"]


@pytest.fixture
def wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused blocks whose gradients are two per cent too large."""
    monkeypatch.setitem(cases.BLOCKS, "fused", WrongBlock)
    variant = bench_resnet50.VARIANTS["fused channels_last"]
    assert variant.block is FusedBottleneck
    wrong = variant._replace(block=WrongBlock)
    monkeypatch.setitem(bench_resnet50.VARIANTS, "fused channels_last", wrong)


def test_stages_are_written_and_reported(
    tmp_path: Path, tiny_stages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_stages.main([*tiny_stages, "--output", str(tmp_path / "run.json")]) == 0
    run = records.read(tmp_path / "run.json")
    assert [r["stage"] for r in run["records"]] == [*fused_stages(TINY, 1, 4), "step"]
    assert not bench_stages.takes_product(TINY, STAGES_BATCH, "cpu", torch.float32)
    assert "B6" in capsys.readouterr().out


def test_the_product_way_joins_the_tail() -> None:
    shape = SHAPES["2048-512@7"]
    assert bench_stages.takes_product(shape, 16, "cpu", torch.float32)
    assert not bench_stages.takes_product(shape, 16, "cuda", torch.float32)
    assert not bench_stages.takes_product(SHAPES["256-64@56"], 16, "cpu", torch.float32)
    costs = fused_stages(shape, 16, 4)
    samples = {name: [1.0, 2.0] for name in costs}
    joined, seconds = bench_stages.join_tail(costs, samples)
    assert list(joined) == ["F1", "F2", "F3+F4", "B1", "B2", "B3", "B4", "B5", "B6"]
    assert sum(cost.moved for cost in joined.values()) == sum(c.moved for c in costs.values())
    assert seconds["F3+F4"] == [2.0, 4.0]


@pytest.mark.usefixtures("wrong_gradients")
def test_wrong_gradients_are_refused_everywhere(
    tmp_path: Path,
    tiny_stages: list[str],
    tiny_network: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(bench_scaling.BASES, "cpu", bench_scaling.Point("", 2, 5, 2))
    monkeypatch.setitem(bench_scaling.VALUES, "cpu", {"batch": (2, 3)})
    runs = {
        bench_stages: tiny_stages,
        bench_resnet50: tiny_network,
        bench_scaling: ["--quick", "--rounds", "1"],
    }
    for module, arguments in runs.items():
        output = tmp_path / f"{module.__name__}.json"
        assert module.main([*arguments, "--output", str(output)]) == 1, module
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "is off by" in captured.err
        assert not output.exists()


def test_a_network_trains_alike_in_plain_and_in_fused_blocks(
    tmp_path: Path, tiny_network: list[str]
) -> None:
    output = tmp_path / "run.json"
    arguments = [*tiny_network, "--variants", *bench_resnet50.EAGER, "--output", str(output)]
    assert bench_resnet50.main(arguments) == 0
    rows = {row["variant"]: row for row in records.read(output)["records"]}
    assert list(rows) == [
        "reference contiguous",
        "fused channels_last",
        "reference channels_last",
        "fused, stem too",
    ]
    fused, plain = rows["fused channels_last"], rows["reference channels_last"]
    assert fused["saved_bytes"] < plain["saved_bytes"]
    assert fused["images_per_second"] == pytest.approx(2 / fused["median"])
    pytest.importorskip("matplotlib")
    resnet_report.plot(records.read(output), tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 2**12


def test_a_network_whose_blocks_run_unfused_is_refused(
    tiny_network: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSED_BOTTLENECK_DISABLE", "1")
    assert bench_resnet50.main(tiny_network) == 1
    assert "would run unfused" in capsys.readouterr().err


def test_losses_that_part_are_found() -> None:
    right, bounds = [7.0, 6.0, 5.0], (1e-3, 1e-2, 1e-2)
    assert bench_resnet50.loss_problem("v", right, right, bounds) is None
    assert "the first loss" in str(bench_resnet50.loss_problem("v", [7.1, 6.1, 5.1], right, bounds))
    late = bench_resnet50.loss_problem("v", [7.0, 6.0, 5.1], right, bounds)
    assert "the decrease of the loss in 2 steps is off by 5.0e-02" in str(late)
    assert bench_resnet50.loss_problem("v", [float("nan")] * 3, right, bounds) is not None


def test_resnet50_has_its_parameters() -> None:
    """25.56 million, as published; the block class does not change them."""
    with torch.device("meta"):
        models = [networks.ResNet(block, "resnet50") for block in (Bottleneck, FusedBottleneck)]
    sizes = [{n: p.shape for n, p in model.named_parameters()} for model in models]
    assert sizes[0] == sizes[1]
    assert sum(shape.numel() for shape in sizes[0].values()) == 25_557_032


def line(overhead: float, slope: float) -> list[dict[str, float]]:
    return [{"operations": n, "median": overhead + slope * n} for n in (1.0, 2.0, 8.0)]


def test_fit_and_growth() -> None:
    assert scaling_report.fit(line(3.0, 0.5)) == pytest.approx((3.0, 0.5))
    assert scaling_report.growth(line(0.0, 2.0)) == pytest.approx(1.0)
    assert scaling_report.growth(line(1e6, 2.0)) == pytest.approx(0.0, abs=1e-4)


def test_scaling_points_go_from_small_to_large() -> None:
    for device in bench_scaling.VALUES:
        found = bench_scaling.points(device, quick=False)
        for axis in ("batch", "size", "width"):
            values = [point.value for point in found if point.axis == axis]
            assert values == sorted(set(values))
            assert len(values) >= 4


def test_means_are_equal_within_the_spread_or_not() -> None:
    near = convergence_report.compare([0.9, 0.91, 0.92], [0.91, 0.92, 0.93])
    assert near.difference == pytest.approx(0.01)
    assert near.standard_error == pytest.approx((2 * 1e-4 / 3) ** 0.5)
    assert near.equal
    assert not convergence_report.compare([0.9, 0.91, 0.92], [0.8, 0.81, 0.82]).equal


def convergence_run() -> records.Run:
    rows = [
        {
            "data": "digits",
            "dtype": "float32",
            "seed": seed,
            "variant": variant,
            "accuracy": 0.9 + 0.01 * seed,
            "final_loss": 0.1 + 0.01 * seed,
        }
        for seed in range(3)
        for variant in ("reference", "fused")
    ]
    return {
        "benchmark": "convergence",
        "environment": records.environment(CPU),
        "settings": {
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "seeds": 3,
            "epochs": {"digits": 1},
            "width": 4,
            "batch_size": 8,
        },
        "records": rows,
    }


def scaling_run() -> records.Run:
    rows = [
        {**point, "axis": axis, "batch": 1 + i, "size": 1 + i, "width": 1 + i, "variant": variant,
         "q20": point["median"], "q80": point["median"]}
        for axis in ("batch", "size", "width")
        for variant in scaling_report.COLOURS
        for i, point in enumerate(line(1.0, 1.0))
    ]  # fmt: skip
    return convergence_run() | {
        "benchmark": "scaling",
        "settings": {"device": "cpu", "dtype": "float32", "threads": 1, "rounds": 3},
        "records": rows,
    }


def test_every_kind_of_run_becomes_text_picture_and_rows(
    tmp_path: Path, tiny_stages: list[str], tiny_network: list[str]
) -> None:
    results = tmp_path / "results"
    bench_stages.main([*tiny_stages, "--output", str(results / "stages.json")])
    bench_resnet50.main([*tiny_network, "--output", str(results / "network.json")])
    records.write(convergence_run(), results / "convergence.json")
    records.write(scaling_run(), results / "scaling.json")
    text, table = tmp_path / "report.md", tmp_path / "records.csv"
    arguments = ["--results", str(results), "--text", str(text), "--csv", str(table)]
    assert report.main(arguments) == 0
    names = ("convergence", "network", "scaling", "stages")
    assert all(f"## {name}\n" in text.read_text() for name in names)
    for name in names:
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 11 + 2 + 18 + 6
    assert {row["benchmark"] for row in rows} == set(names)
    assert all(row["git_sha"] and row["torch"] and row["device"] for row in rows)


def test_a_gpu_that_was_not_measured_is_said() -> None:
    region = "<!-- bench:gpu:start -->\n<!-- bench:gpu:end -->"
    assert "still to be measured" in report.fill(region, {"c": convergence_run()})
    measured = convergence_run()
    measured["settings"]["device"], measured["environment"]["device"] = "cuda", "A GPU"
    assert "Measured on A GPU" in report.fill(region, {"c": measured})


def test_a_run_that_is_cut_short_leaves_what_it_measured(tmp_path: Path) -> None:
    args = options.parser("x", "").parse_args(["--output", str(tmp_path / "run.json")])

    def measure(item: int, args: object) -> list[dict[str, int]]:
        if item == 3:
            raise KeyboardInterrupt
        return [{"item": item}]

    with pytest.raises(KeyboardInterrupt):
        options.collect("x", args, [1, 2, 3], measure, {})
    assert records.read(tmp_path / "run.json")["records"] == [{"item": 1}, {"item": 2}]


def test_progress_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(harness.progress([1, 2], "name", "unit")) == [1, 2]
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    assert list(harness.progress([1, 2], "name", "unit")) == [1, 2]


def require_peer(name: str) -> None:
    """Skip where a peer is missing."""
    try:
        model_zoo.load(name)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", ["jax", "timm"])
@pytest.mark.parametrize("shape", [TINY, TINY_DOWNSAMPLE], ids=lambda shape: shape.name)
def test_peers_agree(name: str, shape: BlockShape) -> None:
    require_peer(name)
    inputs = inputs_of(shape)
    expected = cases.build_cases(inputs)[cases.BASELINE].results()
    found, left_out = peers.build_peers([name], inputs, (5e-6, 5e-3), expected)
    assert left_out == {}
    assert isinstance(found[name], cases.Case)


def test_timm_block_has_the_plain_parameters() -> None:
    require_peer("timm")
    block = cases.new_block(peers.TimmBottleneck, TINY, True)
    plain = cases.new_block(Bottleneck, TINY, True)
    assert list(dict(block.named_parameters())) == list(dict(plain.named_parameters()))


def test_bench_junctions_times_every_variant(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_junctions, "SIZES", [(16, 32)])
    assert bench_junctions.main(["--device", "cpu", "--rounds", "1"]) == 0
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert "fold launch" in header
    assert sum(row.startswith("| 16, 32") for row in rows) == 2
