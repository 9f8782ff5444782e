"""Memory that is reused instead of allocated anew.

A fresh large tensor costs its page faults, on CPU as much as the convolution that fills it: 3 to
14 ms for 51 MB, and far more on a virtual machine whose host has to find the memory first.

* Scratch: buffers are leased for one run of a program and go back to a pool. A leased buffer is
  out of the pool, so that concurrent and re-entrant runs never share one.
* Results (``result_empty``): a tensor that the user gets, in the storage of an earlier one that
  nobody holds any more.

Both are bounded in size, and the results besides by the most bytes of them that were ever in use at
one time: where new memory has to be taken, as much of what is unused is given back first. A result
whose storage was asked for as a Python object seems in use until it is forgotten by its age.
"""

import math
import os
import threading
from collections.abc import Sequence
from functools import cache
from itertools import count
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

LIMIT_BYTES = 512 * 2**20
RESULT_LIMIT_BYTES = 2 * 2**30
_GRANULE = 2 * 2**20  # a huge page

# Re-entrant: the garbage collector or a signal handler may run a model, or release, within it.
_lock = threading.RLock()
_free: list[Tensor] = []


class _Result(NamedTuple):
    """Memory that was handed out and may be in use: its bytes, which keep it alive, where they
    were, and when it was handed out last, counted in results. Never a storage object, which users
    would share."""

    holder: Tensor
    data: int
    last: int


# By the address by which torch counts a storage's holders, in the order of `last`. Whatever the
# garbage collector or a signal runs in between may ask for memory, or release it.
_results: dict[int, _Result] = {}
_handed_out = count()
# A step of a ResNet-152 hands out 322 results, one of a ResNet-50 96. What is in use for longer
# than a step is the user's to keep.
_STALE_IN_USE = 512
_STALE_UNUSED = 1024


def release() -> None:
    """Give all memory that is kept for reuse and not in use back to the allocator."""
    with _lock:
        kept = [*_free, *_results.values()]
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


def _holder(tensor: Tensor) -> Tensor:
    """The bytes of a tensor that fills its storage."""
    with torch.inference_mode(False):
        size = (tensor.numel(),)
        flat = tensor.as_strided(size, (1,)).view(torch.uint8)
        return _lay_over(torch.empty(0, dtype=torch.uint8), flat, 0, flat.shape, (1,))


@cache
def _counts_holders() -> bool:
    """Whether this torch tells who holds a storage, by the rules that reuse rests on."""
    if _use_count is None or _address is None:
        return False
    tensor = torch.empty(1)
    address = _address(tensor)
    holder = _holder(tensor)
    held = _use_count(address) == 2
    del tensor
    free = _use_count(address) == 1
    _lay_over(torch.empty(0, dtype=torch.uint8), holder, 0, (1,), (1,)).untyped_storage()
    return held and free and _use_count(address) > 1


def _is_unused(address: int) -> bool:
    assert _use_count is not None
    return _use_count(address) == 1


def _take_if_unused(address: int) -> _Result | None:
    """Take a result out, under the lock, if nobody holds it: who takes it out has it alone."""
    if not _is_unused(address):
        return None
    result = _results.pop(address, None)
    if result is not None and not _is_unused(address):  # handed out meanwhile
        _results[address] = result
        return None
    return result


def _entries() -> list[tuple[int, _Result]]:
    """All results that there are, whatever changes while they are looked at."""
    found = [(address, _results.get(address)) for address in list(_results)]
    return [(address, result) for address, result in found if result is not None]


def _reuse(
    tensor: Tensor, size: int, shape: Sequence[int], strides: Sequence[int], now: int
) -> bool:
    """Lay the empty tensor over unused memory of that size; False if there is none.

    Of just that size: what saves or copies a storage must find nothing of another tensor in it.
    """
    with _lock:
        for address, (holder, data, _) in _entries():
            if holder.numel() != size or _take_if_unused(address) is None:
                continue
            if holder.data_ptr() != data:  # resized
                continue
            _lay_over(tensor, holder.view(tensor.dtype), 0, shape, strides)
            _results[address] = _Result(holder, data, now)
            return True
    return False


def _make_room(size: int, now: int) -> None:
    """Give back as many bytes of unused results as are about to be taken anew, and forget what was
    not handed out in a while.

    Those first that were handed out last: training asks for the same sizes in the same order at
    each step, so that their turn comes last.
    """
    leaving: list[Tensor] = []
    with _lock:
        for address, (holder, _, last) in reversed(_entries()):
            enough = sum(map(Tensor.numel, leaving)) >= size
            if (now - last > _STALE_UNUSED or not enough) and _take_if_unused(address):
                leaving.append(holder)
            elif now - last > _STALE_IN_USE and not _is_unused(address):
                _results.pop(address, None)
    for holder in leaving:  # not under the lock: what ends with it is not ours to know
        torch.ops.fused_bottleneck.discard_pages_(holder)


def _remember(tensor: Tensor, now: int) -> None:
    """Keep a result's memory for reuse if the limit allows it.

    Were the new one kept in place of the oldest, a step with more than the limit would find none of
    its own again, as each had gone before its turn came.
    """
    assert _address is not None
    holder = _holder(tensor)
    with _lock:
        kept = sum(result.holder.numel() for _, result in _entries())
        if kept + holder.numel() <= RESULT_LIMIT_BYTES:
            _results[_address(tensor)] = _Result(holder, holder.data_ptr(), now)


def result_empty(shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """An uninitialised CPU tensor for the user, in reused memory where there is some."""
    like = torch.empty(0, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _MIN_RESULT_BYTES or not _counts_holders():
        return large_empty(shape, dtype, channels_last)
    _, c, h, w = shape
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    now = next(_handed_out)
    if _reuse(like, size, shape, strides, now):
        return like.fill_(math.nan) if _poisoned() else like
    _make_room(size, now)
    fresh = large_empty(shape, dtype, channels_last)
    _remember(fresh, now)
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
