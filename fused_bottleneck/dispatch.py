"""Which implementation runs: the one place that knows about devices."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import extension
from .cpu import CpuStages
from .cpu_products import CpuProductStages
from .kernels import launch
from .operands import Geometry
from .stages import Stages

OLDEST_ARCHITECTURE = (8, 0)  # asynchronous copies, bfloat16 and tf32 products
# Triton 3.6 fails an assertion where it moves a transposed operand to these GPUs' tensor memory.
TENSOR_MEMORY_MAJORS = (10, 11)
OLDEST_TRITON_FOR_THEM = (3, 7)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNEL_MULTIPLE = 16  # 32 bytes: a tile's rows start aligned, and none is cut inside a vector
LARGEST_KERNEL = 32  # taps of a row or column: a bit of a word each, in the kernels of conv2d.py
MASK_MULTIPLE = 32  # the output's mask is read and written in words

# The weight and the geometry of a convolution.
Shape = tuple[Tensor, Geometry]


def stages_for(x: Tensor, convs: Sequence[Shape]) -> Stages:
    """The implementation of the stages for x's device, for one run of a program.

    convs: the convolutions of the program. CPU: the C++ passes where the extension is there, in
    float32 with this library's own products where the instruction set has them. CUDA: the Triton
    kernels where they can take these convolutions. Everything else: plain PyTorch.
    """
    if x.device.type == "cpu" and extension.loaded():
        products = x.dtype == torch.float32 and extension.has_products()
        return CpuProductStages() if products else CpuStages()
    if _on_kernels(x) and why_no_kernels(x, convs) is None:
        return _kernels()(x)
    return Stages()


_replacement: Callable[[Tensor], Stages] | None = None


def _kernels() -> Callable[[Tensor], Stages]:
    if _replacement is not None:
        return _replacement
    from .triton_stages import TritonStages  # imports triton

    return TritonStages


@contextmanager
def replaced_kernels(stages: Callable[[Tensor], Stages]) -> Iterator[None]:
    """Another class in place of the Triton stages, made of a program's input: for tuning."""
    global _replacement
    previous, _replacement = _replacement, stages
    try:
        yield
    finally:
        _replacement = previous


def _on_kernels(x: Tensor) -> bool:
    """Whether x is where kernels run, or where their calls are being listed."""
    return x.device.type == "cuda" or (x.device.type == "meta" and launch.is_recording())


def why_no_kernels(x: Tensor, convs: Sequence[Shape]) -> str | None:
    """Why no fused kernels of x's device take these convolutions, in one sentence; None if they
    do, as on CPU they always do."""
    if x.device.type == "cpu":
        return None
    if x.dtype not in KERNEL_DTYPES:
        return f"there are no fused {x.device.type} kernels for {x.dtype}"
    for weight, geometry in convs:
        out_channels, channels = weight.shape[:2]
        if geometry.groups > 1:
            return f"the fused kernels take no grouped convolutions, got groups={geometry.groups}"
        if max(weight.shape[2:]) > LARGEST_KERNEL:
            return (
                f"the fused kernels take convolutions of up to {LARGEST_KERNEL} taps a side, got "
                f"{tuple(weight.shape[2:])}"
            )
        if out_channels % CHANNEL_MULTIPLE or channels % CHANNEL_MULTIPLE:
            return (
                f"the fused kernels need channels in multiples of {CHANNEL_MULTIPLE}, got a "
                f"convolution of {channels} to {out_channels}"
            )
    if len(convs) > 1 and convs[2][0].shape[0] % MASK_MULTIPLE:
        return (
            f"the fused kernels need output channels in multiples of {MASK_MULTIPLE}, got "
            f"{convs[2][0].shape[0]}"
        )
    return _why_no_device(x)


def _why_no_device(x: Tensor) -> str | None:
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return None
    if x.device.type != "cuda":
        return f"there are no fused kernels for {x.device.type} yet"
    return _why_not_this_gpu(x.device.index)


@lru_cache
def _why_not_this_gpu(index: int) -> str | None:
    if torch.version.hip is not None:
        return "there are no fused kernels for ROCm yet"
    if find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(index)
    if capability[0] in TENSOR_MEMORY_MAJORS and _triton_version() < OLDEST_TRITON_FOR_THEM:
        return "triton before 3.7 does not compile the fused kernels for this GPU"
    if capability < OLDEST_ARCHITECTURE:
        return (
            f"the fused kernels need compute capability {OLDEST_ARCHITECTURE[0]}."
            f"{OLDEST_ARCHITECTURE[1]}, got {capability[0]}.{capability[1]}"
        )
    return None


def _triton_version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
