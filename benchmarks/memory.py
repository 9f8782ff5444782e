"""Memory of a training step: what forward keeps for backward, the peak on a GPU, and that of a
process."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that a forward keeps for backward.

    The input counts; `own`, the parameters and buffers, does not.
    """
    permanent = {tensor.untyped_storage().data_ptr() for tensor in own}
    # The storages are held until the count is done: a freed address could be handed out again.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in permanent:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """Most device memory that a step allocates beyond what was there; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_bytes(work: Callable[..., object], *arguments: object) -> int:
    """Most resident memory, Python and torch included, of a fresh process that calls the work.

    Linux only; work and arguments must be what pickle can take.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_resident_bytes, work, arguments).result()


def _resident_bytes(work: Callable[..., object], arguments: tuple[object, ...]) -> int:
    work(*arguments)
    # Not getrusage's, which remembers what the parent had when it forked.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
