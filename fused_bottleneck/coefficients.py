"""The coefficient ops of csrc/ops.cpp on CPU: compositions of algebra.py.

On CUDA each is one kernel (csrc/cuda/coefficients.cu); these give the same schemas a meaning on
every machine, for the stages that call them and as their oracle.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import algebra


def bn_coefficients(
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``[invstd, gamma invstd, beta, mean + bias]``, ``[4, C]``."""
    invstd = algebra.inverse_std(var, eps)
    shift = torch.zeros_like(mean) if beta is None else beta.to(mean.dtype)
    reported = mean if bias is None else mean + bias.to(mean.dtype)
    scale = algebra.bn_scale(gamma, invstd)
    return torch.stack([invstd, scale, shift, reported])


def bn_backward_coefficients(
    invstd: Tensor, sum_g: Tensor, sum_g_xhat: Tensor, count: int
) -> Tensor:
    """``[k0, k1]`` of ``algebra.BnBackward``, ``[2, C]``."""
    bn = algebra.bn_backward_coefficients(invstd, invstd, sum_g, sum_g_xhat, count, batch=True)
    assert bn.k0 is not None
    assert bn.k1 is not None
    return torch.stack([bn.k0, bn.k1])


def fold_rows(
    weight: Tensor,
    product: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    centre: Tensor,
    mean_d: Tensor,
) -> tuple[Tensor, Tensor]:
    """``algebra.fold`` with batch statistics, from ``product = weight cov``: the folded weight, and
    mean, var, invstd, offset, shift ``[5, W]``."""
    matrix = weight.to(mean_d.dtype)
    var = algebra.folded_variance(matrix, product)
    offset = algebra.folded_offset(matrix, centre, mean_d, None)
    invstd = algebra.inverse_std(var, eps)
    scale = algebra.bn_scale(gamma, invstd)
    folded = algebra.fold(matrix, scale, offset, beta, mean_d, weight.dtype)
    mean = matrix @ (mean_d + centre)
    return folded.weight, torch.stack([mean, var, invstd, offset, folded.shift])


def fold_backward_rows(
    weight: Tensor,
    gamma: Tensor | None,
    invstd: Tensor,
    offset: Tensor,
    centre: Tensor,
    mean_d: Tensor | None,
    product: Tensor | None,
    s: Tensor,
    sum_g: Tensor,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``algebra.folded_dweight`` and ``folded_dgamma``, and the left side of ``b = weight^T k``."""
    matrix = weight.to(invstd.dtype)
    scale = algebra.bn_scale(gamma, invstd)
    dgamma = algebra.folded_dgamma(matrix, invstd, offset, s, sum_g)
    grad = algebra.folded_dweight(scale, invstd, centre, mean_d, product, s, sum_g, dgamma)
    if product is None:
        scaled = matrix.new_empty(0, matrix.shape[1])
    else:
        scaled = algebra.folded_factor(scale, invstd, dgamma, count)[:, None] * -matrix
    return grad.to(weight.dtype), dgamma, scaled


def operand_shift(a: Tensor, b: Tensor, sum_g: Tensor, mean_d: Tensor, count: int) -> Tensor:
    """``algebra.operand_shift``."""
    return algebra.operand_shift(a, b, sum_g, mean_d, count)


# Fake kernels: shapes and dtypes of the results.


def _fake_bn_coefficients(mean: Tensor, *args: object) -> Tensor:
    return mean.new_empty(4, mean.shape[0])


def _fake_bn_backward_coefficients(invstd: Tensor, *args: object) -> Tensor:
    return invstd.new_empty(2, invstd.shape[0])


def _fake_fold_rows(weight: Tensor, product: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), product.new_empty(5, weight.shape[0])


def _fake_fold_backward_rows(
    weight: Tensor,
    gamma: Tensor | None,
    invstd: Tensor,
    offset: Tensor,
    centre: Tensor,
    mean_d: Tensor | None,
    *args: object,
) -> tuple[Tensor, Tensor, Tensor]:
    width, channels = weight.shape
    scaled = invstd.new_empty(0 if mean_d is None else width, channels)
    return torch.empty_like(weight), torch.empty_like(invstd), scaled


def _fake_operand_shift(a: Tensor, b: Tensor, sum_g: Tensor, mean_d: Tensor, count: int) -> Tensor:
    return torch.empty_like(mean_d)


KERNELS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "bn_coefficients": (bn_coefficients, _fake_bn_coefficients),
    "bn_backward_coefficients": (bn_backward_coefficients, _fake_bn_backward_coefficients),
    "fold_rows": (fold_rows, _fake_fold_rows),
    "fold_backward_rows": (fold_backward_rows, _fake_fold_backward_rows),
    "operand_shift": (operand_shift, _fake_operand_shift),
}


def register(library: torch.library.Library) -> None:
    """Give the ops, whose schemas are defined, their CPU kernels and their fakes."""
    for name, (kernel, fake) in KERNELS.items():
        library.impl(name, kernel, "CPU")
        torch.library.register_fake(f"fused_bottleneck::{name}", fake, lib=library)
