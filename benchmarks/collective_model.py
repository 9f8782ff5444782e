"""What synchronised statistics cost by arithmetic: bytes and seconds of a block's collectives.

The latency-bandwidth model is that by which NCCL chooses its algorithms (NVIDIA/nccl,
src/graph/tuning.cc): a tree of the nodes with a chain of the GPUs in each, protocol LL, which
small messages take.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence

from benchmarks import records
from benchmarks.shapes import RESNET50, BlockShape
from benchmarks.tables import markdown

DOUBLE, SINGLE = 8, 4  # bytes: of a sum of ours, of one of nn.SyncBatchNorm's
GPUS_PER_NODE = 8
# NCCL's own constants, in seconds: of a collective, of a hop over NVLink, of one over the network.
BASE, NVLINK_HOP, NETWORK_HOP = 6.8e-6, 0.6e-6, 5.0e-6
RING_BASE, RING_NETWORK_HOP = 6.6e-6, 2.7e-6
# Bytes a second and direction of a GPU: NVLink 4 (900 GB/s both ways), NDR InfiniBand (400 Gb/s).
NVLINK, NETWORK = 450e9, 50e9
LL_SHARE = 0.5  # of the bandwidth: every 8 bytes travel with a flag of 8
GPUS = (8, 64, 1024)
BATCHES = (32, 128, 256, 512)
FLOORS = records.RESULTS / "kernel_floors_bf16.csv"
FLOOR_BATCH = 256
RESNET50_PARAMETERS = 25_557_032


def forward_junctions(shape: BlockShape) -> list[int]:
    """Numbers that each all-reduce of the forward sums: after conv1, after conv2, at the tail.

    Per normalisation a count, means and mean squares of its channels; at the tail also the mean of
    the convolution's operand.
    """
    narrow = 1 + 2 * shape.width
    wide = 1 + 2 * shape.out_channels
    tail = wide + shape.width
    if shape.downsample:
        tail += wide + shape.in_channels
    return [narrow, narrow, tail]


def backward_junctions(shape: BlockShape) -> list[int]:
    """The same of the backward: sums of g and of g xhat; the tail's share that of g."""
    tails = 2 if shape.downsample else 1
    return [(1 + tails) * shape.out_channels, 2 * shape.width, 2 * shape.width]


def junctions(shape: BlockShape) -> list[int]:
    """All of a step's."""
    return [*forward_junctions(shape), *backward_junctions(shape)]


def _norm_channels(shape: BlockShape) -> list[int]:
    wide = [shape.out_channels] * (2 if shape.downsample else 1)
    return [shape.width, shape.width, *wide]


def step_bytes(shape: BlockShape) -> int:
    """Bytes that a rank's all-reduces of a step sum."""
    return DOUBLE * sum(junctions(shape))


def nn_step_bytes(shape: BlockShape, gpus: int) -> int:
    """Bytes that end up on a rank by nn.SyncBatchNorm's collectives: of every rank a mean, a
    variance and a count in forward; two sums in backward."""
    channels = _norm_channels(shape)
    return SINGLE * sum(gpus * (2 * c + 1) + 2 * c for c in channels)


