"""`python -m benchmarks.kernel_report`: what the kernels cost, from the compiler and a model.

Needs no GPU. Two tables, printed and written as CSV: every distinct kernel with its configuration
and what the compiler made of it for each architecture; and for every ResNet-50 shape the bytes,
operations and floor of each kernel call of a training step, with the sum over the network; and
what Hopper takes to issue its instructions (issue.py).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.compiled import Specialisation, Usage, compile_for, distinct, specialise, step_calls
from benchmarks.issue import issue_seconds
from benchmarks.records import RESULTS
from benchmarks.shapes import RESNET50, BlockShape
from benchmarks.tables import markdown
from benchmarks.traffic import fused_bytes
from fused_bottleneck.kernels.launch import Call

ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Machine:
    """A GPU's peaks: bytes per second of a copy, operations per second of products ("exact": in
    float32 without tensor cores)."""

    bandwidth: float
    rates: tuple[tuple[str, float], ...] = (
        ("bf16", 790e12),
        ("fp16", 790e12),
        ("fp32", 395e12),
        ("exact", 60e12),
    )

    def floor(self, dtype: str, moved: float, operations: float) -> float:
        """Seconds: the larger of the time to move the bytes and of that to do the operations."""
        return max(moved / self.bandwidth, operations / dict(self.rates)[dtype])


# Measured on an H200; the H100 (SXM) has its multiprocessors, and a memory of 3.35 TB/s nominally.
MACHINES = {"H200": Machine(4.3e12), "H100": Machine(3.0e12)}


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor has for its programs, in bytes, registers and warps."""

    shared: int
    registers: int = 65_536
    warps: int = 64
    programs: int = 32


MULTIPROCESSORS = {
    80: Multiprocessor(shared=167_936),
    90: Multiprocessor(shared=233_472),
    100: Multiprocessor(shared=233_472),
}
RESERVED_SHARED = 1024  # of every program


