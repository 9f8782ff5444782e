"""Which implementation runs: the one place that knows about devices."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import extension
from .cpu import CpuStages
from .cpu_block import CpuBlockStages
from .cpu_products import CpuProductStages
from .kernels import launch
from .operands import Geometry
from .rules import own_products
from .stages import EmptyStages, Stages
from .vendor import VendorStages

BACKENDS = ("triton", "vendor", "torch")
BACKEND_VARIABLE = "FUSED_BOTTLENECK_BACKEND"
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


def stages_for(x: Tensor, convs: Sequence[Shape], backend: str | None = None) -> Stages:
    """The implementation of the stages for x's device, for one run of a program.

    convs: the convolutions of the program. backend: one of ``BACKENDS``; None for the environment
    variable FUSED_BOTTLENECK_BACKEND, or the choice of ``default_backend``.

    * "triton": the Triton kernels.
    * "vendor": the vendor's convolutions (oneDNN, cuDNN) with this library's passes; on CPU in
      float32 and bfloat16 with this library's own products where it has them and nothing else was
      asked for.
    * "torch": plain PyTorch.

    Raises:
        RuntimeError: a backend was asked for that cannot serve.
    """
    asked = requested_backend(backend)
    if asked is not None:
        _require(asked, x, convs)
    if x.numel() == 0:
        return EmptyStages()
    chosen = asked or default_backend(x, convs)
    if chosen == "triton":
        return _kernels()(x)
    if chosen == "torch":
        return Stages()
    if x.device.type != "cpu":
        return VendorStages()
    if asked is not None or not own_products(x.dtype):
        return CpuStages()
    return CpuBlockStages() if x.dtype == torch.float32 else CpuProductStages()


def pools(x: Tensor) -> bool:
    """Whether there is more for conv+BN+ReLU and a max pooling as one than for each by itself: the
    CPU's passes, where nothing else is asked for."""
    asked = requested_backend(None)
    return x.device.type == "cpu" and asked in (None, "vendor") and extension.loaded()


def requested_backend(backend: str | None) -> str | None:
    """The backend of the argument or the environment variable, if one is asked for."""
    asked = backend or os.environ.get(BACKEND_VARIABLE) or None
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {asked!r}")
    return asked


def default_backend(x: Tensor, convs: Sequence[Shape]) -> str:
    """What serves where nothing is asked for: the measured table's entry, else the Triton kernels
    where they are legal, else the vendor's convolutions where the passes are there, else torch."""
    legal = [name for name in BACKENDS if _why_not(name, x, convs) is None]
    measured = MEASURED.get(measured_key(x, convs)) if x.device.type == "cuda" else None
    return measured if measured in legal else legal[0]


# The fastest backend by GPU and block, from measurements; empty as long as there are none. An entry
# is added where a benchmark shows that the default (the first legal one of BACKENDS) loses.
MeasuredKey = tuple[tuple[int, int], torch.dtype, tuple[int, ...], tuple[tuple[int, ...], ...]]
MEASURED: dict[MeasuredKey, str] = {}


def measured_key(x: Tensor, convs: Sequence[Shape]) -> MeasuredKey:
    """Compute capability, dtype, shape of x, and shapes of the weights."""
    weights = tuple(tuple(weight.shape) for weight, _ in convs)
    return torch.cuda.get_device_capability(x.device), x.dtype, tuple(x.shape), weights


def _why_not(backend: str, x: Tensor, convs: Sequence[Shape]) -> str | None:
    """Why a backend cannot serve, in one sentence; None if it can."""
    if backend == "triton":
        if not _on_kernels(x):
            return f"the Triton kernels do not run on {x.device.type} tensors"
        return _why_no_triton(x, convs)
    if backend == "vendor":
        if x.device.type == "cpu":
            return None if extension.loaded() else extension.reason()
        return _why_no_passes(x)
    return None


def _require(backend: str, x: Tensor, convs: Sequence[Shape]) -> None:
    reason = _why_not(backend, x, convs)
    if reason is not None:
        raise RuntimeError(f"the backend {backend!r} was asked for, and cannot serve: {reason}")


def _why_no_passes(x: Tensor) -> str | None:
    """Why the CUDA passes cannot serve."""
    if x.device.type != "cuda":
        return f"there are no passes for {x.device.type} tensors"
    if torch.version.hip is not None:
        return "there are no passes for ROCm"
    return extension.why_no_cuda() or None


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
    """Why nothing of this library takes these convolutions on x's device, in one sentence; None if
    something does, as on CPU it always does.

    Where a backend is asked for it is ``stages_for`` that says why it cannot serve. While compiling
    only the Triton kernels count: what the vendor's libraries would do is the compiler's work.
    """
    if x.device.type == "cpu" or requested_backend(None) is not None:
        return None
    if not torch.compiler.is_compiling() and _why_no_passes(x) is None:
        return None
    return _why_no_triton(x, convs)


def _why_no_triton(x: Tensor, convs: Sequence[Shape]) -> str | None:
    """Why the Triton kernels do not take these convolutions."""
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
