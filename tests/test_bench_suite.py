"""The suite that runs all benchmarks: limits, failures, and what it leaves."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import suite
from benchmarks.suite import Part

pytestmark = pytest.mark.slow

CODE = "import sys; print('ran'); sys.exit({})"
# Starts a process of its own, says so, and never ends; neither heeds a request to.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


def part(name: str, code: str, limit: float = 20.0, least: float = 0.1) -> Part:
    return Part(name, (sys.executable, "-c", code), limit, least)


def states(output: Path) -> dict[str, str]:
    summary = json.loads((output / "summary.json").read_text())
    return {entry["name"]: entry["state"] for entry in summary["parts"]}


def test_a_failing_part_takes_nothing_from_the_others(tmp_path: Path) -> None:
    todo = [
        part("first", CODE.format(0)),
        part("broken", CODE.format(3)),
        Part("absent", ("/nonexistent/program",), 20.0, 0.1),
        part("last", CODE.format(0)),
    ]
    suite.run_all(todo, 100, tmp_path, os.environ)
    assert states(tmp_path) == {
        "first": "done",
        "broken": "failed",
        "absent": "failed",
        "last": "done",
    }
    assert (tmp_path / "logs" / "broken.log").read_text() == "ran\n"
    assert "nonexistent" in (tmp_path / "logs" / "absent.log").read_text()
    assert "| broken | failed |" in (tmp_path / "summary.md").read_text()


def test_a_part_that_hangs_is_ended_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "KILL_SECONDS", 0.2)
    suite.run_all([part("hangs", STUBBORN, limit=1.0)], 100, tmp_path, os.environ)
    assert states(tmp_path) == {"hangs": "out of time"}
    child = int((tmp_path / "logs" / "hangs.log").read_text())
    for _ in range(100):
        if not _is_running(child):
            break
        time.sleep(0.05)
    assert not _is_running(child)


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_what_does_not_fit_is_said_and_the_last_part_has_its_time(tmp_path: Path) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 10.0  # each look at the clock is ten seconds later
        return now

    todo = [
        part("fits", CODE.format(0), limit=20, least=5),
        part("does not", CODE.format(0), limit=60, least=50),
        part("report", CODE.format(0), limit=20, least=1),
    ]
    outcomes = suite.run_all(todo, 60, tmp_path, os.environ, clock)
    assert [outcome.state for outcome in outcomes] == ["done", "not started", "done"]
    assert outcomes[1].limit == 60 - 20 - 20


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_parts_name_scripts_and_options_that_exist(
    device: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    todo = suite.parts(device, tmp_path, quick)
    assert (todo[0].name, todo[-1].name) == ("build", "report")
    assert len({entry.name for entry in todo}) == len(todo)
    for entry in todo:
        if entry.command[1] != "-m" or not entry.command[2].startswith("benchmarks.bench_"):
            continue
        module = importlib.import_module(entry.command[2])
        args = module.parse_arguments(list(entry.command[3:]))
        assert args.device.type == device
        assert args.output == tmp_path / "results" / f"{entry.name}.json"


def test_only_named_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--device", "cpu", "--only", "everything", "--output", str(tmp_path)])
    assert "everything not of build, block" in capsys.readouterr().err
    assert suite.main(["--device", "cpu", "--only", "report", "--output", str(tmp_path)]) == 0
    assert "Nothing measured yet" in (tmp_path / "report.md").read_text()
