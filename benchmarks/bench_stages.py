"""Each of the ten stages of a fused training step: time, rates, and share of what is possible.

    python -m benchmarks.bench_stages                    # ResNet-50's blocks on the CPU
    python -m benchmarks.bench_stages --quick
    python -m benchmarks.bench_stages --device cuda --dtype bfloat16 --batch 256

A stage is timed where it runs in the step, with everything that belongs to it: forming the
coefficients of the next stage too where that is a stage's call. On CUDA its operands come from
memory, not from the L2 cache. Where the CPU takes the product way, F3 and F4 are one. A block that
disagrees with the plain one is not reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import options, records, stage_report
from benchmarks.cases import norm_bounds
from benchmarks.checked import agreeing_cases
from benchmarks.harness import measure, summarize, timer_for
from benchmarks.options import DTYPES
from benchmarks.roofline import measure_peaks
from benchmarks.shapes import NETWORKS, SHAPES, BlockShape
from benchmarks.traffic import Cost, fused_stages
from benchmarks.watch import clock_for, watched
from fused_bottleneck.tail_plan import tail_plans

VARIANT = "fused channels_last"
WARMUP = 2
TAIL = "F3+F4"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default is resolved."""
    parser = options.parser("bench_stages", __doc__ or "")
    options.add_quick(parser, "two shapes, batch 2, 3 rounds")
    options.add_shapes(parser)
    parser.add_argument("--batch", type=options.positive, help="images (default: 16)")
    parser.add_argument("--rounds", type=options.positive, help="timed steps (default: 20)")
    args = parser.parse_args(argv)
    names = [shape.name for shape in NETWORKS[args.network]]
    shapes = (names, options.QUICK_SHAPES)
    options.resolve(parser, args, shapes=shapes, batch=(16, 2), rounds=(20, 3))
    parts = ["stages", args.device.type, args.dtype, f"batch{args.batch}"]
    options.default_output(args, *options.named(args, parts))
    return args


def takes_product(shape: BlockShape, batch: int, device: str, dtype: torch.dtype) -> bool:
    """Whether a unit of the block's tail goes the product way there (fused_bottleneck/tail.py)."""
    if device != "cpu":
        return False  # no tensors of a device are made to ask

    def tensor(*sizes: int) -> torch.Tensor:
        return torch.empty((), dtype=dtype).expand(sizes)

    inputs = [shape.width, *([shape.in_channels] if shape.downsample else [])]
    weights = [tensor(shape.out_channels, channels, 1, 1) for channels in inputs]
    x, y1, y2 = (
        tensor(batch, channels, size, size)
        for channels, size in [
            (shape.in_channels, shape.size),
            (shape.width, shape.size),
            (shape.width, shape.out_size),
        ]
    )
    return not all(p.gram for p in tail_plans(weights, [True] * len(inputs), x, y1, y2, None))


def join_tail(
    costs: dict[str, Cost], samples: dict[str, list[float]]
) -> tuple[dict[str, Cost], dict[str, list[float]]]:
    """F3 and F4 as one: in the product way the last convolution runs before its statistics."""
    first, second = costs["F3"], costs["F4"]
    joined = Cost(first.moved + second.moved, first.operations + second.operations)
    names = [name for name in costs if name != "F4"]
    seconds = [sum(pair) for pair in zip(samples["F3"], samples["F4"], strict=True)]
    return (
        {TAIL if name == "F3" else name: joined if name == "F3" else costs[name] for name in names},
        {**samples, TAIL: seconds},
    )


def measure_shape(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per stage, and one of the whole step, timed without looking into it."""
    shape = SHAPES[name]
    bounds = norm_bounds(DTYPES[args.dtype], args.device)
    _, cases, _ = agreeing_cases(shape, args, bounds)
    case = cases[VARIANT]
    del cases
    step = measure({VARIANT: case.step}, args.rounds, WARMUP, timer_for(args.device))[VARIANT]
    clock = clock_for(args.device)
    samples: dict[str, list[float]] = {}
    with watched(clock):
        for index in range(WARMUP + args.rounds):
            case.step()
            for label, seconds in clock.seconds().items():
                if index >= WARMUP:
                    samples.setdefault(label, []).append(seconds)
    costs = fused_stages(shape, args.batch, DTYPES[args.dtype].itemsize)
    if takes_product(shape, args.batch, args.device.type, DTYPES[args.dtype]):
        costs, samples = join_tail(costs, samples)
    rows: list[dict[str, Any]] = [
        {
            "shape": shape.name,
            "stage": name,
            **dataclasses.asdict(summarize(samples[name])),
            **dataclasses.asdict(cost),
        }
        for name, cost in costs.items()
    ]
    return [*rows, {"shape": shape.name, "stage": "step", **dataclasses.asdict(step)}]


def run(args: argparse.Namespace) -> records.Run:
    """Measure the peaks, then every shape; raises Refused where a block disagrees."""
    peaks = measure_peaks(args.device, DTYPES[args.dtype], args.batch, args.rounds)
    settings = {"batch": args.batch, "bias": args.bias, "rounds": args.rounds}
    extra = {"peaks": dataclasses.asdict(peaks)}
    return options.collect("stages", args, args.shapes, measure_shape, settings, **extra)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, write the records; 0, or 1 where the check failed."""
    return options.report(parse_arguments(argv), run, stage_report.text)


if __name__ == "__main__":
    sys.exit(main())
