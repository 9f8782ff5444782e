"""What torchrun told this process, in its environment; without importing torch."""

import os
import sys
import time
from typing import NoReturn

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether this process is one of a group."""
    return "WORLD_SIZE" in os.environ


def missing_variables() -> list[str]:
    """What a group needs besides, and the environment does not have."""
    return [name for name in _VARIABLES if name not in os.environ]


def rank() -> int:
    """The number of this process in its group; 0 without a group."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """The number of this process on its machine; 0 without a group."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def size() -> int:
    """Processes in the group; 1 without a group."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def leave_last_word_to_main() -> None:
    """Wait, so that rank 0 can say why all stop: torchrun ends the others when the first fails."""
    time.sleep(10)


def leave(code: int) -> NoReturn:
    """Exit; one of a group without Python's finalisation, which now and then aborts the process:
    gloo's threads may still be giving tensors back (pytorch/pytorch#179291)."""
    if launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
