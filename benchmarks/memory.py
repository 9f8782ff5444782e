"""Memory of a training step: what forward keeps for backward, and the peak on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

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
