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
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks import options, records, tables
from benchmarks.cases import Case, build_case, build_inputs, norm_bounds
from benchmarks.checked import agreeing_cases
from benchmarks.harness import measure, timer_for
from benchmarks.options import DTYPES
from benchmarks.peers import DEFAULT_PEERS, PEERS, build_peers
from benchmarks.processes import Calls, Process, generations, measure_processes
from benchmarks.roofline import measure_peaks
from benchmarks.shapes import NETWORKS, SHAPES, BlockShape

WARMUP_ROUNDS = 1


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default is resolved, `--quick` only changes defaults."""
    parser = options.parser("bench_block", __doc__ or "")
    options.add_quick(parser, "two shapes, batch 2, 3 rounds, no peers")
    options.add_processes(parser)
    options.add_shapes(parser)
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS,
        metavar="PEER",
        help=f"what else to time, of: {', '.join(PEERS)} (default: {', '.join(DEFAULT_PEERS)})",
    )
    parser.add_argument("--batch", type=options.positive, help="images (default: 16)")
    parser.add_argument(
        "--rounds", type=options.positive, help="timed runs of every variant (default: 20)"
    )
    args = parser.parse_args(argv)
    names = [shape.name for shape in NETWORKS[args.network]]
    options.resolve(
        parser,
        args,
        shapes=(names, options.QUICK_SHAPES),
        batch=(16, 2),
        rounds=(20, 3),
        peers=(DEFAULT_PEERS, []),
    )
    parts = ["block", args.device.type, args.dtype, f"batch{args.batch}"]
    options.default_output(args, *options.named(args, parts))
    return args


Timings = dict[str, dict[str, float]]


def in_one_process(cases: Mapping[str, Case], args: argparse.Namespace) -> tuple[Timings, Timings]:
    """Times of forward and of a whole step, by variant."""

    def timings(calls: dict[str, Callable[[], object]]) -> Timings:
        measured = measure(calls, args.rounds, WARMUP_ROUNDS, timer_for(args.device))
        return {name: dataclasses.asdict(timing) for name, timing in measured.items()}

    forward = timings({name: case.forward for name, case in cases.items()})
    return forward, timings({name: case.step for name, case in cases.items()})


def in_processes(
    names: Iterable[str], shape: BlockShape, args: argparse.Namespace
) -> tuple[Timings, Timings]:
    """The same, each variant in processes of its own; with page faults."""
    starts = {name: partial(Process, build_calls, name, shape, args) for name in names}
    found = measure_processes(starts, ["forward", "step"], args.rounds, WARMUP_ROUNDS)
    forward, step = (
        {name: measured.calls[call] for name, measured in found.items()}
        for call in ("forward", "step")
    )
    return forward, step


def build_calls(name: str, shape: BlockShape, args: argparse.Namespace) -> Calls:
    """What the process of a variant can run."""
    inputs = build_inputs(shape, args.batch, DTYPES[args.dtype], args.device, bias=args.bias)
    case = PEERS[name](inputs) if name in PEERS else build_case(inputs, name)
    return {"forward": case.forward, "step": case.step}


def measure_shape(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per variant of a shape, and one without times per peer that was left out."""
    shape = SHAPES[name]
    bounds = norm_bounds(DTYPES[args.dtype], args.device)
    inputs, cases, expected = agreeing_cases(shape, args, bounds)
    peers, left_out = build_peers(args.peers, inputs, bounds, expected)
    cases |= peers
    for name, reason in left_out.items():
        print(f"{shape.name}: {name} is left out: {reason}", file=sys.stderr)
    del expected
    if args.processes:
        forward, step = in_processes(cases, shape, args)
    else:
        forward, step = in_one_process(cases, args)
    rows: list[dict[str, Any]] = [
        {
            "shape": shape.name,
            "variant": name,
            "forward": forward[name],
            "step": step[name],
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
    settings = {
        "batch": args.batch,
        "bias": args.bias,
        "rounds": args.rounds,
        "processes": generations(args.rounds) if args.processes else 0,
    }
    extra = {"peaks": dataclasses.asdict(peaks)}
    return options.collect("block", args, args.shapes, measure_shape, settings, **extra)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the tables, write the records; 0, or 1 where the variants disagree."""
    return options.report(parse_arguments(argv), run, tables.text)


if __name__ == "__main__":
    sys.exit(main())
