"""Memory of a training step, measured in a process of its own.

Peaks of two variants in one process would contaminate each other: the C allocator keeps what the
first one freed. So each variant gets a fresh process that does nothing else.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from config import Config, Stop
from model import memory_format
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training import Training

_STEPS = 3
_WARMUP_BATCH = 2


class Footprint(NamedTuple):
    """Memory of one variant.

    Attributes:
        peak_bytes: the most that training steps held above the weights, optimiser and batch that
            were there before: activations, gradients, scratch. CPU: resident memory of the
            process. CUDA: memory given out by torch's allocator. None where Linux's ``/proc`` is
            missing.
        saved_bytes: distinct storages that autograd keeps from forward for backward, without
            parameters and buffers.
        composed: name of each block that did not run fused -> the reason it gives.
    """

    peak_bytes: int | None
    saved_bytes: int
    composed: dict[str, str]


def measure(config: Config, variant: str, image_size: int) -> Footprint:
    """Footprint of ``variant`` for batches ``[batch_size, channels, image_size, image_size]``."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, config, variant, image_size).result()
        except BrokenProcessPool:
            raise Stop(
                f"the process that measures the memory of the {variant} variant was killed; "
                "try a smaller --batch-size",
                exit_code=1,
            ) from None


def _measure(config: Config, variant: str, image_size: int) -> Footprint:
    training = Training(config, variant, total_steps=_STEPS + 1)
    images, labels = _random_batch(config, image_size)
    # A tiny step first: it pulls in library code, threads and the optimiser's state.
    training.step(images[:_WARMUP_BATCH], labels[:_WARMUP_BATCH])

    def run_steps() -> None:
        for _ in range(_STEPS):
            training.step(images, labels)

    peak = _peak_growth(run_steps, images.device)
    saved, composed = _saved_for_backward(training, images, labels)
    return Footprint(peak, saved, composed)


def _random_batch(config: Config, image_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, config.channels, image_size, image_size)
    images = torch.randn(shape, generator=generator)
    labels = torch.randint(config.classes, (config.batch_size,), generator=generator)
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    images = images.to(config.device, dtype, memory_format=memory_format(config))
    return images, labels.to(config.device)


def _peak_growth(run: Callable[[], None], device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    before_rss = _process_status("VmRSS")
    _reset_high_water_mark()
    run()
    peak = _process_status("VmHWM")
    return None if peak is None or before_rss is None else peak - before_rss


def _process_status(field: str) -> int | None:
    """Bytes of a memory field of ``/proc/self/status``.

    Not ``getrusage``'s ru_maxrss: across fork and exec Linux lets a child inherit its parent's.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith(field + ":")), None)
    return None if kilobytes is None else 1024 * int(kilobytes)


def _reset_high_water_mark() -> None:
    """Set VmHWM to the present VmRSS, so that only what follows counts.

    Some containers refuse it. In this process, where building the network and the tiny step are
    all that came before, the mark is then hardly above VmRSS, and far below the coming peak.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _saved_for_backward(
    training: Training, images: Tensor, labels: Tensor
) -> tuple[int, dict[str, str]]:
    model = training.model
    permanent = {
        tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]
    }
    saved: dict[int, torch.UntypedStorage] = {}  # holds the storages, so no address is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in permanent:
            saved[storage.data_ptr()] = storage
        return tensor

    composed: dict[str, str] = {}
    handles = [
        module.register_forward_pre_hook(_note_reason(composed, name))
        for name, module in model.named_modules()
        if hasattr(module, "why_not_fused")
    ]
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        training.loss(images, labels)
    for handle in handles:
        handle.remove()
    return sum(storage.nbytes() for storage in saved.values()), composed


def _note_reason(
    composed: dict[str, str], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        reason = module.why_not_fused(inputs[0])
        if reason is not None:
            composed[name] = reason

    return hook
