"""Markdown tables of a run, as `bench_block` prints them and `report` writes them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.figures import (
    LAYOUTS,
    TARGET_SETTINGS,
    by_shape_and_variant,
    figures,
    memory_ratio,
    shape_names,
    speedup,
)
from benchmarks.records import Run
from benchmarks.shapes import RESNET50
from benchmarks.traffic import eager_bytes, fused_bytes, inductor_bytes

VARIANTS = (
    "reference contiguous",
    "reference channels_last",
    "fused contiguous",
    "fused channels_last",
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [_row(header, widths), _row(rule, widths), *(_row(row, widths) for row in rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "| " + " | ".join(padded) + " |"


def caption(run: Run) -> str:
    """One paragraph that says what was measured, where, when and how."""
    env, settings, peaks = run["environment"], run["settings"], run["peaks"]
    place = env["cpu"] if settings["device"] == "cpu" else env["device"]
    return (
        f"{settings['dtype']}, batch {settings['batch']}, {place}, {env['cores']} cores, "
        f"{settings['threads']} threads, torch {env['torch']}, {env['date']}, revision "
        f"{env['git_sha'][:10]}{' with local changes' if env['dirty'] else ''}. Milliseconds: "
        f"median (20 %-80 % quantiles) of {settings['rounds']} rounds, variants interleaved. "
        "Speed-up: reference over fused, in the named layout. Floor: the convolutions alone at the "
        f"best rate of the same run, {peaks['convolution_rate'] / 1e9:.0f} GFLOP/s (a copy ran at "
        f"{peaks['copy_bandwidth'] / 1e9:.1f} GB/s), as a share of the fused channels_last time."
    )


def time_table(run: Run, phase: str) -> str:
    """Milliseconds, speed-ups and share of the floor of `phase`, "forward" or "step"."""
    records = by_shape_and_variant(run)
    header = ["block", *VARIANTS]
    header += ["speed-up contiguous", "speed-up channels_last", "of floor"]
    rows = []
    for shape in shape_names(run):
        timings = [records[shape, variant][phase] for variant in VARIANTS]
        row = [shape]
        row += [f"{1e3 * t['median']:.1f} ({_quantiles(t)})" for t in timings]
        row += [f"{speedup(records, shape, layout, phase):.2f}" for layout in LAYOUTS]
        row.append(f"{records[shape, 'fused channels_last'][phase]['percent_of_floor']:.0f} %")
        rows.append(row)
    return markdown(header, rows)


def _quantiles(timing: dict[str, float]) -> str:
    return f"{1e3 * timing['q20']:.1f}-{1e3 * timing['q80']:.1f}"


def memory_table(run: Run) -> str:
    """Mebibytes that one forward in channels_last keeps for backward."""
    records = by_shape_and_variant(run)
    rows = []
    for shape in shape_names(run):
        kept = (records[shape, f"{kind} channels_last"] for kind in ("reference", "fused"))
        row = [shape, *(f"{record['saved_bytes'] / 2**20:.1f}" for record in kept)]
        rows.append([*row, f"{memory_ratio(records, shape, 'channels_last'):.2f}"])
    return markdown(["block", "reference, MiB", "fused, MiB", "ratio"], rows)


def figures_table(run: Run) -> str:
    """The figures to reach, each met or missed; one sentence where none is set for this run."""
    rows = [
        [
            figure.description,
            f"{figure.value:.2f}",
            f"{'at most' if figure.at_most else 'at least'} {figure.bound:.2f}",
            "met" if figure.met else "missed",
        ]
        for figure in figures(run)
    ]
    if not rows:
        settings = ", ".join(f"{key} {value}" for key, value in TARGET_SETTINGS.items())
        return f"No figures are set for this run, only for {settings}."
    return markdown(["figure", "measured", "to reach", ""], rows)


def traffic_table(batch: int = 256, itemsize: int = 2) -> str:
    """Gigabytes that one training step must move, by plan: from the model, not measured."""
    rows = []
    for shape in RESNET50:
        eager, compiled, fused = (
            plan(shape, batch, itemsize) for plan in (eager_bytes, inductor_bytes, fused_bytes)
        )
        row = [shape.name, *(f"{count / 1e9:.2f}" for count in (eager, compiled, fused))]
        rows.append([*row, f"{eager / fused:.1f}"])
    return markdown(["block", "eager, GB", "compiled, GB", "fused, GB", "eager / fused"], rows)
