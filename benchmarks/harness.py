"""Interleaved timing: every round runs every variant once, in a new order.

Drift of the machine (frequency, temperature, neighbours) then falls on all variants alike, and
what one leaves in the caches and the allocator does not always meet the same successor.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

Variant = Callable[[], object]
Timer = Callable[[Variant], float]
T = TypeVar("T")


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


CALLS_PER_SAMPLE = 5


def cuda_timer(run: Variant) -> float:
    """Seconds of one of several calls of `run()` back to back, between two CUDA events.

    One more call goes first, so that the device is busy when the clock starts: the host's work is
    hidden where the device is the slower of the two, as in training, and counted where it is not.
    """
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    run()
    start.record()
    for _ in range(CALLS_PER_SAMPLE):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS_PER_SAMPLE


def timer_for(device: torch.device) -> Timer:
    """The timer that is right for `device`."""
    return cuda_timer if device.type == "cuda" else cpu_timer


def progress(items: Iterable[T], description: str, unit: str) -> Iterator[T]:
    """`items`, with a progress bar on stderr (tqdm's; a line for each item where it is missing)."""
    try:
        from tqdm import tqdm
    except ImportError:
        for item in items:
            print(f"{description}: {unit} {item}", file=sys.stderr, flush=True)
            yield item
        return
    bar = tqdm(items, desc=description, unit=unit, dynamic_ncols=True)
    for item in bar:
        bar.set_postfix_str(str(item))
        yield item


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
    with _no_garbage_collection():
        samples = interleave(list(variants), rounds, lambda name: timer(variants[name]), seed)
    return {name: summarize(times) for name, times in samples.items()}


def interleave(
    names: Sequence[str], rounds: int, sample: Callable[[str], T], seed: int = 0
) -> dict[str, list[T]]:
    """A sample of every name in every round, in the `orders` of the names."""
    samples: dict[str, list[T]] = {name: [] for name in names}
    for order in orders(names, rounds, seed):
        for name in order:
            samples[name].append(sample(name))
    return samples


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
