"""Several processes that train together. Each function does the obvious thing for one alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import launch
import torch
import torch.distributed as dist
from config import Stop
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The group of torchrun's processes: nccl on CUDA, a device for each process; else gloo."""
    if not launch.launched():
        yield
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(launch.local_rank())
    dist.init_process_group("nccl" if cuda else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that are gone


def data_parallel(model: nn.Module, sync_bn: bool) -> nn.Module:
    """What to call for a forward pass whose gradients are averaged over the processes.

    sync_bn: normalise with the statistics of all processes' images. The model's normalisations are
    replaced after it is wrapped: DistributedDataParallel would not have the new ones on a CPU,
    where nn's cannot run, but the fused blocks can.
    """
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    return nn.SyncBatchNorm.convert_sync_batchnorm(wrapped) if sync_bn else wrapped


def share(indices: Tensor) -> Tensor:
    """The part of this process."""
    return indices[launch.rank() :: launch.size()]


def mean(values: Tensor) -> Tensor:
    """Mean over the processes, the same in all of them."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= launch.size()
    return values


def total(values: Tensor) -> Tensor:
    """Sum over the processes, the same in all of them."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """The value of every process, by rank."""
    values = [value] * launch.size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of rank 0: running statistics differ between them."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def on_main(function: Callable[[], Result]) -> Result:
    """What ``function`` returns on rank 0, in all processes; if it raises ``Stop``, all do."""
    outcome: list[Result | Stop | None] = [None]
    if launch.is_main():
        try:
            outcome[0] = function()
        except Stop as stop:
            outcome[0] = stop
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Stop):
        raise outcome[0]
    return cast(Result, outcome[0])
