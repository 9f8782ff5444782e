"""The results of a run as a table, a JSON file and a picture."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import launch
import matplotlib
import torch
from config import SMALL, Config
from footprint import Footprint
from parity import Check, Outcome, final_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

MIB = 2**20
COLORS = {"reference": "#7f7f7f", "fused": "#d1495b"}


@dataclass(frozen=True)
class Result:
    """What one variant's training came to.

    Attributes:
        accuracy, ema_accuracy: test accuracy after the last epoch, and that of the averaged
            weights, if they were averaged.
        best_accuracy: that of the best epoch, with the averaged weights if there are any.
        footprint: None where it was not measured.
        composed: name of each block that did not run fused -> the reason.
    """

    losses: list[float]
    accuracy: float
    ema_accuracy: float | None
    best_accuracy: float
    images_per_second: float
    footprint: Footprint | None
    composed: dict[str, str]

    @property
    def peak_bytes(self) -> int | None:
        return None if self.footprint is None else self.footprint.peak_bytes

    @property
    def saved_bytes(self) -> int | None:
        return None if self.footprint is None else self.footprint.saved_bytes

    @property
    def outcome(self) -> Outcome:
        return Outcome(self.losses, self.accuracy)


def table(results: dict[str, Result]) -> str:
    """One row per figure, one column per variant, and their ratio if there are two."""
    rows = [["", *results, *(["ratio"] if len(results) == 2 else [])]]
    for label, pattern, values in _figures(results):
        cells = ["n/a" if value is None else pattern.format(value) for value in values]
        rows.append([label, *cells, *_ratio(label, values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def notes(results: dict[str, Result]) -> list[str]:
    """A line for each block that did not run fused."""
    return [
        f"note: {variant} {name} ran composed, not fused: {reason}"
        for variant, result in results.items()
        for name, reason in result.composed.items()
    ]


def write_json(
    path: Path, config: Config, results: dict[str, Result], checks: list[Check], seconds: float
) -> None:
    """Everything in the table and the picture, with the configuration and the machine."""
    content = {
        "config": asdict(config),
        "machine": _machine(config),
        "results": {
            variant: {
                "final_loss": final_loss(result.losses),
                "test_accuracy": result.accuracy,
                "ema_test_accuracy": result.ema_accuracy,
                "best_test_accuracy": result.best_accuracy,
                "images_per_second": result.images_per_second,
                "peak_memory_bytes": result.peak_bytes,
                "saved_for_backward_bytes": result.saved_bytes,
                "composed": result.composed,
                "losses": result.losses,
            }
            for variant, result in results.items()
        },
        "parity": [{**check._asdict(), "passed": check.passed} for check in checks],
        "seconds": seconds,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def plot(path: Path, config: Config, results: dict[str, Result]) -> None:
    """PNG: loss curves and their difference on the left, speed and memory bars on the right."""
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    both = len(results) == 2
    heights = [3, 1] if both else [1]
    grid = figure.add_gridspec(len(heights), 4, width_ratios=[3.2, 1, 1, 1], height_ratios=heights)
    curves = figure.add_subplot(grid[0, 0])
    _plot_losses(curves, results)
    if both:
        _plot_difference(figure.add_subplot(grid[1, 0], sharex=curves), results)
        curves.tick_params(labelbottom=False)
    else:
        curves.set_xlabel("step")
    every = list(results.values())
    bars: list[tuple[str, list[float | None]]] = [
        ("images per second", [result.images_per_second for result in every])
    ]
    if _has_footprints(results):
        bars += [
            ("peak memory\nof a step (MiB)", [_mib(r.peak_bytes) for r in every]),
            ("saved for\nbackward (MiB)", [_mib(r.saved_bytes) for r in every]),
        ]
    for column, (title, values) in enumerate(bars, start=1):
        _plot_bars(figure.add_subplot(grid[:, column]), title, list(results), values)
    figure.suptitle(_title(config), fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _figures(results: dict[str, Result]) -> list[tuple[str, str, list[float | None]]]:
    every = list(results.values())
    rows: list[tuple[str, str, list[float | None]]] = [
        ("final loss", "{:.4f}", [final_loss(result.losses) for result in every]),
        ("test accuracy (%)", "{:.2f}", [100 * result.accuracy for result in every]),
    ]
    averaged = [100 * r.ema_accuracy for r in every if r.ema_accuracy is not None]
    if averaged:
        rows.append(("averaged (%)", "{:.2f}", [*averaged]))
    rows.append(("images/s", "{:.1f}", [result.images_per_second for result in every]))
    if _has_footprints(results):
        rows += [
            ("peak memory of a step (MiB)", "{:.1f}", [_mib(r.peak_bytes) for r in every]),
            ("saved for backward (MiB)", "{:.1f}", [_mib(r.saved_bytes) for r in every]),
        ]
    return rows


def _has_footprints(results: dict[str, Result]) -> bool:
    return any(result.footprint is not None for result in results.values())


def _ratio(label: str, values: list[float | None]) -> list[str]:
    if len(values) != 2:
        return []
    reference, fused = values
    if label == "final loss" or label.endswith("(%)") or not reference or fused is None:
        return [""]
    return [f"x {fused / reference:.2f}"]


def _mib(count: int | None) -> float | None:
    return None if count is None else count / MIB


def _plot_losses(axes: Axes, results: dict[str, Result]) -> None:
    for variant, result in results.items():
        style = "--" if variant == "fused" else "-"
        steps = range(1, len(result.losses) + 1)
        axes.plot(steps, result.losses, color=COLORS[variant], linewidth=0.8, alpha=0.35)
        label = f"{variant} (test accuracy {result.accuracy:.1%})"
        smooth = _smooth(result.losses)
        axes.plot(steps, smooth, style, color=COLORS[variant], linewidth=2, label=label)
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    axes.set_title("Loss: each step, and its running mean", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_difference(axes: Axes, results: dict[str, Result]) -> None:
    reference, fused = (result.losses for result in results.values())
    gaps = [abs(a - b) for a, b in zip(reference, fused, strict=True)]
    axes.semilogy(range(1, len(gaps) + 1), gaps, color="#333333", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("difference")
    axes.grid(alpha=0.3)


def _plot_bars(axes: Axes, title: str, variants: list[str], values: list[float | None]) -> None:
    colors = [COLORS[variant] for variant in variants]
    bars = axes.bar(variants, [value or 0 for value in values], color=colors, width=0.65)
    labels = ["n/a" if value is None else f"{value:.4g}" for value in values]
    axes.bar_label(bars, labels, padding=2)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(losses: list[float], memory: float = 0.8) -> list[float]:
    """Exponential running mean, corrected for its start."""
    smooth, total, weight = [], 0.0, 0.0
    for loss in losses:
        total = memory * total + (1 - memory) * loss
        weight = memory * weight + (1 - memory)
        smooth.append(total / weight)
    return smooth


def _title(config: Config) -> str:
    model = config.model
    if model == SMALL:
        blocks = "+".join(map(str, config.blocks_per_stage))
        model = f"{blocks} bottleneck blocks, width {config.width}"
    return (
        f"{Path(config.data).name}, {model}, "
        f"batch {config.batch_size}, {config.dtype}, {config.layout}, {config.device}"
    )


def _machine(config: Config) -> dict[str, object]:
    cuda = config.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(config.device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processes": launch.size(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