def _nodes(gpus: int) -> int:
    return -(-gpus // GPUS_PER_NODE)


def _bandwidth(gpus: int) -> float:
    return NVLINK if _nodes(gpus) == 1 else NETWORK


def all_reduce_seconds(size: float, gpus: int) -> float:
    """A small all-reduce: up the tree and down again; the bytes pass each link twice."""
    hops = (min(gpus, GPUS_PER_NODE) - 1) * NVLINK_HOP + math.log2(_nodes(gpus)) * NETWORK_HOP
    return BASE + 2 * hops + 2 * size / (LL_SHARE * _bandwidth(gpus))


def all_gather_seconds(size: float, gpus: int) -> float:
    """A small all-gather, size: of a rank's part: once around a ring of all GPUs."""
    nodes = _nodes(gpus)
    between = nodes - 1 if nodes > 1 else 0
    hops = (gpus - 1 - between) * NVLINK_HOP + between * RING_NETWORK_HOP
    return RING_BASE + hops + size * (gpus - 1) / (LL_SHARE * _bandwidth(gpus))


def step_seconds(shape: BlockShape, gpus: int) -> float:
    """All collectives of a step of a fused block."""
    return sum(all_reduce_seconds(DOUBLE * count, gpus) for count in junctions(shape))


def nn_step_seconds(shape: BlockShape, gpus: int) -> float:
    """All collectives of a step of a block with nn.SyncBatchNorm."""
    return sum(
        all_gather_seconds(SINGLE * (2 * c + 1), gpus) + all_reduce_seconds(SINGLE * 2 * c, gpus)
        for c in _norm_channels(shape)
    )


def gradient_seconds(gpus: int, parameters: int = RESNET50_PARAMETERS) -> float:
    """DDP's all-reduce of float32 gradients, at full bandwidth: a ring moves each byte twice."""
    return 2 * (gpus - 1) / gpus * SINGLE * parameters / _bandwidth(gpus)


def floors(batch: int) -> dict[str, float]:
    """Seconds that a step of each block of ResNet-50 takes at least, and of all, by the records of
    kernel_report: bytes and operations, so in proportion to the batch."""
    with FLOORS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["shape"]: 1e-6 * float(row["floor_us"]) * batch / FLOOR_BATCH for row in rows}


def _network(seconds: Sequence[float]) -> float:
    return sum(s.count * value for s, value in zip(RESNET50, seconds, strict=True))


def bytes_table() -> str:
    """Bytes of each block's junctions, and of the network."""
    rows = []
    for shape in RESNET50:
        sizes = [f"{DOUBLE * count / 1e3:.1f}" for count in junctions(shape)]
        ours, theirs = step_bytes(shape), nn_step_bytes(shape, GPUS[0])
        rows.append(
            [shape.name, str(shape.count), *sizes, f"{ours / 1e3:.1f}", f"{theirs / 1e3:.1f}"]
        )
    totals = [_network([step_bytes(s) for s in RESNET50])]
    totals.append(_network([nn_step_bytes(s, GPUS[0]) for s in RESNET50]))
    blocks = str(sum(s.count for s in RESNET50))
    rows.append(["all blocks", blocks, *[""] * 6, *(f"{total / 1e3:.0f}" for total in totals)])
    header = ["block", "blocks", "conv1", "conv2", "tail", "tail'", "conv2'", "conv1'"]
    header += ["a step, kB", f"nn on {GPUS[0]} GPUs, kB"]
    return markdown(header, rows)


def seconds_table() -> str:
    """Milliseconds of all collectives of a step of ResNet-50's blocks, and as shares of the compute
    floor at several batches."""
    rows = []
    for gpus in GPUS:
        ours = _network([step_seconds(shape, gpus) for shape in RESNET50])
        theirs = _network([nn_step_seconds(shape, gpus) for shape in RESNET50])
        single = all_reduce_seconds(DOUBLE * forward_junctions(RESNET50[0])[0], gpus)
        shares = [f"{100 * ours / floors(batch)['all sixteen blocks']:.0f} %" for batch in BATCHES]
        cells = [f"{1e6 * single:.0f}", f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", *shares]
        rows.append([str(gpus), *cells, f"{1e3 * gradient_seconds(gpus):.1f}"])
    header = ["GPUs", "one all-reduce, µs", "all, ms", "nn's, ms"]
    header += [f"of the floor, batch {batch}" for batch in BATCHES]
    return markdown([*header, "DDP's gradients, ms"], rows)


def floor_table() -> str:
    """Per block the compute floor and the time in collectives."""
    by_shape = floors(FLOOR_BATCH)
    rows = [
        [
            shape.name,
            f"{1e6 * by_shape[shape.name]:.0f}",
            *(f"{1e6 * step_seconds(shape, gpus):.0f}" for gpus in GPUS),
        ]
        for shape in RESNET50
    ]
    header = ["block", f"floor at batch {FLOOR_BATCH}, µs", *(f"{g} GPUs, µs" for g in GPUS)]
    return markdown(header, rows)
