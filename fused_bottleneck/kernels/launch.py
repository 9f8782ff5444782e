"""The one place that calls a kernel, so that the calls of a program can be listed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from .config import Config


class Call(NamedTuple):
    """One call of a kernel: its grid, its arguments by position, its constants by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config


_calls: list[Call] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constants: Any
) -> None:
    """Call a kernel, or only take note of it inside ``recording``."""
    if _calls is not None:
        _calls.append(Call(kernel, grid, arguments, constants, config))
        return
    kernel[grid](*arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages)


def is_recording() -> bool:
    """Whether calls are being listed, not made."""
    return _calls is not None


@contextmanager
def recording() -> Iterator[list[Call]]:
    """List the calls of whatever runs inside, without running them.

    With tensors on the meta device a whole training step can be listed on a machine without a
    GPU: that is what the compilation tests and the kernel report do.
    """
    global _calls
    previous, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = previous
