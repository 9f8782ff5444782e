"""Speed-up and memory bars of a block run, as a PNG, and what the other pictures share."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures import by_shape_and_variant, peer_speedup, peers, shape_names, speedup
from benchmarks.records import Run, place, preloaded

SPEED_COLOURS = {"channels_last": "#2563eb", "contiguous": "#93b4f5"}
PEER_COLOURS = ("#d97706", "#b45309", "#059669", "#7c3aed")
MEMORY_COLOURS = {"fused": "#2563eb", "reference": "#9aa5b1"}

Series = dict[str, tuple[list[float], str]]


def title(run: Run, *parts: str) -> str:
    """What every picture says on top."""
    return ", ".join([*parts, run["settings"]["dtype"], place(run), *preloaded(run)])


def save(figure: Figure, path: Path) -> None:
    """Write the picture, making its directory, and forget it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot(run: Run, path: Path) -> None:
    """Write the bars of `run` to `path`: speed-up of a training step, memory kept for backward."""
    rows = len(shape_names(run)) * (len(SPEED_COLOURS) + len(peers(run)))
    height = max(4.5, 1.5 + 0.19 * rows)
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(12, height), layout="constrained")
    _plot_speed(speed, run)
    _plot_memory(memory, run)
    figure.suptitle(title(run, f"batch {run['settings']['batch']}"))
    save(figure, path)


def _plot_speed(axes: Axes, run: Run) -> None:
    records = by_shape_and_variant(run)
    shapes = shape_names(run)
    series: Series = {
        f"over reference {layout}": ([speedup(records, shape, layout) for shape in shapes], colour)
        for layout, colour in SPEED_COLOURS.items()
    }
    for peer, colour in zip(peers(run), PEER_COLOURS, strict=False):
        ratios = [peer_speedup(records, shape, peer) for shape in shapes]
        series[f"over {peer}"] = ([ratio or 0.0 for ratio in ratios], colour)
    bars(axes, shapes, series, "{:.2f}")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_title("Speed-up of a training step of the fused block")


def _plot_memory(axes: Axes, run: Run) -> None:
    records = by_shape_and_variant(run)
    shapes = shape_names(run)
    series: Series = {
        kind: (
            [records[s, f"{kind} channels_last"]["saved_bytes"] / 2**20 for s in shapes],
            colour,
        )
        for kind, colour in MEMORY_COLOURS.items()
    }
    bars(axes, shapes, series, "{:.0f}")
    axes.set_title("Kept for backward, MiB")


def bars(axes: Axes, labels: list[str], series: Series, template: str) -> None:
    """Grouped horizontal bars, first label on top, each labelled with its value (not with a 0)."""
    height = 0.8 / len(series)
    for index, (name, (values, colour)) in enumerate(series.items()):
        positions = [row + (index - (len(series) - 1) / 2) * height for row in range(len(labels))]
        drawn = axes.barh(positions, values, height, label=name, color=colour)
        written = [template.format(value) if value else "" for value in values]
        axes.bar_label(drawn, written, padding=2, fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    columns = min(len(series), 2)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=columns)
