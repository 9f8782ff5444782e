"""The table and the picture of a run of `bench_scaling`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.records import Run
from benchmarks.tables import markdown, milliseconds, origin

COLOURS = {"reference channels_last": "#9aa5b1", "fused channels_last": "#2563eb"}
NAMES = {"batch": "images", "size": "height and width", "width": "width M"}


class Line(NamedTuple):
    """Seconds = overhead + slope * operations."""

    overhead: float
    slope: float


def fit(records: Sequence[dict[str, Any]]) -> Line:
    """The line of least relative squares through the medians (at least two)."""
    # Each equation is divided by its time: a small block's error counts as much as a large one's.
    rows = [(1 / r["median"], r["operations"] / r["median"]) for r in records]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    return Line((a * bb - b * ab) / determinant, (aa * b - ab * a) / determinant)


def growth(records: Sequence[dict[str, Any]]) -> float:
    """The exponent of the operations that the time grows with between the two largest points."""
    small, large = records[-2:]
    return math.log(large["median"] / small["median"]) / math.log(
        large["operations"] / small["operations"]
    )


def _series(run: Run) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The records by axis and variant, from small to large."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in run["records"]:
        found.setdefault((record["axis"], record["variant"]), []).append(record)
    return found


def text(run: Run) -> str:
    """A caption, the times, and what they come to."""
    series = _series(run)
    axes = list(dict.fromkeys(axis for axis, _ in series))
    rows = []
    for axis in axes:
        pairs = zip(*(series[axis, variant] for variant in COLOURS), strict=True)
        for reference, fused in pairs:
            sizes = [str(fused[key]) for key in ("batch", "size", "width")]
            ratio = f"{reference['median'] / fused['median']:.2f}"
            rows.append([axis, *sizes, milliseconds(reference), milliseconds(fused), ratio])
    header = ["varied", "batch", "size", "width", "reference, ms", "fused, ms", "speed-up"]
    fits = []
    for (axis, variant), points in series.items():
        line = fit(points)
        rate = f"{1 / line.slope / 1e9:.0f}" if line.slope > 0 else "-"
        overhead = f"{1e3 * line.overhead:.2f}"
        fits.append([f"{variant}, by {axis}", overhead, rate, f"{growth(points):.2f}"])
    fit_header = ["line through", "overhead, ms", "GFLOP/s beyond it", "growth at the largest"]
    settings = run["settings"]
    caption = (
        f"Training steps of identity blocks, {settings['dtype']}; {origin(run)}. Median "
        f"(20 %-80 % quantiles) of {settings['rounds']} rounds, variants interleaved. The line is "
        "that of least relative squares through the times over the convolutions' operations; "
        "growth is the exponent of the operations between the two largest blocks, 1 where the "
        "time is all work of one kind."
    )
    return "\n\n".join([caption, markdown(header, rows), markdown(fit_header, fits)])


def plot(run: Run, path: Path) -> None:
    """Time over each size, on logarithmic axes."""
    import matplotlib.pyplot as plt

    from benchmarks.plots import save, title

    series = _series(run)
    names = list(dict.fromkeys(axis for axis, _ in series))
    figure, grid = plt.subplots(1, len(names), figsize=(4.2 * len(names), 4), layout="constrained")
    for axes, name in zip(grid, names, strict=True):
        for variant, colour in COLOURS.items():
            points = series[name, variant]
            x = [point[name] for point in points]
            axes.loglog(x, [1e3 * p["median"] for p in points], "o-", color=colour, label=variant)
            low, high = ([1e3 * p[key] for p in points] for key in ("q20", "q80"))
            axes.fill_between(x, low, high, color=colour, alpha=0.2)
        work = [1e3 * points[-1]["median"] * p["operations"] / points[-1]["operations"]
                for p in points]  # fmt: skip
        axes.loglog(x, work, ":", color="black", linewidth=1, label="in proportion to the work")
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        axes.set_xlabel(NAMES[name])
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("ms per training step")
    grid[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title(run, "training step of an identity block"))
    save(figure, path)