def occupancy(usage: Usage, num_warps: int, architecture: int) -> int:
    """Programs that fit on one multiprocessor."""
    machine = MULTIPROCESSORS[architecture]
    registers = -(-usage.registers // 8) * 8 * 32 * num_warps
    return min(
        machine.registers // registers,
        machine.shared // (usage.shared + RESERVED_SHARED),
        machine.warps // num_warps,
        machine.programs,
    )


def _values(call: Call) -> dict[str, Any]:
    return dict(zip(call.kernel.arg_names, call.arguments, strict=False)) | call.constants


_STRIDED_OPERAND = {"gram": "y_ptr"} | dict.fromkeys(
    ("tail_forward", "tail_wgrad", "input_dgrad"), "x_ptr"
)


def moved_bytes(call: Call, name: str) -> float:
    """Bytes of the tensors that a call reads or writes, each once.

    An operand that is read at a stride counts with the pixels that are read.
    """
    values = _values(call)
    strided = _STRIDED_OPERAND.get(name)
    total, seen = 0.0, set()
    for argument, value in values.items():
        if not isinstance(value, Tensor) or id(value) in seen:
            continue
        seen.add(id(value))
        share = values["SH"] * values["SW"] if argument == strided else 1
        total += value.numel() * value.element_size() / share
    return total


EXACT = ("weight_cov", "operand_product")  # products in exact float32

_OPERATIONS: dict[str, Callable[[dict[str, Any]], float]] = {
    "conv1x1_forward": lambda v: 2 * v["P"] * v["C"] * v["N"],
    "conv2d_forward": lambda v: 2 * v["Q"] * v["C"] * v["N"] * v["KH"] * v["KW"],
    "gram": lambda v: v["Q"] * v["K"] * (v["K"] + v["BLOCK"]),
    "tail_forward": lambda v: 2 * v["Q"] * v["N"] * (v["M"] + v["C"]),
    "tail_wgrad": lambda v: 2 * v["Q"] * v["W"] * (v["K"] + v["C"]),
    "tail_dgrad": lambda v: 2 * v["Q"] * v["N"] * (v["W"] + v["N"]),
    "conv2d_dgrad": lambda v: (
        2 * v["images"] * v["OH"] * v["OW"] * v["C"] * v["N"] * v["KH"] * v["KW"]
    ),
    "conv_wgrad": lambda v: 2 * v["Q"] * v["M"] * v["C"] * v["KH"] * v["KW"],
    "input_dgrad": lambda v: _input_dgrad_operations(v),
} | dict.fromkeys(EXACT, lambda v: 2 * v["W"] * v["K"] ** 2)


def _input_dgrad_operations(v: dict[str, Any]) -> float:
    pixels = v["images"] * v["H"] * v["W_IN"]
    strided = pixels / (v["SH"] * v["SW"])
    extra = strided * (v["W"] + v["N"]) if v["RESIDUAL"] == "downsample" else 0
    return 2 * v["N"] * (pixels * v["M"] + extra)


def operations(call: Call, name: str) -> float:
    """Operations of a call's products, two per multiply-add; 0 for the kernels without one."""
    count = _OPERATIONS.get(name)
    return 0.0 if count is None else float(count(_values(call)))


Row = dict[str, Any]


def compiled_rows(dtype: str, architectures: Sequence[int], batch: int) -> list[Row]:
    """A row for each distinct kernel of ResNet-50's blocks and architecture."""
    rows = []
    for architecture in architectures:
        calls = []
        for shape in RESNET50:
            forward, backward = step_calls(shape, batch, DTYPES[dtype], architecture)
            calls += forward + backward
        for spec in distinct(calls):
            rows.append(_compiled_row(spec, architecture, dtype))
    return rows


def _compiled_row(spec: Specialisation, architecture: int, dtype: str) -> Row:
    usage = compile_for(spec, architecture)
    return {
        "kernel": spec.name,
        "variant": spec.variant,
        "blocks": spec.blocks,
        "dtype": dtype,
        "architecture": f"sm_{architecture}",
        "registers": usage.registers,
        "spills": usage.stack,
        "shared": usage.shared,
        "programs": occupancy(usage, spec.num_warps, architecture),
        "wgmma": usage.wgmma,
    }


def call_rows(dtype: str, batch: int, machine: Machine, issue: bool = False) -> list[Row]:
    """A row for each kernel call of one training step of each shape.

    issue: with the time to issue its instructions on Hopper, which compiles it.
    """
    rows = []
    for shape in RESNET50:
        forward, backward = step_calls(shape, batch, DTYPES[dtype])
        for call in forward + backward:
            row = _call_row(shape, call, dtype, machine)
            if issue:
                row["issue_us"] = 1e6 * issue_seconds(call, _values(call))
            rows.append(row)
    return rows


def _call_row(shape: BlockShape, call: Call, dtype: str, machine: Machine) -> Row:
    spec = specialise(call)
    moved, count = moved_bytes(call, spec.name), operations(call, spec.name)
    rate = "exact" if spec.name in EXACT else dtype
    return {
        "shape": shape.name,
        "count": shape.count,
        "kernel": spec.name,
        "variant": spec.variant,
        "blocks": spec.blocks,
        "dtype": dtype,
        "programs": call.grid[0],
        "bytes": moved,
        "operations": count,
        "floor_us": 1e6 * machine.floor(rate, moved, count),
    }


_SUMMED = ("bytes", "operations", "floor_us")


def shape_rows(rows: Sequence[Row], dtype: str, batch: int) -> list[Row]:
    """The sums of a step of each shape, and of the network's sixteen blocks."""
    itemsize = DTYPES[dtype].itemsize
    summed = [key for key in (*_SUMMED, "issue_us") if key in rows[0]]
    sums = []
    for shape in RESNET50:
        mine = [row for row in rows if row["shape"] == shape.name]
        total = {key: sum(row[key] for row in mine) for key in summed}
        plan = fused_bytes(shape, batch, itemsize)
        sums.append({"shape": shape.name, "count": shape.count, **total, "plan_bytes": plan})
    keys = [*summed, "plan_bytes"]
    network = {key: sum(row[key] * row["count"] for row in sums) for key in keys}
    return [*sums, {"shape": "all sixteen blocks", "count": 1, **network}]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows, which have the same keys, with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table: bytes as MB, operations as GFLOP."""
    scale = {"bytes": 1e6, "plan_bytes": 1e6, "operations": 1e9}
    names = {"bytes": "MB", "plan_bytes": "MB of the plan", "operations": "GFLOP"}
    cells = [
        [
            f"{value / scale.get(key, 1):.1f}" if isinstance(value, float) else str(value)
            for key, value in row.items()
        ]
        for row in rows
    ]
    return markdown([names.get(key, key) for key in rows[0]], cells)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--machine", choices=MACHINES, default="H200")
    parser.add_argument("--architectures", type=int, nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the CSV files")
    options = parser.parse_args(arguments)
    machine, compiles = MACHINES[options.machine], bool(options.architectures)
    calls = call_rows(options.dtype, options.batch, machine, issue=compiles)
    sums = shape_rows(calls, options.dtype, options.batch)
    tables = {"kernel_calls": calls, "kernel_floors": sums}
    if options.architectures:
        compiled = compiled_rows(options.dtype, options.architectures, options.batch)
        tables = {"kernels": compiled, **tables}
    for name, rows in tables.items():
        print(table(rows), end="\n\n")
        write_csv(rows, options.output / f"{name}_{options.dtype}.csv")


if __name__ == "__main__":
    main()
