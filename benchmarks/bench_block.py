"""Time and memory of one training step of a block: reference and fused, in both layouts.

    python -m benchmarks.bench_block            # the eight blocks of ResNet-50, batch 16, float32
    python -m benchmarks.bench_block --quick    # two small ones: does it run?

A shape whose variants do not agree is not reported: the run ends with exit status 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import records, tables
from benchmarks.cases import (
    NORM_BOUNDS,
    Case,
    build_cases,
    composed_reasons,
    disagreements,
    peak_bytes,
    saved_bytes,
)
from benchmarks.harness import Timing, measure, timer_for
from benchmarks.roofline import Peaks, measure_peaks
from benchmarks.shapes import SHAPES, BlockShape
from benchmarks.traffic import convolution_flops, step_flops

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NORM_BOUNDS}
QUICK_SHAPES = ["256-64@56", "1024-512@14->7-ds"]
WARMUP_ROUNDS = 2


class Refused(Exception):
    """The measurement would be of something else than it says."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default is resolved, `--quick` only changes defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_block",
        description="Time the fused block against the reference, interleaved in one run.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="two shapes, batch 2, 3 rounds, nothing written"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        metavar="SHAPE",
        help=f"which blocks, of: {', '.join(SHAPES)} (default: all)",
    )
    parser.add_argument("--batch", type=int, help="images (default: 16)")
    parser.add_argument("--rounds", type=int, help="timed runs of every variant (default: 20)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file to write (default: benchmarks/results/block-DEVICE-DTYPE-batchN.json)",
    )
    args = parser.parse_args(argv)
    if args.shapes is None:
        args.shapes = QUICK_SHAPES if args.quick else list(SHAPES)
    args.batch = (2 if args.quick else 16) if args.batch is None else args.batch
    args.rounds = (3 if args.quick else 20) if args.rounds is None else args.rounds
    for name in ("batch", "rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name}: must be at least 1, got {value}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this torch finds no CUDA device")
    if args.output is None and not args.quick:
        name = f"block-{args.device.type}-{args.dtype}-batch{args.batch}.json"
        args.output = records.RESULTS / name
    return args


def measure_shape(
    shape: BlockShape, cases: dict[str, Case], batch: int, dtype: str, rounds: int, peaks: Peaks
) -> list[dict[str, Any]]:
    """One record per variant of `shape`; raises Refused where the variants disagree."""
    problems = composed_reasons(cases) or disagreements(cases, DTYPES[dtype])
    if problems:
        raise Refused("\n".join([f"{shape.name} is not reported:", *problems]))
    timer = timer_for(next(iter(cases.values())).x.device)
    forward = measure({k: case.forward for k, case in cases.items()}, rounds, WARMUP_ROUNDS, timer)
    step = measure({k: case.step for k, case in cases.items()}, rounds, WARMUP_ROUNDS, timer)
    return [
        {
            "shape": shape.name,
            "variant": name,
            "layout": name.split()[-1],
            "dtype": dtype,
            "batch": batch,
            "forward": _timing(forward[name], convolution_flops(shape, batch), peaks),
            "step": _timing(step[name], step_flops(shape, batch), peaks),
            "saved_bytes": saved_bytes(case),
            "peak_bytes": peak_bytes(case),
        }
        for name, case in cases.items()
    ]


def _timing(timing: Timing, flops: float, peaks: Peaks) -> dict[str, float]:
    """`timing` with its distance from the floor: the convolutions alone, at the best rate seen."""
    floor = flops / peaks.convolution_rate
    return {**dataclasses.asdict(timing), "percent_of_floor": 100 * floor / timing.median}


def run(args: argparse.Namespace) -> records.Run:
    """Measure the peaks, then every shape of `args`; raises Refused where variants disagree."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    peaks = measure_peaks(args.device, DTYPES[args.dtype], args.batch, args.rounds)
    rows = []
    for name in args.shapes:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        cases = build_cases(SHAPES[name], args.batch, DTYPES[args.dtype], args.device)
        rows += measure_shape(SHAPES[name], cases, args.batch, args.dtype, args.rounds, peaks)
    return {
        "environment": records.environment(args.device),
        "settings": {
            "device": args.device.type,
            "dtype": args.dtype,
            "batch": args.batch,
            "threads": torch.get_num_threads(),
            "rounds": args.rounds,
        },
        "peaks": dataclasses.asdict(peaks),
        "records": rows,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the tables, write the records; 0, or 1 where the variants disagree."""
    args = parse_arguments(argv)
    try:
        result = run(args)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 1
    print(tables.caption(result))
    for title, table in (
        ("Training step", tables.time_table(result, "step")),
        ("Forward", tables.time_table(result, "forward")),
        ("Kept for backward", tables.memory_table(result)),
        ("Figures to reach", tables.figures_table(result)),
    ):
        print(f"\n{title}\n\n{table}")
    if args.output is not None:
        records.write(result, args.output)
        print(f"\nwritten to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
