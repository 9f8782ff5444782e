"""The table and the picture of a run of `bench_resnet50`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.records import Run
from benchmarks.tables import (
    interleaving,
    markdown,
    mebibytes,
    milliseconds,
    origin,
    without_empty_columns,
)

COLOURS = {"reference": "#9aa5b1", "compile": "#d97706", "fused": "#2563eb"}


def _timed(run: Run) -> list[dict[str, Any]]:
    return [record for record in run["records"] if "left_out" not in record]


def text(run: Run) -> str:
    """A caption and a row for each batch size and variant."""
    settings = run["settings"]
    eager = {
        record["batch"]: record["median"]
        for record in _timed(run)
        if record["variant"] == "reference channels_last"
    }
    rows = []
    for record in _timed(run):
        reference = eager.get(record["batch"])
        rows.append(
            [
                record["variant"],
                str(record["batch"]),
                milliseconds(record),
                f"{record['images_per_second']:.1f}",
                f"{reference / record['median']:.2f}" if reference else "-",
                mebibytes(record["saved_bytes"]),
                mebibytes(record["peak_bytes"]),
                mebibytes(record.get("resident_bytes")),
            ]
        )
    header = ["variant", "batch", "ms per step", "images/s", "over eager channels_last"]
    header += ["kept for backward, MiB", "peak, MiB", "resident, MiB"]
    caption = (
        f"Training steps of {settings['network']}, {settings['dtype']}"
        f"{'' if settings['dtype'] == 'float32' else ' autocast'}, {settings['size']} pixels, SGD "
        f"with momentum, random images; {origin(run)}. Median (20 %-80 % quantiles) of "
        f"{settings['rounds']} samples, {interleaving(run)}."
    )
    if any(record.get("resident_bytes") for record in _timed(run)):
        caption += " Resident: the most memory of one of its processes, torch included."
    missing = [
        f"batch {record['batch']}: no {record['variant']}: {record['left_out']}"
        for record in run["records"]
        if "left_out" in record
    ]
    return "\n\n".join([caption, markdown(*without_empty_columns(header, rows)), *missing])


def _colour(variant: str) -> str:
    return next(colour for kind, colour in COLOURS.items() if variant.startswith(kind))


def plot(run: Run, path: Path) -> None:
    """Images per second, and the memory of a step, by batch size and variant."""
    import matplotlib.pyplot as plt

    from benchmarks.plots import save, title

    rows = _timed(run)
    labels = [f"{row['variant']}, {row['batch']}" for row in rows]
    colours = [_colour(row["variant"]) for row in rows]
    on_gpu = any(row["peak_bytes"] for row in rows)
    key, what = ("peak_bytes", "peak") if on_gpu else ("saved_bytes", "kept for backward")
    figure, (speed, memory) = plt.subplots(
        1, 2, figsize=(12, 1.6 + 0.35 * len(rows)), sharey=True, layout="constrained"
    )
    for axes, values, name in (
        (speed, [row["images_per_second"] for row in rows], "images per second"),
        (memory, [(row[key] or 0) / 2**20 for row in rows], f"memory of a step, {what}, MiB"),
    ):
        drawn = axes.barh(range(len(rows)), values, color=colours)
        axes.bar_label(drawn, [f"{v:.4g}" if v else "" for v in values], padding=3, fontsize=8)
        axes.set_title(name)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    speed.set_yticks(range(len(rows)), labels)
    speed.invert_yaxis()
    figure.suptitle(title(run, f"training {run['settings']['network']}, batch sizes as named"))
    save(figure, path)
