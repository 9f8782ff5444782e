"""Tune the GPU kernels for a network's blocks, one shape after the other, the heaviest first.

    python -m benchmarks.tune --batch 256 --dtype bfloat16

Each shape is kept as soon as it is tuned: a run that is cut short has not run for nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import fused_bottleneck
from benchmarks.options import DTYPES, positive
from benchmarks.shapes import NETWORKS, BlockShape
from benchmarks.traffic import fused_bytes


def by_weight(shapes: Sequence[BlockShape]) -> list[BlockShape]:
    """The shapes by the bytes that all their blocks together move, the heaviest first."""
    return sorted(shapes, key=lambda s: s.count * fused_bytes(s, 1, 1), reverse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Tune; 0, or 1 without a CUDA device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--network", choices=NETWORKS, default="resnet50")
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tuning needs a CUDA device", file=sys.stderr)
        return 1
    for shape in by_weight(NETWORKS[args.network]):
        block = fused_bottleneck.BlockShape(
            args.batch, shape.in_channels, shape.width, shape.size, shape.stride
        )
        count = fused_bottleneck.tune([block], dtype=DTYPES[args.dtype])
        print(f"{shape.name}: tuned {count} kernels", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
