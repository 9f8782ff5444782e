"""Write the tables between README.md's `bench` markers, and the plots, from benchmarks/results/.

    python -m benchmarks.report            # write
    python -m benchmarks.report --check    # exit status 1 if README.md is not up to date

A region is `<!-- bench:NAME:start -->` ... `<!-- bench:NAME:end -->`, with a NAME of `REGIONS`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import records, tables
from benchmarks.records import Run

README = records.ROOT / "README.md"
REGION = re.compile(
    r"(<!-- bench:(?P<name>[\w-]+):start -->\n).*?(<!-- bench:(?P=name):end -->)", re.S
)
NO_RUNS = "Nothing measured yet: `make bench` writes benchmarks/results/."

Runs = Mapping[str, Run]


def _each_run(render: Callable[[str, Run], str]) -> Callable[[Runs], str]:
    """A region with one part per run."""
    return lambda runs: "\n\n".join(render(*item) for item in runs.items()) or NO_RUNS


def _step(name: str, run: Run) -> str:
    image = f"![Speed-up and memory bars](benchmarks/results/{name}.png)"
    return f"{tables.caption(run)}\n\n{tables.time_table(run, 'step')}\n\n{image}"


REGIONS: dict[str, Callable[[Runs], str]] = {
    "traffic": lambda runs: tables.traffic_table(),
    "step": _each_run(_step),
    "forward": _each_run(lambda name, run: tables.time_table(run, "forward")),
    "memory": _each_run(lambda name, run: tables.memory_table(run)),
    "figures": _each_run(lambda name, run: tables.figures_table(run)),
}


def fill(text: str, runs: Runs) -> str:
    """`text` with every marked region rewritten; ValueError for a region that does not exist."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in REGIONS:
            raise ValueError(f"bench region must be one of {', '.join(REGIONS)}, got {name}")
        return f"{match[1]}{REGIONS[name](runs)}\n{match[3]}"

    return REGION.sub(replace, text)


def main(
    argv: Sequence[str] | None = None, readme: Path = README, results: Path = records.RESULTS
) -> int:
    """Write, or check, `readme` and the plots beside the records of `results`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="only compare, write nothing")
    args = parser.parse_args(argv)
    runs = records.read_all(results)
    text = readme.read_text()
    filled = fill(text, runs)
    if args.check:
        if filled != text:
            print(f"{readme.name} is not up to date: run `make report`", file=sys.stderr)
        return int(filled != text)
    readme.write_text(filled)

    from benchmarks.plots import plot  # matplotlib takes a second to import

    for name, run in runs.items():
        plot(run, results / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
