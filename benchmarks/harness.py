"""Interleaved timing: every round runs every variant once, in a new order.

Drift of the machine (frequency, temperature, neighbours) then falls on all variants alike, and
what one leaves in the caches and the allocator does not always meet the same successor.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Variant = Callable[[], object]
Timer = Callable[[Variant], float]


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant: median and 20/80 quantiles over `rounds` samples."""

    median: float
    q20: float
    q80: float
    rounds: int


def summarize(samples: Sequence[float]) -> Timing:
    """Median and 20/80 quantiles of `samples` (at least one), linearly interpolated."""
    if not samples:
        raise ValueError("samples must hold at least one time, got none")
    return Timing(
        median=statistics.median(samples),
        q20=_quantile(samples, 0.2),
        q80=_quantile(samples, 0.8),
        rounds=len(samples),
    )


def _quantile(samples: Sequence[float], fraction: float) -> float:
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def cpu_timer(run: Variant, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of wall clock that `run()` takes; freeing its result is part of it."""
    start = clock()
    run()
    return clock() - start


def cuda_timer(run: Variant) -> float:
    """Seconds between two CUDA events around `run()`, with an idle device before and after."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def timer_for(device: torch.device) -> Timer:
    """The timer that is right for `device`."""
    return cuda_timer if device.type == "cuda" else cpu_timer


def orders(names: Sequence[str], rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """One order of `names` per round: a random permutation, rotated by one place each round.

    A permutation is drawn anew after as many rounds as there are names, so within such a cycle
    every variant runs once in every place.
    """
    generator = random.Random(seed)
    shuffled = list(names)
    for index in range(rounds):
        shift = index % len(names)
        if shift == 0:
            generator.shuffle(shuffled)
        yield shuffled[shift:] + shuffled[:shift]


def measure(
    variants: Mapping[str, Variant], rounds: int, warmup: int, timer: Timer, seed: int = 0
) -> dict[str, Timing]:
    """Time `variants` side by side: `warmup` untimed rounds, then `rounds` timed ones."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    with _no_garbage_collection():
        for order in orders(list(variants), rounds, seed):
            for name in order:
                samples[name].append(timer(variants[name]))
    return {name: summarize(times) for name, times in samples.items()}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection inside one sample would be charged to whichever variant met it."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
