"""Memory that is reused instead of allocated anew.

A fresh large tensor costs its page faults, on CPU as much as the convolution that fills it: 3 to
14 ms for 51 MB, and far more on a virtual machine whose host has to find the memory first.

* Scratch: buffers are leased for one run of a program and go back to a pool. A leased buffer is
  out of the pool, so that concurrent and re-entrant runs never share one.
* Results (``result_empty``): a tensor that the user gets, in the storage of an earlier one that
  nobody holds any more.

Both are bounded in size.
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
_results: list[torch.UntypedStorage] = []  # handed out once, perhaps in use


def release() -> None:
    """Give all memory that is kept for reuse and not in use back to the allocator."""
    with _lock:
        _free.clear()
        _results.clear()


def pooled_bytes() -> int:
    """Bytes that the pool of scratch holds now, leased buffers not counted."""
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


# Below this the allocator's own reuse is good enough.
_MIN_RESULT_BYTES = 2**20
# How much larger than needed a reused storage may be.
_RESULT_SLACK = 1.25
# How many hold a storage, besides torch's Python objects for it: how reuse knows that nobody does.
_use_count = getattr(torch._C, "_storage_Use_Count", None)


def _unused(storage: torch.UntypedStorage) -> bool:
    """Whether only this module's reference to the storage is left."""
    return _use_count is not None and _use_count(storage._cdata) == 1


def _reuse(tensor: Tensor, size: int, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Lay the empty tensor over an unused storage of about that size; False if there is none."""
    with _lock:
        for storage in _results:
            if size <= storage.nbytes() <= _RESULT_SLACK * size and _unused(storage):
                tensor.set_(storage, 0, shape, strides)
                return True
    return False


def _remember(storage: torch.UntypedStorage) -> None:
    """Keep a result's storage for reuse, in place of unused ones where the limit asks for it."""
    with _lock:
        total = sum(kept.nbytes() for kept in _results) + storage.nbytes()
        for kept in list(_results):
            if total > LIMIT_BYTES and _unused(kept):
                _results.remove(kept)
                total -= kept.nbytes()
        if total <= LIMIT_BYTES:
            _results.append(storage)


def result_empty(shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """An uninitialised CPU tensor for the user, in reused memory where there is some."""
    like = torch.empty(0, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _MIN_RESULT_BYTES or _use_count is None:
        return large_empty(shape, dtype, channels_last)
    _, c, h, w = shape
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    if _reuse(like, size, shape, strides):
        return like.fill_(math.nan) if _poisoned() else like
    fresh = large_empty(shape, dtype, channels_last)
    _remember(fresh.untyped_storage())
    return fresh


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
