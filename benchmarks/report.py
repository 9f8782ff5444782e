"""Write the tables between the `bench` markers of README.md and docs/scaling.md, and the plots.

    python -m benchmarks.report            # write
    python -m benchmarks.report --check    # exit status 1 if one is not up to date
    python -m benchmarks.report --results DIR --text FILE.md --csv FILE.csv    # of another folder

A region is `<!-- bench:NAME:start -->` ... `<!-- bench:NAME:end -->`, with a NAME of `REGIONS`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import (
    collective_model,
    convergence_report,
    ranks_report,
    records,
    resnet_report,
    scaling_report,
    stage_report,
    tables,
)
from benchmarks.records import Run, place

DOCUMENTS = (records.ROOT / "README.md", records.ROOT / "docs" / "scaling.md")
REGION = re.compile(
    r"(<!-- bench:(?P<name>[\w-]+):start -->\n).*?(<!-- bench:(?P=name):end -->)", re.S
)
NO_RUNS = "Nothing measured yet: `make bench` writes benchmarks/results/."

Runs = Mapping[str, Run]


def _each_run(benchmark: str, render: Callable[[str, Run], str]) -> Callable[[Runs], str]:
    """A region with one part per run of that benchmark."""

    def region(runs: Runs) -> str:
        mine = {name: run for name, run in runs.items() if run["benchmark"] == benchmark}
        return "\n\n".join(render(*item) for item in mine.items()) or NO_RUNS

    return region


def _step(name: str, run: Run) -> str:
    image = f"![Speed-up and memory bars](benchmarks/results/{name}.png)"
    return f"{tables.caption(run)}\n\n{tables.time_table(run, 'step')}\n\n{image}"


def _whole(name: str, run: Run) -> str:
    """A run's text and its picture."""
    text = TEXTS[run["benchmark"]](run)
    return f"{text}\n\n![{run['benchmark']}](benchmarks/results/{name}.png)"


TEXTS: dict[str, Callable[[Run], str]] = {
    "block": tables.text,
    "stages": stage_report.text,
    "network": resnet_report.text,
    "scaling": scaling_report.text,
    "convergence": convergence_report.text,
    "ranks": ranks_report.text,
}
PICTURED = [name for name in TEXTS if name != "ranks"]


def _gpu(runs: Runs) -> str:
    """Where the figures of a GPU are, or that there are none."""
    devices = {place(run) for run in runs.values() if run["settings"]["device"] == "cuda"}
    if devices:
        return f"Measured on {', '.join(sorted(devices))}; the tables below say which is which."
    return (
        "No GPU has been at hand: the figures of one are still to be measured, by `make bench-gpu` "
        "(9 minutes)."
    )


REGIONS: dict[str, Callable[[Runs], str]] = {
    "traffic": lambda runs: tables.traffic_table(),
    "gpu": _gpu,
    "step": _each_run("block", _step),
    "forward": _each_run("block", lambda name, run: tables.time_table(run, "forward")),
    "memory": _each_run("block", lambda name, run: tables.memory_table(run)),
    "figures": _each_run("block", lambda name, run: tables.figures_table(run)),
    **{name: _each_run(name, _whole) for name in PICTURED if name != "block"},
    "ranks": _each_run("ranks", lambda name, run: ranks_report.text(run)),
    "collective-bytes": lambda runs: collective_model.bytes_table(),
    "collective-seconds": lambda runs: collective_model.seconds_table(),
    "collective-floors": lambda runs: collective_model.floor_table(),
}


def fill(text: str, runs: Runs) -> str:
    """`text` with every marked region rewritten; ValueError for a region that does not exist."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in REGIONS:
            raise ValueError(f"bench region must be one of {', '.join(REGIONS)}, got {name}")
        return f"{match[1]}{REGIONS[name](runs)}\n{match[3]}"

    return REGION.sub(replace, text)


def write_plots(runs: Runs, results: Path) -> None:
    """A picture beside each record."""
    from benchmarks import plots  # matplotlib takes a second to import

    pictures = {
        "block": plots.plot,
        "stages": stage_report.plot,
        "network": resnet_report.plot,
        "scaling": scaling_report.plot,
        "convergence": convergence_report.plot,
    }
    for name, run in runs.items():
        if run["benchmark"] not in PICTURED:
            continue
        pictures[run["benchmark"]](run, results / f"{name}.png")


def write_text(runs: Runs, path: Path) -> None:
    """All runs one after the other, as Markdown."""
    parts = [f"## {name}\n\n{TEXTS[run['benchmark']](run)}\n" for name, run in runs.items()]
    path.write_text("\n".join(parts) or f"{NO_RUNS}\n")


def main(argv: Sequence[str] | None = None, documents: Sequence[Path] = DOCUMENTS) -> int:
    """Write, or check, the documents and the plots beside the records."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    parser.add_argument(
        "--results", type=Path, default=records.RESULTS, help="folder of the records"
    )
    parser.add_argument("--text", type=Path, help="write all tables there, and no document")
    parser.add_argument("--csv", type=Path, help="write every record there, one a row")
    args = parser.parse_args(argv)
    runs = records.read_all(args.results)
    if args.csv is not None:
        records.write_csv(runs.values(), args.csv)
    if args.text is not None:
        write_text(runs, args.text)
        write_plots(runs, args.results)
        return 0
    filled = {document: fill(document.read_text(), runs) for document in documents}
    stale = [document for document, text in filled.items() if text != document.read_text()]
    if args.check:
        for document in stale:
            print(f"{document.name} is not up to date: run `make report`", file=sys.stderr)
        return int(bool(stale))
    for document in stale:
        document.write_text(filled[document])
    write_plots(runs, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
