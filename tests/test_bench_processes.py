"""Variants in processes of their own."""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from operator import mul
from pathlib import Path

import pytest
import torch

from benchmarks import bench_block, bench_resnet50, processes, records, resnet_report, tables
from benchmarks.bench_block import build_calls
from benchmarks.cases import Inputs
from benchmarks.peers import PEERS
from benchmarks.processes import Process, measure_processes
from benchmarks.roofline import Peaks
from benchmarks.shapes import SHAPES, BlockShape
from fused_bottleneck import Bottleneck

TINY = BlockShape(32, 8, 6, 1, False, 1)
PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 2**16


def waits(seconds: float, log: Path | None = None) -> dict[str, Callable[[], object]]:
    """A call that says that it runs, and takes so long."""

    def call() -> None:
        if log is not None:
            with log.open("a") as file:
                print(seconds, os.getpid(), torch.get_num_threads(), file=file)
        time.sleep(seconds)

    return {"wait": call}


def touches(count: int) -> dict[str, Callable[[], object]]:
    """A call that touches so many fresh pages."""
    return {"touch": partial(mul, b"x", count * PAGE)}


def fails() -> dict[str, Callable[[], object]]:
    raise ValueError("this cannot be built")


def test_each_variant_runs_in_processes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GENERATIONS", 2)
    log = tmp_path / "log"
    starts = {
        "slow": partial(Process, waits, 0.05, log),
        "quick": partial(Process, waits, 0.01, log),
    }
    found = measure_processes(starts, ["wait"], 3, 1)
    assert found["quick"].calls["wait"]["median"] >= 0.01
    assert found["slow"].calls["wait"]["median"] >= 0.05
    assert found["slow"].calls["wait"]["rounds"] == 3
    lines = [line.split() for line in log.read_text().splitlines()]
    # Twice in a row at each turn, of which there are a warm-up each generation and three.
    assert [line[0] for line in lines[::2]] == [line[0] for line in lines[1::2]]
    assert [line[0] for line in lines].count("0.05") == len(lines) / 2 == 10
    owners = [process for _, process, _ in lines]
    assert len(set(owners)) == 4
    assert str(os.getpid()) not in owners
    first = [owners.index(process) for process in dict.fromkeys(owners)]
    assert first[2] == 8  # the second generation's, after four calls of both of the first
    assert not set(owners[:8]) & set(owners[8:])
    assert {threads for *_, threads in lines} == {str(torch.get_num_threads())}


def test_memory_is_that_of_the_process() -> None:
    starts = {"large": partial(Process, touches, PAGES), "small": partial(Process, touches, 1)}
    large, small = measure_processes(starts, ["touch"], 1, 0).values()
    # Huge pages, where the system gives them unasked, are 512 of them.
    assert large.calls["touch"]["page_faults"] >= 0.9 * PAGES / 512
    assert small.calls["touch"]["page_faults"] < large.calls["touch"]["page_faults"] / 2
    assert large.resident_bytes - small.resident_bytes >= 0.95 * PAGES * PAGE
    assert small.resident_bytes < 2**30


def test_what_cannot_be_built_is_said() -> None:
    with Process(fails) as process, pytest.raises(ValueError, match="this cannot be built"):
        process.sample("anything")


@pytest.mark.parametrize("name", ["reference contiguous", "fused channels_last", "timm"])
def test_calls_are_those_of_the_variant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = partial(Inputs.case, kind=Bottleneck, layout="channels_last")
    monkeypatch.setitem(PEERS, "timm", plain)
    args = argparse.Namespace(batch=2, dtype="float32", device=torch.device("cpu"), bias=True)
    calls = build_calls(name, TINY, args)
    out = calls["forward"]()
    assert isinstance(out, torch.Tensor)
    assert out.shape == (2, 32, 6, 6)
    assert out.is_contiguous() == (name == "reference contiguous")
    (grad_x, *_) = calls["step"]()  # type: ignore[misc]
    assert grad_x.shape == (2, 32, 6, 6)


@pytest.mark.slow
def test_a_block_is_measured_in_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SHAPES, TINY.name, TINY)
    monkeypatch.setattr(bench_block, "measure_peaks", lambda *args: Peaks(1e9, 1e9))
    output = tmp_path / "run.json"
    arguments = ["--shapes", TINY.name, "--batch", "2", "--rounds", "1", "--peers"]
    assert bench_block.main([*arguments, "--output", str(output)]) == 0
    run = records.read(output)
    assert run["settings"]["processes"] == 1  # one round is one process's
    assert [row["variant"] for row in run["records"]] == [
        f"{kind} {layout}" for kind in ("reference", "fused") for layout in tables.LAYOUTS
    ]
    assert all(row["step"]["page_faults"] >= 0 for row in run["records"])
    assert "each in a process of its own" in tables.caption(run)
    run["settings"]["processes"] = 4
    assert "each in 4 processes of its own, one after the other" in tables.caption(run)
    assert "page faults" in tables.memory_table(run)


@pytest.mark.slow
def test_a_network_is_measured_in_processes(tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    arguments = ["--quick", "--processes", "--rounds", "1"]
    assert bench_resnet50.main([*arguments, "--output", str(output)]) == 0
    rows = records.read(output)["records"]
    assert all(2**27 < row["resident_bytes"] < 2**33 for row in rows)
    assert all(row["images_per_second"] == pytest.approx(4 / row["median"]) for row in rows)
    assert "resident" in resnet_report.text(records.read(output))
