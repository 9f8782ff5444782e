"""How the cost of a training step of a block grows with batch, resolution and width.

    python -m benchmarks.bench_scaling            # CPU, float32
    python -m benchmarks.bench_scaling --quick
    python -m benchmarks.bench_scaling --device cuda --dtype bfloat16

Where the time is work it grows in proportion to the operations; what is left at no work is the
fixed overhead of a step. A block that disagrees with the plain one is not reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import options, records, scaling_report
from benchmarks.cases import norm_bounds
from benchmarks.checked import agreeing_cases
from benchmarks.harness import measure, timer_for
from benchmarks.options import DTYPES
from benchmarks.shapes import BlockShape
from benchmarks.traffic import step_flops

VARIANTS = ("reference channels_last", "fused channels_last")
WARMUP_ROUNDS = 2


class Point(NamedTuple):
    """One block: what is varied, and all its sizes."""

    axis: str
    batch: int
    size: int
    width: int

    @property
    def value(self) -> int:
        """The size that is varied."""
        return getattr(self, self.axis)

    @property
    def shape(self) -> BlockShape:
        """An identity block of that width and size."""
        return BlockShape(4 * self.width, self.width, self.size, 1, False, 1)

    def __str__(self) -> str:
        return f"{self.axis} {self.value}"


# (axis, its values, the base that the other two sizes are taken from)
BASES = {"cpu": Point("", 8, 28, 64), "cuda": Point("", 128, 56, 64)}
VALUES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "batch": (1, 2, 4, 8, 16, 32),
        "size": (7, 14, 28, 56),
        "width": (16, 32, 64, 128, 256),
    },
    "cuda": {
        "batch": (1, 4, 16, 64, 256),
        "size": (7, 14, 28, 56, 112),
        "width": (16, 32, 64, 128, 256),
    },
}
QUICK_VALUES = 2


def points(device: str, quick: bool) -> list[Point]:
    """The blocks to measure, each axis from small to large."""
    base = BASES[device]
    return [
        base._replace(axis=axis, **{axis: value})
        for axis, values in VALUES[device].items()
        for value in (values[:QUICK_VALUES] if quick else values)
    ]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default is resolved."""
    parser = options.parser("bench_scaling", __doc__ or "")
    options.add_quick(parser, "two values an axis, 3 rounds")
    parser.add_argument("--rounds", type=options.positive, help="timed steps (default: 15)")
    args = parser.parse_args(argv)
    options.resolve(parser, args, rounds=(15, 3))
    args.bias = False
    options.default_output(args, "scaling", args.device.type, args.dtype)
    return args


def measure_point(point: Point, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per variant."""
    bounds = norm_bounds(DTYPES[args.dtype], args.device)
    block = argparse.Namespace(**{**vars(args), "batch": point.batch})
    _, cases, _ = agreeing_cases(point.shape, block, bounds)
    steps = {name: cases[name].step for name in VARIANTS}
    timings = measure(steps, args.rounds, WARMUP_ROUNDS, timer_for(args.device))
    return [
        {
            **point._asdict(),
            "variant": name,
            "operations": step_flops(point.shape, point.batch),
            **dataclasses.asdict(timings[name]),
        }
        for name in VARIANTS
    ]


def run(args: argparse.Namespace) -> records.Run:
    """Measure every point; raises Refused where a block disagrees."""
    todo = points(args.device.type, args.quick)
    settings = {"bias": args.bias, "rounds": args.rounds}
    return options.collect("scaling", args, todo, measure_point, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, write the records; 0, or 1 where the check failed."""
    return options.report(parse_arguments(argv), run, scaling_report.text)


if __name__ == "__main__":
    sys.exit(main())
