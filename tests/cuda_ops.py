"""The CUDA library's ops as tests call them: on a GPU where there is one, and everywhere on the CPU
with the kernels compiled as C++ (cuda_emulation.py)."""

from collections.abc import Callable
from typing import Any

import cuda_emulation
import pytest
import torch
from torch import Tensor

from fused_bottleneck import extension

HAS_GPU = torch.cuda.is_available() and not extension.why_no_cuda()
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU and passes")]
IMPLEMENTATIONS = [
    pytest.param("emulated", marks=pytest.mark.slow),
    pytest.param("cuda", marks=ON_GPU),
]


def on_gpu(t: Tensor) -> Tensor:
    """A copy on the GPU; of a contiguous tensor one that begins as far behind the start of its
    memory."""
    if not t.is_contiguous():
        return t.cuda()
    offset = t.storage_offset()
    memory = torch.empty(offset + t.numel(), dtype=t.dtype, device="cuda")
    return memory[offset:].view(t.shape).copy_(t)


class OnGpu:
    """The ops of the library, on GPU copies of their arguments; what they write is copied back."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.fused_bottleneck, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            copies: dict[int, tuple[Tensor, Tensor]] = {}

            def move(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                return copies.setdefault(id(value), (value, on_gpu(value)))[1]

            result = op(*map(move, args), **{key: move(v) for key, v in kwargs.items()})
            for value, copy in copies.values():
                value.copy_(copy)
            if isinstance(result, Tensor):
                return result.cpu()
            return None if result is None else tuple(t.cpu() for t in result)

        call.default = op.default  # type: ignore[attr-defined]
        return call


def implementation(name: str) -> Any:
    """The ops of an entry of IMPLEMENTATIONS."""
    if name == "cuda":
        return OnGpu()
    if not cuda_emulation.available():
        pytest.skip("no C++ compiler")
    return cuda_emulation.load()


def shifted(t: Tensor) -> Tensor:
    """A contiguous copy of t, one element behind the start of its memory."""
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return memory[1:].view(t.shape).copy_(t)


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)
