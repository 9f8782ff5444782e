"""Runs examples/train.py, each time in processes forked from this one, which has torch already.

Reads requests from standard input, one JSON object per line, and answers each with a line: see
``Request`` and ``serve``. Forking saves the seconds that importing takes, and works as long as this
process itself computes nothing (autograd's threads do not survive a fork).
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import experiment  # noqa: F401  # train.main imports these when it runs
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo
import train

TIMEOUT = 60


class Request(NamedTuple):
    """A run: of how many processes, and when to kill them.

    kill_after: kill -9 when this many checkpoints were written, and ``delay`` seconds went by;
    None: never.
    """

    arguments: list[str]
    checkpoint: str
    processes: int = 1
    kill_after: int | None = None
    delay: float = 0.0


def serve(request: Request) -> dict[str, Any]:
    """The exit codes, negative for signals, and what was written to the two streams."""
    port = _free_port()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pids = []
        for rank in range(request.processes):
            pid = os.fork()
            if pid == 0:
                _run(request, rank, port, out.fileno(), err.fileno())
            pids.append(pid)
        codes = _wait(pids, request)
        out.seek(0)
        err.seek(0)
        return {"codes": codes, "stdout": out.read(), "stderr": err.read()}


def _run(request: Request, rank: int, port: int, out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    torch.set_num_threads(1)
    if request.processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(request.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    try:
        code = train.main(request.arguments)
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(pids: list[int], request: Request) -> list[int]:
    """Wait until all have ended; one that ends with an error or too late takes the others along,
    as under torchrun."""
    codes: dict[int, int] = {}
    start, written, seen = time.monotonic(), 0, _identity(request.checkpoint)
    while len(codes) < len(pids):
        time.sleep(0.001)
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if _identity(request.checkpoint) != seen:
            written, seen = written + 1, _identity(request.checkpoint)
        due = request.kill_after is not None and written >= request.kill_after
        if due:
            time.sleep(request.delay)
        if due or any(codes.values()) or time.monotonic() - start > TIMEOUT:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(Request(**json.loads(line)))), flush=True)
