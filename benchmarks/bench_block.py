"""Time and memory of one training step of a block: fused, plain, and what else one could pick.

    python -m benchmarks.bench_block            # the eight blocks of ResNet-50, batch 16, float32
    python -m benchmarks.bench_block --quick    # two small ones: does it run?
    python -m benchmarks.bench_block --device cuda --dtype bfloat16 --batch 256 --no-bias

A shape whose fused and plain variants do not agree is not reported: the run ends with exit status
1. A peer that is missing or disagrees is left out, and the record says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks import options, records, tables
from benchmarks.cases import (
    BASELINE,
    Case,
    Inputs,
    build_cases,
    build_inputs,
    composed_reasons,
    disagreements,
    norm_bounds,
)
from benchmarks.harness import measure, progress, timer_for
from benchmarks.options import DTYPES, Refused
from benchmarks.peers import PEERS, build_peers, default_peers
from benchmarks.roofline import measure_peaks
from benchmarks.shapes import NETWORKS, SHAPES, BlockShape

QUICK_SHAPES = ["256-64@56", "1024-512@14->7-ds"]
WARMUP_ROUNDS = 2
SEEDS = 3


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default is resolved, `--quick` only changes defaults."""
    parser = options.parser("bench_block", (__doc__ or "").split("\n")[0])
    options.add_quick(parser, "two shapes, batch 2, 3 rounds, no peers")
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default="resnet50",
        help="whose blocks are measured (default: %(default)s)",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        metavar="SHAPE",
        help=f"which blocks instead, of: {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        metavar="PEER",
        help=f"what else to time, of: {', '.join(PEERS)} (default: all that run in a few minutes)",
    )
    parser.add_argument(
        "--bias",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="convolutions with a bias, as the plain block has by default and networks have not",
    )
    parser.add_argument("--batch", type=options.positive, help="images (default: 16)")
    parser.add_argument(
        "--rounds", type=options.positive, help="timed runs of every variant (default: 20)"
    )
    args = parser.parse_args(argv)
    names = [shape.name for shape in NETWORKS[args.network]]
    peers = default_peers(args.device)
    options.resolve(
        parser,
        args,
        shapes=(names, QUICK_SHAPES),
        batch=(16, 2),
        rounds=(20, 3),
        peers=(peers, []),
    )
    parts = ["block", args.device.type, args.dtype, f"batch{args.batch}"]
    parts += [args.network] if args.network != "resnet50" else []
    options.default_output(args, *parts, *([] if args.bias else ["nobias"]))
    return args


def agreeing_cases(
    shape: BlockShape, args: argparse.Namespace, bounds: tuple[float, float]
) -> tuple[Inputs, dict[str, Case], dict[str, Tensor]]:
    """Inputs, the reference and the fused variants, and the baseline's results.

    Raises Refused where a variant would run unfused or disagrees. A gradient disagrees if it does
    so on every one of `SEEDS` data sets: where a tensor is small, a single ReLU whose argument is
    within rounding of zero moves its gradients by a per cent, but not on every data set.
    """
    for seed in range(SEEDS):
        inputs = build_inputs(
            shape, args.batch, DTYPES[args.dtype], args.device, bias=args.bias, seed=seed
        )
        cases = build_cases(inputs)
        expected = cases[BASELINE].results()
        problems = composed_reasons(cases)
        if not problems:
            found = disagreements(cases, bounds, expected)
            problems = [line for lines in found.values() for line in lines]
        if not problems:
            return inputs, cases, expected
        if not all(": grad" in line for line in problems):
            break
    raise Refused("\n".join([f"{shape.name} is not reported:", *problems]))


def measure_shape(shape: BlockShape, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per variant of `shape`, and one without times per peer that was left out."""
    bounds = norm_bounds(DTYPES[args.dtype], args.device)
    inputs, cases, expected = agreeing_cases(shape, args, bounds)
    peers, left_out = build_peers(args.peers, inputs, bounds, expected)
    cases |= peers
    for name, reason in left_out.items():
        print(f"{shape.name}: {name} is left out: {reason}", file=sys.stderr)
    del expected
    timer = timer_for(args.device)
    forward = measure(
        {k: case.forward for k, case in cases.items()}, args.rounds, WARMUP_ROUNDS, timer
    )
    step = measure({k: case.step for k, case in cases.items()}, args.rounds, WARMUP_ROUNDS, timer)
    rows: list[dict[str, Any]] = [
        {
            "shape": shape.name,
            "variant": name,
            "forward": dataclasses.asdict(forward[name]),
            "step": dataclasses.asdict(step[name]),
            "saved_bytes": case.saved_bytes(),
            "peak_bytes": case.peak_bytes(),
        }
        for name, case in cases.items()
    ]
    rows += [
        {"shape": shape.name, "variant": name, "left_out": why} for name, why in left_out.items()
    ]
    return rows


def run(args: argparse.Namespace) -> records.Run:
    """Measure the peaks, then every shape of `args`; raises Refused where variants disagree."""
    peaks = measure_peaks(args.device, DTYPES[args.dtype], args.batch, args.rounds)
    rows = []
    for name in progress(args.shapes, "blocks", "block"):
        rows += measure_shape(SHAPES[name], args)
    settings = {"batch": args.batch, "bias": args.bias, "rounds": args.rounds}
    return options.measured("block", args, rows, settings, peaks=dataclasses.asdict(peaks))


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the tables, write the records; 0, or 1 where the variants disagree."""
    return options.report(parse_arguments(argv), run, tables.text)


if __name__ == "__main__":
    sys.exit(main())
