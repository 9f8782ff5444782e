"""`python -m benchmarks.warm_up`: fill Triton's cache ahead, in a process per core.

A launch compiles a kernel it has not seen, about a second each, one after the other: minutes for
ResNet-50's blocks in four precisions. A launch after this finds them (compiled.build).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks.compiled import Specialisation, build, distinct, step_calls, unit_calls
from benchmarks.shapes import RESNET50

# Element type, and what torch's convolutions do with float32.
PRECISIONS = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}


def specialisations(precisions: Sequence[str], architecture: int) -> list[Specialisation]:
    """The kernels of ResNet-50's blocks and of standalone units, in training and frozen, with
    normalisations in float32 (autocast) and in the element type."""
    calls = []
    for precision in precisions:
        dtype, torch.backends.cudnn.conv.fp32_precision = PRECISIONS[precision]  # type: ignore[attr-defined]
        for affine in {dtype, torch.float32}:
            calls += unit_calls(dtype, architecture, affine)
            for shape in RESNET50:
                for batch, fixed in ((256, False), (32, False), (32, True)):
                    forward, backward = step_calls(shape, batch, dtype, architecture, fixed, affine)
                    calls += forward + backward
    return distinct(calls)


def _compile(precisions: Sequence[str], architecture: int, worker: int, workers: int) -> int:
    """A worker's share of the kernels."""
    mine = specialisations(precisions, architecture)[worker::workers]
    for spec in mine:
        build(spec, architecture)
    return len(mine)


def warm_up(precisions: Sequence[str], architecture: int, workers: int) -> int:
    """Compile the kernels in that many processes; returns how many."""
    # Spawned: a forked child of a process with threads, or a CUDA context, may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        shares = [
            pool.submit(_compile, precisions, architecture, worker, workers)
            for worker in range(workers)
        ]
        return sum(share.result() for share in shares)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS))
    parser.add_argument("--architecture", type=int, help="90 for example; default: this GPU's")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    architecture = options.architecture
    if architecture is None:
        major, minor = torch.cuda.get_device_capability()
        architecture = 10 * major + minor
    start = time.perf_counter()
    count = warm_up(options.precisions, architecture, options.workers)
    print(f"compiled {count} kernels for sm_{architecture} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
