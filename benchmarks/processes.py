"""Variants in processes of their own, which take turns.

In one process the memory that one variant frees serves the next, and the C allocator's thresholds
follow the largest of all: a plain block then has few of the page faults, tens of thousands a step,
that it has where it is alone. Each variant has its own allocator, as in its user's program.

Which memory a process happens to get is good for some percent of its times, and for half of a plain
block's page faults, as long as it lives. So each variant has a few processes, one after the other,
whose samples are taken together.
"""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import re
import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from benchmarks.harness import cpu_timer, interleave, summarize

GENERATIONS = 4  # of processes, where there are as many rounds
Calls = Mapping[str, Callable[[], object]]  # by name, what a process can be told to run
Start = Callable[[], "Process"]


class Sample(NamedTuple):
    """One timed run: seconds, and the pages that the system had to map for it."""

    seconds: float
    page_faults: int


class Process:
    """A process that builds calls and runs them when told to.

    build must be a function of a module, and its arguments what pickle can take.
    """

    def __init__(self, build: Callable[..., Calls], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=context)
        self._ready: Future[None] = self._pool.submit(
            _prepare, torch.get_num_threads(), build, arguments
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()

    def sample(self, call: str) -> Sample:
        """Times the second of two runs in a row: the first finds another process's data in the
        caches, and threads asleep. Raises what building the calls has raised."""
        return self._ask(_sample, call)

    def resident_bytes(self) -> int:
        """The most resident memory so far, Python and torch included. Linux only."""
        return self._ask(_resident_bytes)

    def _ask(self, work: Callable[..., Any], *arguments: object) -> Any:
        self._ready.result()
        return self._pool.submit(work, *arguments).result()


def generations(rounds: int) -> int:
    """How many processes a variant has, one after the other, to share the rounds."""
    return min(GENERATIONS, rounds)


class Measured(NamedTuple):
    """What was found of one variant.

    calls: for each call, its `Timing` and the median of its page faults. resident_bytes: the most
    of all its processes.
    """

    calls: dict[str, dict[str, float]]
    resident_bytes: int


def measure_processes(
    starts: Mapping[str, Start], calls: Sequence[str], rounds: int, warmup: int
) -> dict[str, Measured]:
    """The calls of every variant, in order, each interleaved with that of the others.

    Args:
        starts: what makes a process, by variant.
        calls: the calls to measure.
        rounds: samples of each, of all `generations` of processes together.
        warmup: samples before those, in each process.
    """
    samples: dict[tuple[str, str], list[Sample]] = {(n, c): [] for n in starts for c in calls}
    resident = dict.fromkeys(starts, 0)
    total = generations(rounds)
    for generation in range(total):
        share = rounds * (generation + 1) // total - rounds * generation // total
        with ExitStack() as stack:
            processes = {name: stack.enter_context(start()) for name, start in starts.items()}
            for call in calls:
                for name, taken in _samples(processes, call, share, warmup, generation).items():
                    samples[name, call] += taken
            for name, process in processes.items():
                resident[name] = max(resident[name], process.resident_bytes())
    return {
        name: Measured({call: _summary(samples[name, call]) for call in calls}, resident[name])
        for name in starts
    }


def _samples(
    processes: Mapping[str, Process], call: str, rounds: int, warmup: int, seed: int
) -> dict[str, list[Sample]]:
    """Of one call of every process."""
    for _ in range(warmup):
        for process in processes.values():
            process.sample(call)
    return interleave(list(processes), rounds, lambda name: processes[name].sample(call), seed)


def _summary(samples: Sequence[Sample]) -> dict[str, float]:
    timing = summarize([sample.seconds for sample in samples])
    faults = statistics.median(sample.page_faults for sample in samples)
    return {**dataclasses.asdict(timing), "page_faults": faults}


# --- in the process ---

_calls: Calls = {}


def _prepare(threads: int, build: Callable[..., Calls], arguments: tuple[object, ...]) -> None:
    global _calls
    torch.set_num_threads(threads)
    _calls = build(*arguments)
    gc.collect()
    gc.disable()  # a collection would be charged to whichever sample met it


def _sample(call: str) -> Sample:
    _calls[call]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = cpu_timer(_calls[call])
    return Sample(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def _resident_bytes() -> int:
    # Not getrusage's, which remembers what the parent had when it forked.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
