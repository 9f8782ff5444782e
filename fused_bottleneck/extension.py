"""Loads the C++ passes (``fused_bottleneck/_C.abi3.so``) as ``torch.ops.fused_bottleneck.*``, and
their CUDA implementation (``_C_cuda.abi3.so``) when it is first asked for.

The package works without them, through torch's own operators, more slowly: ``loaded()`` says which
of the two it is, and warns once, with the reason, when it is the second. ``csrc/ops.cpp`` has the
schemas and their meaning; here they get fake kernels, so that ``torch.compile`` and ``opcheck`` can
run them on tensors without data.
"""

import os
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import coefficients
from .algebra import accumulation_dtype

_HOW_TO_BUILD_CUDA = (
    "To build it: as the C++ extension, with nvcc on the PATH or CUDA_HOME set, and without "
    "FUSED_BOTTLENECK_BUILD_CUDA=0."
)
_HOW_TO_BUILD = (
    "To build it: pip install --no-build-isolation . (or, in a checkout, "
    "python setup.py build_ext --inplace), with a C++ compiler."
)

_lock = threading.Lock()
_loaded: bool | None = None  # None: not tried yet
_reason = ""  # why it is not loaded
_warned = False


def load() -> bool:
    """Loads the library at the first call; returns whether it is there. Never raises, never warns.

    FUSED_BOTTLENECK_NO_EXTENSION=1 in the environment, read at the first call, leaves it out.
    """
    global _loaded, _reason
    with _lock:
        if _loaded is None:
            _reason = _try_to_load()
            _loaded = _reason == ""
        return _loaded


def loaded() -> bool:
    """Whether the C++ passes can be called; warns once, with the reason, if they cannot."""
    if _loaded:
        return True
    if not load():
        _warn_once()
    return bool(_loaded)


def reason() -> str:
    """Why the C++ passes are not loaded; empty if they are."""
    load()
    return _reason


def has_products(dtype: torch.dtype = torch.float32) -> bool:
    """Whether the library is there and has fused 1x1 products of that dtype for this CPU."""
    return loaded() and _has_products(dtype)


@cache  # the instruction set is chosen once
def _has_products(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.fused_bottleneck.has_pair_products()
    return dtype == torch.float32 and torch.ops.fused_bottleneck.has_products()


@cache
def why_no_cuda() -> str:
    """Why the CUDA passes cannot be called; empty if they can. Loads them at the first call."""
    if not load():
        return _reason
    libraries = _libraries("_C_cuda")
    if not libraries:
        return f"there is no _C_cuda.*.so in {Path(__file__).parent}. {_HOW_TO_BUILD_CUDA}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        return f"loading {libraries[0]} failed: {error.__cause__ or error}. {_HOW_TO_BUILD_CUDA}"
    return ""


def _libraries(name: str) -> list[Path]:
    """The files of a library, the one for this Python or the stable ABI first."""
    return sorted(Path(__file__).parent.glob(f"{name}.*so"))


def _warn_once() -> None:
    global _warned
    if _warned or torch.compiler.is_compiling():
        return
    with _lock:
        first, _warned = not _warned, True
    if first:
        warnings.warn(
            f"fused_bottleneck runs without its C++ extension, more slowly: {_reason}",
            RuntimeWarning,
            stacklevel=3,
        )


def _try_to_load() -> str:
    """Loads the library and registers the fake kernels; returns what went wrong, or nothing."""
    if os.environ.get("FUSED_BOTTLENECK_NO_EXTENSION") == "1":
        return "FUSED_BOTTLENECK_NO_EXTENSION=1 is set."
    libraries = _libraries("_C")
    if not libraries:
        return f"there is no _C.*.so in {Path(__file__).parent}. {_HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(libraries[0]))
        _register_fakes()
    except (OSError, RuntimeError) as error:
        # torch says only that it could not; the dynamic linker's reason is the cause.
        return f"loading {libraries[0]} failed: {error.__cause__ or error}. {_HOW_TO_BUILD}"
    return ""


def _column_vector(matrix: Tensor) -> Tensor:
    return matrix.new_empty(matrix.shape[1], dtype=accumulation_dtype(matrix.dtype))


def _fake_nothing(*args: object) -> None:
    """Of the passes that only write into their last arguments."""


def _fake_one_vector(matrix: Tensor, *args: object) -> Tensor:
    return _column_vector(matrix)


def _fake_two_vectors(matrix: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return _column_vector(matrix), _column_vector(matrix)


def _fake_transposed_product(a: Tensor, b: Tensor, workspace: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], b.shape[1], dtype=torch.float32)


def _fake_gram(d: Tensor, workspace: Tensor) -> tuple[Tensor, Tensor]:
    k = d.shape[1]
    return d.new_empty(k, dtype=torch.float64), d.new_empty(k, k, dtype=torch.float64)


def _fake_masked_products(
    grad_out: Tensor, mask: Tensor, d: Tensor, *args: object
) -> tuple[Tensor, Tensor]:
    s = grad_out.new_empty(grad_out.shape[1], d.shape[1], dtype=torch.float32)
    return _column_vector(grad_out), s


def _fake_fold_product(weight: Tensor, *args: object) -> tuple[Tensor, ...]:
    vectors = [weight.new_empty(weight.shape[0]) for _ in range(5)]
    return torch.empty_like(weight), *vectors, weight.new_empty((), dtype=torch.float64)


def _fake_fold_backward(weight: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    width, k = weight.shape
    return weight.new_empty(width), weight.new_empty(k, k), weight.new_empty(k)


def _fake_product_vectors(a: Tensor, weight: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return _column_vector(weight), _column_vector(weight)


def _fake_winograd_weight_grad(grad: Tensor, x: Tensor, *args: object) -> Tensor:
    return grad.new_empty(grad.shape[3], 3, 3, x.shape[3])


_FAKES: dict[str, Callable[..., object]] = {
    "channel_moments": _fake_two_vectors,
    "bn_apply_": _fake_nothing,
    "residual_relu_": _fake_nothing,
    "mask_grad_": _fake_one_vector,
    "masked_add_": _fake_nothing,
    "transpose_": _fake_nothing,
    "bn_backward_reduce_": _fake_two_vectors,
    "bn_backward_": _fake_nothing,
    "masked_bn_backward_reduce": _fake_two_vectors,
    "masked_bn_backward_": _fake_nothing,
    "bn_relu_pool_": _fake_nothing,
    "pool_bn_backward_reduce": _fake_two_vectors,
    "pool_bn_backward_": _fake_nothing,
    "product_": _fake_nothing,
    "product_add_": _fake_nothing,
    "product_moments_": _fake_product_vectors,
    "product_residual_relu_": _fake_nothing,
    "product_masked_add_": _fake_nothing,
    "product_bn_backward_reduce_": _fake_product_vectors,
    "masked_products_": _fake_masked_products,
    "transposed_product": _fake_transposed_product,
    "gram": _fake_gram,
    "gram_in_double": _fake_gram,
    "fold_product": _fake_fold_product,
    "fold_backward_": _fake_fold_backward,
    "winograd_conv_": _fake_nothing,
    "winograd_weight_grad": _fake_winograd_weight_grad,
    "advise_huge_pages_": _fake_nothing,
    "discard_pages_": _fake_nothing,
}


_registrations = torch.library.Library("fused_bottleneck", "FRAGMENT")  # as long as it lives


def _register_fakes() -> None:
    coefficients.register(_registrations)
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"fused_bottleneck::{name}", fake)
