"""The table and the picture of a run of `convergence`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.records import Run
from benchmarks.tables import markdown, origin

VARIANTS = ("reference", "fused")
COLOURS = {"reference": "#9aa5b1", "fused": "#2563eb"}
METRICS = {"accuracy": "test accuracy", "final_loss": "final training loss"}
# Two means of the same distribution differ by more than this many standard errors once in 100
# comparisons, with the few seeds there are (Student's t, 8 degrees of freedom).
STANDARD_ERRORS = 3.36


class Comparison(NamedTuple):
    """Two samples: by how much their means differ, and the standard error of that."""

    difference: float
    standard_error: float

    @property
    def equal(self) -> bool:
        """Whether the means agree within the spread."""
        return abs(self.difference) <= STANDARD_ERRORS * self.standard_error


def compare(reference: Sequence[float], fused: Sequence[float]) -> Comparison:
    """Welch's comparison of two samples of at least two values."""
    error = math.sqrt(
        statistics.variance(reference) / len(reference) + statistics.variance(fused) / len(fused)
    )
    return Comparison(statistics.fmean(fused) - statistics.fmean(reference), error)


def _groups(run: Run) -> list[tuple[str, str]]:
    return list(dict.fromkeys((record["data"], record["dtype"]) for record in run["records"]))


def _values(run: Run, group: tuple[str, str], variant: str, metric: str) -> list[float]:
    return [
        record[metric]
        for record in run["records"]
        if (record["data"], record["dtype"]) == group and record["variant"] == variant
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def text(run: Run) -> str:
    """A caption and a row for each data set, dtype and metric."""
    rows = []
    for group in _groups(run):
        for metric, name in METRICS.items():
            pair = [_values(run, group, variant, metric) for variant in VARIANTS]
            difference, error = comparison = compare(*pair)
            verdict = "yes" if comparison.equal else "no"
            rows.append(
                [
                    ", ".join([*group, name]),
                    *(_spread(values) for values in pair),
                    f"{difference:+.4f}",
                    f"{error:.4f}",
                    verdict,
                ]
            )
    header = ["trained on", *VARIANTS, "difference", "standard error", "equal within the spread"]
    settings = run["settings"]
    epochs = ", ".join(f"{count} of {name}" for name, count in settings["epochs"].items())
    caption = (
        f"The small ResNet of examples/, width {settings['width']}, batch "
        f"{settings['batch_size']}, epochs: {epochs}, {settings['seeds']} seeds; "
        f"{origin(run)}. Mean ± standard deviation over the seeds. Equal: the means "
        f"differ by at most {STANDARD_ERRORS} standard errors, which chance exceeds once in 100."
    )
    return f"{caption}\n\n{markdown(header, rows)}"


def plot(run: Run, path: Path) -> None:
    """Every seed as a point, mean and standard deviation beside them."""
    import matplotlib.pyplot as plt

    from benchmarks.plots import save
    from benchmarks.records import place

    groups = _groups(run)
    figure, grid = plt.subplots(1, len(METRICS), figsize=(11, 4), layout="constrained")
    for axes, (metric, name) in zip(grid, METRICS.items(), strict=True):
        for shift, (variant, colour) in zip((-0.15, 0.15), COLOURS.items(), strict=True):
            for index, group in enumerate(groups):
                values = _values(run, group, variant, metric)
                at = index + shift
                axes.scatter([at] * len(values), values, s=14, color=colour, alpha=0.5)
                axes.errorbar(
                    at + 0.06,
                    statistics.fmean(values),
                    statistics.stdev(values),
                    fmt="D",
                    color=colour,
                    capsize=4,
                    label=variant if index == 0 else None,
                )
        axes.set_xticks(range(len(groups)), ["\n".join(group) for group in groups])
        axes.set_title(name)
        axes.grid(alpha=0.3, axis="y")
        axes.legend(frameon=False)
    figure.suptitle(f"{run['settings']['seeds']} seeds, mean ± standard deviation, {place(run)}")
    save(figure, path)
