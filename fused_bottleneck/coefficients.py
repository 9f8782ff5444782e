"""The coefficient ops of csrc/ops.cpp on CPU: compositions of algebra.py.

On CUDA each is one launch (csrc/cuda/coefficients.cu, junctions.cu); these give the same schemas a
meaning on every machine, for the stages that call them and as their oracle.
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


def folded_weight(weight: Tensor, gamma: Tensor | None, invstd: Tensor) -> Tensor:
    """``algebra.folded_weight``."""
    scale = algebra.bn_scale(gamma, invstd)
    return algebra.folded_weight(weight.to(invstd.dtype), scale, weight.dtype)


def fold(
    weight: Tensor,
    cov: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: Tensor,
    mean_d: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``algebra.fold_forward``: the folded weight, ``weight cov``, the reported moments ``[2, W]``,
    and invstd, offset, shift ``[3, W]``."""
    folded, mean, var, invstd, offset, weight_cov = algebra.fold_forward(
        weight, cov, gamma, beta, bias, eps, centre, mean_d
    )
    vectors = torch.stack([invstd, offset, folded.shift])
    return folded.weight, weight_cov, torch.stack([mean, var]), vectors


def fold_backward(
    weight: Tensor,
    gamma: Tensor | None,
    invstd: Tensor,
    offset: Tensor,
    centre: Tensor,
    mean_d: Tensor | None,
    weight_cov: Tensor | None,
    a: Tensor,
    s: Tensor,
    sum_g: Tensor,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``algebra.fold_backward``: the gradients of the weight, and of gamma and the bias ``[2, W]``;
    b and shift, empty where statistics are fixed."""
    dweight, dgamma, dbias, (_, b, shift) = algebra.fold_backward(
        weight, gamma, invstd, offset, centre, mean_d, weight_cov, a, s, sum_g, count
    )
    b = weight.new_empty(0, 0) if b is None else b
    shift = invstd.new_empty(0) if shift is None else shift
    return dweight.to(weight.dtype), torch.stack([dgamma, dbias]), b, shift


# Fake kernels: shapes and dtypes of the results.


def _fake_bn_coefficients(mean: Tensor, *args: object) -> Tensor:
    return mean.new_empty(4, mean.shape[0])


def _fake_bn_backward_coefficients(invstd: Tensor, *args: object) -> Tensor:
    return invstd.new_empty(2, invstd.shape[0])


def _fake_folded_weight(weight: Tensor, *args: object) -> Tensor:
    return torch.empty_like(weight)


def _fake_fold(weight: Tensor, cov: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc, width = algebra.accumulation_dtype(weight.dtype), weight.shape[0]
    vectors = [weight.new_empty(count, width, dtype=acc) for count in (2, 3)]
    return torch.empty_like(weight), torch.empty_like(weight, dtype=acc), vectors[0], vectors[1]


def _fake_fold_backward(
    weight: Tensor,
    gamma: Tensor | None,
    invstd: Tensor,
    offset: Tensor,
    centre: Tensor,
    mean_d: Tensor | None,
    *args: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, channels = weight.shape
    side = 0 if mean_d is None else channels
    b, shift = weight.new_empty(side, side), invstd.new_empty(side)
    return torch.empty_like(weight), invstd.new_empty(2, width), b, shift


KERNELS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "bn_coefficients": (bn_coefficients, _fake_bn_coefficients),
    "bn_backward_coefficients": (bn_backward_coefficients, _fake_bn_backward_coefficients),
    "folded_weight": (folded_weight, _fake_folded_weight),
    "fold": (fold, _fake_fold),
    "fold_backward": (fold_backward, _fake_fold_backward),
}


def register(library: torch.library.Library) -> None:
    """Give the ops, whose schemas are defined, their CPU kernels and their fakes."""
    for name, (kernel, fake) in KERNELS.items():
        library.impl(name, kernel, "CPU")
        torch.library.register_fake(f"fused_bottleneck::{name}", fake, lib=library)
