"""Scratch memory that is reused instead of allocated anew.

A fresh large tensor costs its page faults, on CPU as much as the convolution that fills it. Buffers
are leased for one run of a program and go back to a pool that is bounded in size. A leased buffer
is out of the pool, so that concurrent and re-entrant runs never share one.
"""

import math
import threading
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

LIMIT_BYTES = 512 * 2**20
_GRANULE = 2 * 2**20  # a huge page

_lock = threading.Lock()
_free: list[Tensor] = []


def release() -> None:
    """Give all scratch memory that is not in use back to the allocator."""
    with _lock:
        _free.clear()


def pooled_bytes() -> int:
    """Bytes that the pool holds now, leased buffers not counted."""
    with _lock:
        return sum(buffer.numel() for buffer in _free)


def _acquire(size: int) -> Tensor:
    """The smallest free buffer of at least size bytes, or a new one."""
    with _lock:
        fitting = [i for i, buffer in enumerate(_free) if buffer.numel() >= size]
        if fitting:
            return _free.pop(min(fitting, key=lambda i: _free[i].numel()))
    return large_empty((-(-size // _GRANULE) * _GRANULE,), torch.uint8)


def _give_back(buffers: list[Tensor]) -> None:
    """Put buffers into the pool; the smallest go first where that exceeds its limit."""
    with _lock:
        _free.extend(buffers)
        _free.sort(key=Tensor.numel)
        while sum(buffer.numel() for buffer in _free) > LIMIT_BYTES:
            _free.pop(0)


def large_empty(shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """An uninitialised CPU tensor, on huge pages where the system grants them."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensor = torch.empty(shape, dtype=dtype, memory_format=layout)
    torch.ops.fused_bottleneck.advise_huge_pages_(tensor)
    return tensor


def _poisoned() -> bool:
    """Whether uninitialised memory is to be filled with NaN, as torch.empty does then."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    )


class Lease:
    """Buffers for one run; a context manager that returns them all at its end."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _give_back(self._buffers)
        self._buffers = []

    def take_bytes(self, size: int) -> Tensor:
        """A uint8 ``[size]`` tensor with arbitrary content, valid until exit."""
        buffer = _acquire(size)
        self._buffers.append(buffer)
        return buffer[:size]

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A channels_last ``[N, C, H, W]`` tensor with arbitrary content, valid until exit."""
        n, c, h, w = shape
        flat = self.take_bytes(math.prod(shape) * dtype.itemsize).view(dtype)
        if _poisoned():
            flat.fill_(math.nan)
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
