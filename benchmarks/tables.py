"""Markdown tables of a block run, as `bench_block` prints them and `report` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.figures import (
    LAYOUTS,
    TARGET_SETTINGS,
    by_shape_and_variant,
    figures,
    floor_share,
    memory_ratio,
    peer_speedup,
    peers,
    shape_names,
    speedup,
    variants,
)
from benchmarks.records import Run, place, preloaded
from benchmarks.shapes import RESNET50
from benchmarks.traffic import eager_bytes, fused_bytes, inductor_bytes


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


def origin(run: Run) -> str:
    """Where, with what and when a run was measured."""
    env, settings = run["environment"], run["settings"]
    if settings["device"] == "cpu":
        where = f"{place(run)}, {env['cores']} cores, {settings['threads']} threads"
        versions = f"torch {env['torch']}"
    else:
        where = f"{place(run)}, driver {env['driver']}"
        versions = f"torch {env['torch']}, CUDA {env['cuda']}, Triton {env['triton']}"
    revision = f"revision {env['git_sha'][:10]}{' with local changes' if env['dirty'] else ''}"
    return ", ".join([where, versions, *preloaded(run), env["date"], revision])


def interleaving(run: Run) -> str:
    """How the variants of a run took turns."""
    processes = run["settings"].get("processes")
    if not processes:
        return "variants interleaved"
    own = "a process" if processes == 1 else f"{processes} processes"
    order = "" if processes == 1 else ", one after the other"
    return f"variants interleaved, each in {own} of its own{order}"


def milliseconds(timing: dict[str, float]) -> str:
    """Median and quantiles of a timing."""
    median, low, high = (1e3 * timing[key] for key in ("median", "q20", "q80"))
    digits = 1 if median >= 10 else 2
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def caption(run: Run) -> str:
    """One paragraph that says what was measured, where, when and how."""
    settings, peaks = run["settings"], run["peaks"]
    product = peaks.get("product_rate", 0.0)
    operations = max(peaks["convolution_rate"], product)
    return (
        f"{settings['dtype']}, batch {settings['batch']}, convolutions "
        f"{'with' if settings['bias'] else 'without'} a bias; {origin(run)}. Milliseconds: "
        f"median (20 %-80 % quantiles) of {settings['rounds']} rounds, {interleaving(run)}. "
        "Speed-up: reference over fused, in the named layout; over a peer: the peer's time over "
        "that of fused channels_last. Floor: the ten fused stages, each at the measured rate of a "
        f"copy ({rate(peaks['copy_bandwidth'], 'B/s')}) or of the fastest product "
        f"({rate(operations, 'FLOP/s')}, operations with pixels, not with padding), whichever "
        "takes longer, as a share of the fused channels_last time; above 100 % where Winograd's "
        "filtering took fewer operations."
    )


def rate(value: float, unit: str) -> str:
    """A rate in units of 1e9 or 1e12."""
    return f"{value / 1e12:.2f} T{unit}" if value >= 1e12 else f"{value / 1e9:.1f} G{unit}"


def time_table(run: Run, phase: str) -> str:
    """Milliseconds, speed-ups and share of the floor of `phase`, "forward" or "step"."""
    records = by_shape_and_variant(run)
    header = ["block", *variants(run), *(f"speed-up {layout}" for layout in LAYOUTS)]
    header += [*(f"over {peer}" for peer in peers(run)), "of floor"]
    rows = []
    for shape in shape_names(run):
        row = [shape, *(_cell(records.get((shape, name)), phase) for name in variants(run))]
        row += [f"{speedup(records, shape, layout, phase):.2f}" for layout in LAYOUTS]
        for peer in peers(run):
            ratio = peer_speedup(records, shape, peer, phase)
            row.append("-" if ratio is None else f"{ratio:.2f}")
        rows.append([*row, f"{100 * floor_share(run, shape, phase):.0f} %"])
    return markdown(header, rows)


def _cell(record: Any, phase: str) -> str:
    return milliseconds(record[phase]) if record is not None else "-"


def left_out(run: Run) -> str:
    """Why peers are missing from a run, one line each; empty where none is."""
    rows = [record for record in run["records"] if "left_out" in record]
    return "\n".join(f"{row['shape']}: no {row['variant']}: {row['left_out']}" for row in rows)


def memory_table(run: Run) -> str:
    """In channels_last: mebibytes that one forward keeps for backward, the peak of a step, and its
    page faults."""
    records = by_shape_and_variant(run)
    names = [name for name in variants(run) if not name.endswith(" contiguous")]
    rows = []
    for shape in shape_names(run):
        found = [records.get((shape, name), {}) for name in names]
        row = [shape, *(mebibytes(record.get("saved_bytes")) for record in found)]
        row.append(f"{memory_ratio(records, shape, 'channels_last'):.2f}")
        row += [mebibytes(record.get("peak_bytes")) for record in found]
        rows.append(row + [_page_faults(record) for record in found])
    header = ["block", *(f"{name}, MiB" for name in names), "fused / reference"]
    header += [f"{name}, peak MiB" for name in names]
    header += [f"{name}, page faults of a step" for name in names]
    return markdown(*without_empty_columns(header, rows))


def _page_faults(record: Mapping[str, Any]) -> str:
    count = record.get("step", {}).get("page_faults")
    return "-" if count is None else f"{count:,.0f}"


def without_empty_columns(
    header: list[str], rows: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows without the columns that hold a dash in every row."""
    kept = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def mebibytes(count: int | None) -> str:
    """A size, or a dash where it is not known."""
    return "-" if count is None else f"{count / 2**20:.1f}"


def figures_table(run: Run) -> str:
    """The figures to reach, now and in the end, each met or missed; one sentence where none is set
    for this run."""
    rows = [
        [
            figure.description,
            f"{figure.value:.2f}",
            *(
                f"{'at most' if figure.at_most else 'at least'} {bound:.2f}: "
                f"{'met' if met else 'missed'}"
                for bound, met in zip(figure.bounds, figure.met, strict=True)
            ),
        ]
        for figure in figures(run)
    ]
    if not rows:
        settings = ", ".join(f"{key} {value}" for key, value in TARGET_SETTINGS.items())
        return f"No figures are set for this run, only for {settings}."
    return markdown(["figure", "measured", "to reach", "in the end"], rows)


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


def text(run: Run) -> str:
    """All of a block run."""
    parts = [caption(run)]
    for title, table in (
        ("Training step", time_table(run, "step")),
        ("Forward", time_table(run, "forward")),
        ("Memory", memory_table(run)),
        ("Figures to reach", figures_table(run)),
        ("Left out", left_out(run)),
    ):
        if table:
            parts.append(f"{title}\n\n{table}")
    return "\n\n".join(parts)
