"""One run as a JSON file: which benchmark, where and how it was measured, and its records."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What a run and its report write; a change in it is not a change of what was measured.
GENERATED = (":!benchmarks/results", ":!README.md", ":!docs/scaling.md")

# {"benchmark": name, "environment": {...}, "settings": {...}, "records": [{...}, ...]}, and the
# "peaks" of a run that measures them.
Run = dict[str, Any]


def environment(device: torch.device) -> dict[str, Any]:
    """Revision, date, hardware and versions, as far as they can be found out."""
    return {
        "git_sha": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--", ".", *GENERATED)),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "jax", "timm")},
        "python": platform.python_version(),
        "preloaded": _preloaded(),
    }


def _preloaded() -> list[str]:
    """The libraries that were loaded before all others, as an allocator is."""
    return [Path(name).name for name in os.environ.get("LD_PRELOAD", "").split(":") if name]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(command).split("\n")[0] or None


def place(run: Run) -> str:
    """The device of a run, by name."""
    environment = run["environment"]
    return environment["cpu" if run["settings"]["device"] == "cpu" else "device"]


def preloaded(run: Run) -> list[str]:
    """What was loaded before all other libraries, in words."""
    return [f"{name} preloaded" for name in run["environment"].get("preloaded", [])]


def _git(*arguments: str) -> str:
    return _output(["git", *arguments])


def _output(command: Sequence[str]) -> str:
    """What a command prints; empty where it fails or is not there."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(run: Run, path: Path) -> None:
    """Write `run` to `path`, making its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n")


def read(path: Path) -> Run:
    """The run that `write` wrote to `path`."""
    return json.loads(path.read_text())


def read_all(directory: Path = RESULTS) -> dict[str, Run]:
    """Every run in `directory`, by file name without its suffix, in alphabetical order."""
    paths = sorted(directory.glob("*.json"), key=lambda path: path.stem)
    return {path.stem: read(path) for path in paths}


def rows(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Every record of the runs as a flat row that says where and how it was measured."""
    return [
        {
            "benchmark": run["benchmark"],
            **run["environment"],
            **_flat(run["settings"]),
            **_flat(record),
        }
        for run in runs
        for record in run["records"]
    ]


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the fields of nested ones as "step.median"."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def write_csv(runs: Iterable[Run], path: Path) -> None:
    """Write the rows of the runs, whose columns may differ, under one header."""
    table = rows(runs)
    columns = list(dict.fromkeys(key for row in table for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
