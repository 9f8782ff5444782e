"""Build, test, tune and benchmark on one machine within a budget of time; `make bench-gpu`.

    python -m benchmarks.suite --device cuda --output OUT     # everything, in 9 minutes
    python -m benchmarks.suite --device cpu --quick           # the same order on a CPU, small

Uses the interpreter that runs it and installs nothing. Every part is a process of its own with its
own limit: one that fails or hangs takes nothing from the others. What did not fit the budget is
said. In the output folder: logs/ (one file a part), results/ (records and pictures), report.md,
records.csv, tuned/ (the kernels' configurations), summary.json and summary.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.options import positive
from benchmarks.records import ROOT

BUDGET = 540
REPORT_SECONDS = 25  # set aside for the last part
KILL_SECONDS = 5  # between asking a process to end and ending it


@dataclass(frozen=True)
class Part:
    """A command with the most seconds it may take, and the fewest it is worth starting with."""

    name: str
    command: tuple[str, ...]
    limit: float
    least: float = 10.0


@dataclass(frozen=True)
class Outcome:
    """What became of a part: "done", "failed", "out of time" or "not started", and its seconds."""

    name: str
    state: str
    seconds: float
    limit: float
    command: str


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"benchmarks.{name}", *arguments)


def _gpu_tests() -> tuple[str, ...]:
    """The tests of `make test-gpu`, side by side where pytest-xdist is installed."""
    files = [str(path) for path in sorted(ROOT.glob("tests/test_*.py")) if _has_gpu_tests(path)]
    parallel = ("-n", "8", "--dist", "worksteal") if find_spec("xdist") else ()
    command = (sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "gpu and not large")
    return (*command, *parallel, *files)


def _has_gpu_tests(path: Path) -> bool:
    text = path.read_text()
    return "mark.gpu" in text or "ON_GPU" in text


def parts(device: str, output: Path, quick: bool) -> list[Part]:
    """The parts in the order of their value; the report comes last."""
    results = output / "results"
    build = Part("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 120)
    report = Part(
        "report",
        _module(
            "report", "--results", str(results), "--text", str(output / "report.md"),
            "--csv", str(output / "records.csv"),
        ),
        REPORT_SECONDS,
        1,
    )  # fmt: skip

    def bench(part: str, script: str, limit: float, *arguments: str) -> Part:
        written = str(results / f"{part}.json")
        options = ("--device", device, *arguments, "--output", written)
        return Part(part, _module(script, *options), limit)

    if quick:
        small = ("--quick",)
        return [
            build,
            bench("block-quick", "bench_block", 60, *small),
            bench("stages", "bench_stages", 60, *small),
            bench("network", "bench_resnet50", 90, *small),
            bench("scaling", "bench_scaling", 60, *small),
            report,
        ]
    if device == "cpu":
        return [
            build,
            bench("block", "bench_block", 900),
            bench("stages", "bench_stages", 300),
            bench("network", "bench_resnet50", 600),
            bench("scaling", "bench_scaling", 300),
            report,
        ]
    bf16 = ("--dtype", "bfloat16")
    block = (*bf16, "--batch", "256", "--no-bias")
    eager = ("reference channels_last", "fused channels_last", "compile", "fused graph")
    return [
        build,
        Part("compile", _module("warm_up"), 90),
        Part("gpu-tests", _gpu_tests(), 150),
        bench(
            "block-quick", "bench_block", 60, *block, "--rounds", "5", "--peers",
            "--shapes", "256-64@56", "64-64@56-ds", "512-128@28",
        ),
        bench("stages", "bench_stages", 60, *block, "--rounds", "10"),
        bench("network", "bench_resnet50", 120, *bf16, "--batch", "256", "--variants", *eager),
        Part("tuning", _module("tune", "--batch", "256", *bf16), 90),
        bench("block", "bench_block", 180, *block, "--rounds", "10"),
        bench("network-all", "bench_resnet50", 180, *bf16, "--batch", "256", "128", "512"),
        bench(
            "block-max-autotune", "bench_block", 120, *block, "--rounds", "10", "--peers",
            "compile max-autotune", "--shapes", "256-64@56", "512-128@28", "64-64@56-ds",
        ),
        bench(
            "network-max-autotune", "bench_resnet50", 240, *bf16, "--batch", "256", "--variants",
            "reference channels_last", "compile max-autotune",
        ),
        bench("scaling", "bench_scaling", 60, *bf16),
        bench("block-resnet152", "bench_block", 60, *block, "--network", "resnet152", "--peers"),
        bench("block-wide", "bench_block", 60, *block, "--network", "wide_resnet50_2", "--peers"),
        bench("block-fp32", "bench_block", 60, "--batch", "128", "--no-bias", "--peers"),
        report,
    ]  # fmt: skip


def run_part(part: Part, limit: float, log: Path, env: Mapping[str, str]) -> tuple[str, float]:
    """Run a part for at most `limit` seconds, with its output in `log`; its state and seconds."""
    start = time.monotonic()
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=dict(env),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"{error}\n")
            return "failed", 0.0
        try:
            state = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        _end(process)
    return state, time.monotonic() - start


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part's process group, which may outlive its leader: first ask, then insist."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(
    todo: Sequence[Part],
    budget: float,
    output: Path,
    env: Mapping[str, str],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the parts in their order; the last one has its time set aside. The summary is written
    after every part, so that whatever ends this process leaves one."""
    end = clock() + budget
    (output / "logs").mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for index, part in enumerate(todo):
        reserved = 0.0 if index == len(todo) - 1 else todo[-1].limit
        limit = min(part.limit, end - clock() - reserved)
        state, seconds = "not started", 0.0
        print(f"{part.name} ...", end=" ", flush=True)
        if limit >= part.least:
            log = output / "logs" / f"{part.name}.log"
            state, seconds = run_part(part, limit, log, env)
        print(f"{state}, {seconds:.0f} s", flush=True)
        outcomes.append(Outcome(part.name, state, seconds, max(limit, 0.0), " ".join(part.command)))
        _write_summary(outcomes, budget, output)
    return outcomes


def _write_summary(outcomes: Sequence[Outcome], budget: float, output: Path) -> None:
    content = {"budget": budget, "parts": [asdict(outcome) for outcome in outcomes]}
    (output / "summary.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = ["| part | state | s | limit, s |", "| --- | --- | ---: | ---: |"]
    lines += [f"| {o.name} | {o.state} | {o.seconds:.0f} | {o.limit:.0f} |" for o in outcomes]
    (output / "summary.md").write_text("\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; 0 if every one that was started is done, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--budget", type=positive, default=BUDGET, help="seconds for everything (%(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("OUT", ROOT / "runs" / "suite")),
        help="folder to write to (default: $OUT, else runs/suite)",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: does every part work?")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run just these parts")
    args = parser.parse_args(argv)
    output = args.output.resolve()
    todo = parts(args.device, output, args.quick)
    if args.only:
        unknown = set(args.only) - {part.name for part in todo}
        if unknown:
            names = ", ".join(part.name for part in todo)
            parser.error(f"argument --only: {', '.join(sorted(unknown))} not of {names}")
        todo = [part for part in todo if part.name in args.only]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {
        **os.environ,
        "PYTHONPATH": search,
        "PYTHONUNBUFFERED": "1",
        "FUSED_BOTTLENECK_CACHE": str(output / "tuned"),
    }
    outcomes = run_all(todo, args.budget, output, env)
    print(f"written to {output}")
    return int(any(outcome.state in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
