"""Device time of the tail's junctions (docs/algebra.md), one launch against the ways without it.

    python -m benchmarks.bench_junctions                    # on a GPU; prints a table
    python -m benchmarks.bench_junctions --device cpu       # does it run? CPU's twins of the ops

Variants: "launch", this library's op; "plain", torch operations as the stages take them without
it; "product", the matrix product alone as torch takes it in float32. On a GPU each is replayed from
a CUDA graph of many calls: the host's part is none.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.harness import Variant, measure, timer_for
from benchmarks.tables import markdown
from fused_bottleneck import extension
from fused_bottleneck.junctions import JunctionStages
from fused_bottleneck.stages import Stages

SIZES = [(64, 256), (128, 512), (256, 1024), (512, 2048), (256, 512), (512, 1024), (1024, 2048)]
CALLS = 20  # in a graph
COUNT = 12544


def variants(
    channels: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Variant]:
    """The variants of both junctions of a unit [channels] -> [width], by name."""
    torch.manual_seed(0)

    def vector(size: int) -> Tensor:
        return torch.rand(size, device=device) + 0.5

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device) / columns**0.5

    weight = matrix(width, channels).to(dtype)[:, :, None, None]
    cov = matrix(channels, channels)
    cov = cov @ cov.t()
    gamma, beta, invstd, offset, sum_g = (vector(width) for _ in range(5))
    centre, mean_d = vector(channels), vector(channels)
    a, s, wide = weight.flatten(1), matrix(width, channels), weight.flatten(1).float()
    forward = (weight, gamma, beta, None, 1e-5, centre, mean_d, cov)
    backward = (weight, gamma, invstd, offset, centre, mean_d, s, a, s, sum_g, COUNT)
    mine, plain = JunctionStages(), Stages()
    return {
        "fold launch": lambda: mine.fold(*forward),
        "fold plain": lambda: plain.fold(*forward),
        "fold product": lambda: wide @ cov,
        "fold_backward launch": lambda: mine.fold_backward(*backward),
        "fold_backward plain": lambda: plain.fold_backward(*backward),
        "fold_backward product": lambda: wide.t() @ s,
    }


def captured(run: Variant) -> Variant:
    """CALLS calls as one replay of a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return graph.replay


def microseconds(
    channels: int, width: int, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, float]:
    """The median device time of a call of each variant."""
    runs = variants(channels, width, dtype, device)
    calls = 1
    if device.type == "cuda":
        runs, calls = {name: captured(run) for name, run in runs.items()}, CALLS
    timings = measure(runs, rounds, 2, timer_for(device))
    return {name: 1e6 * timing.median / calls for name, timing in timings.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and extension.why_no_cuda():
        parser.error(extension.why_no_cuda())
    for dtype in (torch.float32, torch.bfloat16):
        rows = []
        for channels, width in SIZES:
            times = microseconds(channels, width, dtype, options.device, options.rounds)
            rows.append([f"{channels}, {width}", *(f"{time:.1f}" for time in times.values())])
        print(f"\n{dtype}, microseconds a call\n")
        print(markdown(["K, W", *times], rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
