"""The table of a run of `bench_ranks`."""

from __future__ import annotations

from typing import Any

from benchmarks import collective_model
from benchmarks.records import Run
from benchmarks.shapes import SHAPES
from benchmarks.tables import markdown, milliseconds, origin

HEADER = [
    "processes",
    "local, ms",
    "synchronised, ms",
    "cost, ms",
    "cost",
    "its collectives alone, ms",
    "one, µs",
    "images/s",
    "of one process's",
]


def text(run: Run) -> str:
    """A caption and a row for each number of processes."""
    settings = run["settings"]
    shape = SHAPES[settings["shape"]]
    count, size = len(collective_model.junctions(shape)), collective_model.step_bytes(shape)
    caption = (
        f"Training steps of {shape.name}, {settings['dtype']}, {settings['batch']} images a "
        f"process; {origin(run)}; threads are each process's. Milliseconds: median (20 %-80 % "
        f"quantiles) of {settings['rounds']} rounds of the slowest process, variants interleaved. "
        "Local: statistics of each process's batch; cost: what those of all processes take more; "
        f"alone: the {count} all-reduces of a step ({size / 1e3:.1f} kB) one after the other."
    )
    by_ranks: dict[int, dict[str, Any]] = {}
    for record in run["records"]:
        by_ranks.setdefault(record["ranks"], {})[record["variant"]] = record
    rates = {ranks: _rate(ranks, found, settings["batch"]) for ranks, found in by_ranks.items()}
    first = min(rates)
    rows = [
        [
            str(ranks),
            *_cells(found, count),
            f"{rates[ranks]:.1f}",
            f"{rates[ranks] * first / rates[first] / ranks:.2f}",
        ]
        for ranks, found in by_ranks.items()
    ]
    return f"{caption}\n\n{markdown(HEADER, rows)}"


def _rate(ranks: int, found: dict[str, Any], batch: int) -> float:
    """Images a second of all processes, synchronised where there are several."""
    step = found.get("synchronised", found["local"])
    return ranks * batch / step["median"]


def _cells(found: dict[str, Any], count: int) -> list[str]:
    """The times of one number of processes; dashes where there is nothing to synchronise."""
    local = found["local"]
    if "synchronised" not in found:
        return [milliseconds(local), *["-"] * 5]
    cost = found["synchronised"]["median"] - local["median"]
    alone = found["collectives"]
    return [
        milliseconds(local),
        milliseconds(found["synchronised"]),
        f"{1e3 * cost:.2f}",
        f"{100 * cost / local['median']:.1f} %",
        milliseconds(alone),
        f"{1e6 * alone['median'] / count:.0f}",
    ]
