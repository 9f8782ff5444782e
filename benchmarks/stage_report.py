"""The table and the roofline picture of a run of `bench_stages`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.records import Run
from benchmarks.roofline import Peaks, floor_seconds
from benchmarks.tables import markdown, milliseconds, origin, rate
from benchmarks.traffic import Cost

COLOURS = {
    "F1": "#93c5fd",
    "F2": "#3b82f6",
    "F3": "#1d4ed8",
    "F4": "#1e3a8a",
    "F3+F4": "#0f766e",
    "B1": "#fcd34d",
    "B2": "#f59e0b",
    "B3": "#ef4444",
    "B4": "#b91c1c",
    "B5": "#a78bfa",
    "B6": "#6d28d9",
}


def _stages(run: Run) -> list[dict[str, Any]]:
    return [record for record in run["records"] if record["stage"] != "step"]


def _cost(record: dict[str, Any]) -> Cost:
    return Cost(record["moved"], record["operations"])


def text(run: Run) -> str:
    """A caption and a row for each shape and stage."""
    peaks, settings = Peaks(**run["peaks"]), run["settings"]
    steps = {r["shape"]: r["median"] for r in run["records"] if r["stage"] == "step"}
    rows = []
    for record in _stages(run):
        seconds = record["median"]
        rows.append(
            [
                record["shape"],
                record["stage"],
                milliseconds(record),
                f"{100 * seconds / steps[record['shape']]:.0f} %",
                f"{record['moved'] / seconds / 1e9:.1f}",
                f"{record['operations'] / seconds / 1e12:.3f}",
                f"{100 * floor_seconds(_cost(record), peaks) / seconds:.0f} %",
            ]
        )
    header = ["block", "stage", "ms", "of the step", "GB/s", "TFLOP/s", "of its floor"]
    caption = (
        f"{settings['dtype']}, batch {settings['batch']}; {origin(run)}. Median (20 %-80 % "
        f"quantiles) of {settings['rounds']} steps. GB/s and TFLOP/s count what a stage must move "
        "and compute: operations with pixels, not with padding. Floor: the longer of its bytes at "
        f"the rate of a copy ({rate(peaks.copy_bandwidth, 'B/s')}) and its operations at that of "
        f"the fastest product ({rate(peaks.operation_rate, 'FLOP/s')}), measured in the same run; "
        "above 100 % its operands came from a cache, Winograd's filtering took fewer operations, "
        "or B1 computed the product of B2 or B6 with g in its own pass, and stays below for it."
    )
    return f"{caption}\n\n{markdown(header, rows)}"


def plot(run: Run, path: Path) -> None:
    """The roofline: each stage's operations per second over its operations per byte."""
    import matplotlib.pyplot as plt
    import numpy as np

    from benchmarks.plots import save, title

    peaks = Peaks(**run["peaks"])
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    stages = _stages(run)
    intensities = [r["operations"] / r["moved"] for r in stages]
    grid = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
    roof = np.minimum(grid * peaks.copy_bandwidth, peaks.operation_rate)
    axes.loglog(grid, roof / 1e12, color="black", linewidth=1, label="measured peaks")
    for name, colour in COLOURS.items():
        mine = [r for r in stages if r["stage"] == name]
        if not mine:
            continue
        x = [r["operations"] / r["moved"] for r in mine]
        y = [r["operations"] / r["median"] / 1e12 for r in mine]
        axes.scatter(x, y, s=28, color=colour, label=name, zorder=3)
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title(run, f"the ten stages, batch {run['settings']['batch']}"))
    save(figure, path)
