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
import os
import threading
from collections.abc import Sequence
from functools import cache
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

LIMIT_BYTES = 512 * 2**20
_GRANULE = 2 * 2**20  # a huge page

# Re-entrant: the garbage collector or a signal handler may run a model, or release, within it.
_lock = threading.RLock()
_free: list[Tensor] = []


class _Result(NamedTuple):
    """Memory that was handed out and may be in use: its bytes, which keep it alive, and the address
    by which torch counts its holders. Never a storage object, which users would share."""

    holder: Tensor
    address: int


_results: list[_Result] = []


def release() -> None:
    """Give all memory that is kept for reuse and not in use back to the allocator."""
    with _lock:
        kept = [*_free, *_results]
        _free.clear()
        _results.clear()
    del kept  # not under the lock: what ends with it is not ours to know


def _start_anew() -> None:
    """In a forked child: the lock may be held by a thread that is not there."""
    global _lock
    _lock = threading.RLock()
    _free.clear()
    _results.clear()


os.register_at_fork(after_in_child=_start_anew)


def pooled_bytes() -> int:
    """Bytes that the pool of scratch holds now, leased buffers not counted."""
    with _lock:
        return sum(buffer.numel() for buffer in _free)


# A buffer of which a smaller part would be used is left to larger needs.
_LEAST_USED = 1 / 4


def _acquire(size: int) -> Tensor:
    """The smallest free buffer of at least size bytes, not much larger, or a new one."""
    with _lock:
        for i, buffer in enumerate(_free):  # in order of size
            if size <= buffer.numel() <= max(size / _LEAST_USED, _GRANULE):
                return _free.pop(i)
    return _new_buffer(size)


def _acquire_largest(size: int) -> Tensor:
    """The largest free buffer or, in its place where it has less than size bytes, a new one."""
    with _lock:
        largest = _free.pop() if _free else None
    if largest is not None and largest.numel() >= size:
        return largest
    del largest  # before there is the new one
    return _new_buffer(size)


def _new_buffer(size: int) -> Tensor:
    return large_empty((-(-size // _GRANULE) * _GRANULE,), torch.uint8)


def _give_back(buffers: list[Tensor]) -> None:
    """Put buffers into the pool, but those that are larger than it; the smallest go first where
    that exceeds its limit."""
    with _lock:
        _free.extend(buffer for buffer in buffers if buffer.numel() <= LIMIT_BYTES)
        _free.sort(key=Tensor.numel)
        while sum(buffer.numel() for buffer in _free) > LIMIT_BYTES:
            del _free[:1]


def large_empty(shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """An uninitialised CPU tensor, on huge pages where the system grants them."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensor = torch.empty(shape, dtype=dtype, memory_format=layout)
    torch.ops.fused_bottleneck.advise_huge_pages_(tensor)
    return tensor


# Below this the allocator's own reuse is good enough.
_MIN_RESULT_BYTES = 2**20
# Torch's own way to know that nobody holds a storage. A Python object of it counts, once made, as
# long as the storage lives: then it is never reused, which is safe.
_use_count = getattr(torch._C, "_storage_Use_Count", None)
_address = getattr(torch._C, "_storage_address", None)
_lay_over = torch.ops.aten.set_.source_Tensor_storage_offset


def _result(tensor: Tensor) -> _Result:
    """The memory of a tensor that fills its storage."""
    assert _address is not None
    with torch.inference_mode(False):
        size = (tensor.numel(),)
        flat = tensor.as_strided(size, (1,)).view(torch.uint8)
        holder = _lay_over(torch.empty(0, dtype=torch.uint8), flat, 0, flat.shape, (1,))
        return _Result(holder, _address(tensor))


@cache
def _counts_holders() -> bool:
    """Whether this torch tells who holds a storage, by the rules that reuse rests on."""
    if _use_count is None or _address is None:
        return False
    tensor = torch.empty(1)
    result = _result(tensor)
    held = _use_count(result.address) == 2
    del tensor
    free = _use_count(result.address) == 1
    _lay_over(torch.empty(0, dtype=torch.uint8), result.holder, 0, (1,), (1,)).untyped_storage()
    return held and free and _use_count(result.address) > 1


def _reuse(tensor: Tensor, size: int, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Lay the empty tensor over unused memory of that size; False if there is none.

    Of just that size: what saves or copies a storage must find nothing of another tensor in it.
    """
    assert _use_count is not None
    with _lock:
        for result in _results:
            if result.holder.numel() == size and _use_count(result.address) == 1:
                _lay_over(tensor, result.holder.view(tensor.dtype), 0, shape, strides)
                return True
    return False


def _remember(tensor: Tensor) -> None:
    """Keep a result's memory for reuse; the oldest go where the limit asks for it."""
    result = _result(tensor)
    if result.holder.numel() > LIMIT_BYTES:
        return
    with _lock:
        _results.append(result)
        while sum(kept.holder.numel() for kept in _results) > LIMIT_BYTES:
            del _results[:1]


def result_empty(shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """An uninitialised CPU tensor for the user, in reused memory where there is some."""
    like = torch.empty(0, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _MIN_RESULT_BYTES or not _counts_holders():
        return large_empty(shape, dtype, channels_last)
    _, c, h, w = shape
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    if _reuse(like, size, shape, strides):
        return like.fill_(math.nan) if _poisoned() else like
    fresh = large_empty(shape, dtype, channels_last)
    _remember(fresh)
    return fresh


_NAN_BYTE = 0xFF  # of which any floating-point number is a NaN


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

    def swap(self, buffer: Tensor | None, size: int) -> Tensor:
        """A uint8 tensor of at least that size, valid until exit, for another that is given back.

        The largest there is: one that will do for whatever is to follow, instead of a row of ever
        larger ones."""
        if buffer is not None:
            self._buffers = [kept for kept in self._buffers if kept is not buffer]
            _give_back([buffer])
        larger = _acquire_largest(size)
        self._buffers.append(larger)
        return larger.fill_(_NAN_BYTE) if _poisoned() else larger

    def _take(self, size: int) -> Tensor:
        buffer = _acquire(size)
        self._buffers.append(buffer)
        return buffer

    def take_bytes(self, size: int) -> Tensor:
        """A uint8 ``[size]`` tensor with arbitrary content, valid until exit."""
        return self._take(size)[:size]

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A channels_last ``[N, C, H, W]`` tensor with arbitrary content, valid until exit."""
        _, c, h, w = shape
        buffer = self._take(math.prod(shape) * dtype.itemsize)
        out = buffer.view(dtype).as_strided(shape, (h * w * c, 1, w * c, c))
        return out.fill_(math.nan) if _poisoned() else out
