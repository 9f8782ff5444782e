"""Processes that run a function as the ranks of a process group, reused from test to test.

A process costs seconds to start, a process group hundredths of one: each call makes its own, so
that nothing of a call is left for the next.
"""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Within one call: what collectives wait for a rank that does not come, and what the call may take.
COLLECTIVE = timedelta(seconds=60)
CALL_SECONDS = 120.0
# What the other ranks get to fail in their own words once one has failed.
GRACE_SECONDS = 5.0

Work = Callable[..., Any]


class RankFailed(AssertionError):
    """A rank raised, died or did not answer; the message has what each of these said.

    returned: what the others returned, by their number.
    """

    def __init__(self, answers: dict[int, tuple[bool, Any]]) -> None:
        failed = {rank: text for rank, (good, text) in sorted(answers.items()) if not good}
        said = "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
        super().__init__(f"{len(failed)} of {len(answers)} ranks failed\n{said}")
        self.returned = {rank: result for rank, (good, result) in answers.items() if good}


class _Task(NamedTuple):
    work: Work
    arguments: tuple[Any, ...]
    world: int
    store: str
    timeout: timedelta
    backend: str


@contextlib.contextmanager
def process_group(rank: int, task: _Task) -> Iterator[None]:
    """The default process group of a call; none for a world of 0."""
    if task.world == 0:
        yield
        return
    dist.init_process_group(
        task.backend,
        init_method=f"file://{task.store}",
        rank=rank,
        world_size=task.world,
        timeout=task.timeout,
    )
    try:
        dist.barrier()  # a rank that is done must not close what another one is still opening
        yield
    finally:
        dist.destroy_process_group()


def _answer(rank: int, request: bytes) -> tuple[bool, Any]:
    """What the work returns, or the traceback."""
    try:
        task: _Task = pickle.loads(request)
        torch.manual_seed(0)
        with process_group(rank, task):
            return True, task.work(rank, *task.arguments)
    except BaseException:
        return False, traceback.format_exc()


def _serve(rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        # As bytes: tensors that travel by themselves go through shared memory.
        connection.send_bytes(pickle.dumps(_answer(rank, request)))


class Pool:
    """Processes that wait for work; started when first needed, and anew after one was lost."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []
        self._stores = tempfile.TemporaryDirectory(prefix="ranks-")
        self._calls = 0

    def run(
        self,
        world: int,
        work: Work,
        *arguments: Any,
        timeout: timedelta = COLLECTIVE,
        seconds: float = CALL_SECONDS,
        backend: str = "gloo",
    ) -> list[Any]:
        """What ``work(rank, *arguments)`` returns on each of the ranks of a process group.

        Raises RankFailed, and replaces the processes, if any rank does not return.
        """
        return self._call(world, world, work, arguments, timeout, seconds, backend)

    def alone(self, work: Work, *arguments: Any) -> Any:
        """What ``work(0, *arguments)`` returns in a process without a process group."""
        (result,) = self._call(1, 0, work, arguments, COLLECTIVE, CALL_SECONDS, "gloo")
        return result

    def _call(
        self,
        processes: int,
        world: int,
        work: Work,
        arguments: tuple[Any, ...],
        timeout: timedelta,
        seconds: float,
        backend: str,
    ) -> list[Any]:
        self._start(processes)
        self._calls += 1
        store = str(Path(self._stores.name) / f"store{self._calls}")
        request = pickle.dumps(_Task(work, arguments, world, store, timeout, backend))
        ranks = self._ranks[:processes]
        for _, connection in ranks:
            connection.send_bytes(request)
        answers = self._collect(ranks, time.monotonic() + seconds)
        if not all(returned for returned, _ in answers.values()):
            self.close()
            raise RankFailed(answers)
        return [answers[rank][1] for rank in range(processes)]

    def _collect(
        self, ranks: list[tuple[Any, Connection]], deadline: float
    ) -> dict[int, tuple[bool, Any]]:
        """The answer of every rank by its number; of one that gave none, why."""
        waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
        answers: dict[int, tuple[bool, Any]] = {}
        while waiting and time.monotonic() < deadline:
            for connection in wait(list(waiting), max(deadline - time.monotonic(), 0)):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    answers[rank] = (False, "died")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers | dict.fromkeys(waiting.values(), (False, "did not answer"))

    def _start(self, processes: int) -> None:
        context = get_context("spawn")
        for rank in range(len(self._ranks), processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def close(self) -> None:
        """End the processes; the next call starts others."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks.clear()
