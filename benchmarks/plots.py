"""Speed-up and memory bars of one run, as a PNG."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.figures import by_shape_and_variant, shape_names, speedup
from benchmarks.records import Run

SPEED_COLOURS = {"channels_last": "#2563eb", "contiguous": "#93b4f5"}
MEMORY_COLOURS = {"fused": "#2563eb", "reference": "#9aa5b1"}


def plot(run: Run, path: Path) -> None:
    """Write the bars of `run` to `path`: speed-up of a training step, memory kept for backward."""
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    _plot_speed(speed, run)
    _plot_memory(memory, run)
    settings, env = run["settings"], run["environment"]
    place = env["cpu"] if settings["device"] == "cpu" else env["device"]
    figure.suptitle(f"{settings['dtype']}, batch {settings['batch']}, {place}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_speed(axes: Axes, run: Run) -> None:
    records = by_shape_and_variant(run)
    shapes = shape_names(run)
    series = {
        layout: ([speedup(records, shape, layout) for shape in shapes], colour)
        for layout, colour in SPEED_COLOURS.items()
    }
    _bars(axes, shapes, series, "{:.2f}")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_title("Speed-up of a training step over the reference in the same layout")


def _plot_memory(axes: Axes, run: Run) -> None:
    records = by_shape_and_variant(run)
    shapes = shape_names(run)
    series = {
        kind: (
            [records[s, f"{kind} channels_last"]["saved_bytes"] / 2**20 for s in shapes],
            colour,
        )
        for kind, colour in MEMORY_COLOURS.items()
    }
    _bars(axes, shapes, series, "{:.0f}")
    axes.set_title("Kept for backward, MiB")


def _bars(
    axes: Axes, labels: list[str], series: dict[str, tuple[list[float], str]], template: str
) -> None:
    """Grouped horizontal bars, first label on top, each bar labelled with its value."""
    height = 0.8 / len(series)
    for index, (name, (values, colour)) in enumerate(series.items()):
        positions = [row + (index - (len(series) - 1) / 2) * height for row in range(len(labels))]
        bars = axes.barh(positions, values, height, label=name, color=colour)
        axes.bar_label(bars, [template.format(v) for v in values], padding=2, fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=len(series))
