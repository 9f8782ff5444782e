"""The benchmark of several processes, and the arithmetic of docs/scaling.md."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from ranks import Pool
from test_bench_scripts import convergence_run
from test_benchmarks import TINY_DOWNSAMPLE

from benchmarks import bench_ranks, collective_model, options, records, report
from benchmarks.shapes import RESNET50, SHAPES
from fused_bottleneck import collectives

pytestmark = pytest.mark.slow


def _measured(rank: int, broken: bool) -> object:
    """The records of a small block, or why there are none."""
    args = argparse.Namespace(dtype="float32", shape="tiny", batch=3, bias=True, rounds=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "tiny", TINY_DOWNSAMPLE)
        if broken:
            own = lambda group, sums, fraction: list(sums)  # noqa: E731
            patch.setattr(collectives, "all_reduce_fraction", own)
        try:
            return bench_ranks.measure_rank(args, torch.device("cpu"))
        except options.Refused as refusal:
            return str(refusal)


def test_processes_are_measured(pool: Pool) -> None:
    first, second = pool.run(2, _measured, False)
    assert first == second
    assert [row["variant"] for row in first] == ["local", "synchronised", "collectives"]
    assert all(row["ranks"] == 2 and 0 < row["q20"] <= row["q80"] for row in first)


def test_wrong_gradients_are_refused(pool: Pool) -> None:
    for text in pool.run(2, _measured, True):
        assert "2 processes are not reported" in text
        assert "is off by" in text


@pytest.mark.slow
def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ranks.json"
    arguments = ["--quick", "--ranks", "1", "--shape", "2048-512@7", "--rounds", "1"]
    arguments += ["--output", str(output)]
    assert bench_ranks.main(arguments) == 0
    assert [row["ranks"] for row in records.read(output)["records"]] == [1]
    monkeypatch.setenv("FUSED_BOTTLENECK_DISABLE", "1")
    capsys.readouterr()
    assert bench_ranks.main(arguments) == 1
    assert "would run unfused" in capsys.readouterr().err
    assert not output.exists()


def test_table(tmp_path: Path) -> None:
    def row(ranks: int, variant: str, ms: float) -> dict[str, object]:
        return {
            "ranks": ranks,
            "variant": variant,
            **dict.fromkeys(("median", "q20", "q80"), ms / 1e3),
        }

    settings = {"device": "cpu", "dtype": "float32", "threads": 1, "rounds": 3}
    run = convergence_run() | {
        "benchmark": "ranks",
        "settings": {**settings, "shape": "512-128@28", "batch": 8},
        "records": [
            row(1, "local", 100),
            row(2, "local", 100),
            row(2, "synchronised", 125),
            row(2, "collectives", 6),
        ],
    }
    records.write(run, tmp_path / "results" / "ranks.json")
    text = tmp_path / "report.md"
    assert report.main(["--results", str(tmp_path / "results"), "--text", str(text)]) == 0
    lines = [line.replace(" ", "") for line in text.read_text().rstrip().splitlines()]
    assert lines[-2].startswith("|1|100.0(100.0-100.0)|-|-|-|-|-|80.0|1.00|")
    assert lines[-1].endswith("|25.00|25.0%|6.00(6.00-6.00)|1000|128.0|0.80|")


def test_model() -> None:
    """By hand, with NCCL's constants: 15, 45 and 85 us for nothing; more with the bytes."""
    seconds = [collective_model.all_reduce_seconds(0, gpus) for gpus in (8, 64, 1024)]
    assert seconds == pytest.approx([15.2e-6, 45.2e-6, 85.2e-6])
    assert collective_model.all_reduce_seconds(25e6, 64) == pytest.approx(2e-3 + 45.2e-6)
    shape = SHAPES["256-64@56"]
    assert collective_model.junctions(shape) == [129, 129, 577, 512, 128, 128]
    floors = collective_model.floors(256)
    blocks = sum(s.count * floors[s.name] for s in RESNET50)
    assert blocks == pytest.approx(floors["all sixteen blocks"])
    assert collective_model.floors(32)[shape.name] == pytest.approx(floors[shape.name] / 8)
