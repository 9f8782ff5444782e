"""One run as a JSON file: where it was measured, the peaks, one record per shape and variant."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What a run and its report write; a change in it is not a change of what was measured.
GENERATED = (":!benchmarks/results", ":!README.md")

# {"environment": {...}, "settings": {...}, "peaks": {...}, "records": [{...}, ...]}
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
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
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
    return {path.stem: read(path) for path in sorted(directory.glob("*.json"))}
