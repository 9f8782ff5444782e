"""The coefficient algebra between the stages: small, exact, one function per formula.

Symbols (docs/algebra.md derives them; tests/test_algebra.py checks each against autograd):

* ``Q`` pixels, ``K`` operand channels, ``W`` output channels of a 1x1 convolution.
* ``D`` ``[Q, K]``: the centred operand, ``D = a - centre`` for a constant vector ``centre``.
* ``mean_d`` ``[K]``, ``cov`` ``[K, K]``: mean and (biased) covariance of the rows of D;
  ``weight_cov`` ``[W, K]``: the product ``weight cov``.
* ``scale = gamma * invstd``; ``xhat = (y - mean) * invstd``.
* ``g = grad_out * [out > 0]``, ``sum_g`` its column sums, ``S = g^T D`` ``[W, K]``.

All vectors and matrices here are in the accumulation dtype (``accumulation_dtype``), whatever the
dtype of the activations. A weight enters every formula as the product sees it, that is rounded to
the compute dtype first.

With *batch* statistics a normalisation uses the mean and variance of its input; with *fixed*
statistics (eval mode, frozen) it uses given ones, and the terms that come from differentiating the
statistics vanish.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and coefficients: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_std(var: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(var + eps)``, ``[C]``."""
    return torch.rsqrt(var + eps)


def bn_scale(gamma: Tensor | None, invstd: Tensor) -> Tensor:
    """``gamma * invstd``, ``[C]``; gamma None counts as one (affine=False)."""
    return invstd if gamma is None else gamma.to(invstd.dtype) * invstd


def relu_of_shift(beta: Tensor | None, like: Tensor) -> Tensor:
    """``relu(beta)``, ``[C]``: what relu(BN(y)) is where y equals its mean; the natural centre."""
    return torch.zeros_like(like) if beta is None else torch.relu(beta.to(like.dtype))


class BnBackward(NamedTuple):
    """Coefficients of ``dy = scale * (g - k0 - (y - mean) * k1)``; k0, k1 None when fixed."""

    scale: Tensor
    k0: Tensor | None
    k1: Tensor | None


def bn_backward_coefficients(
    scale: Tensor, invstd: Tensor, sum_g: Tensor, sum_g_xhat: Tensor, count: int, batch: bool
) -> BnBackward:
    """The gradient of a batch normalisation as an elementwise map of (g, y).

    ``dy = scale * (g - sum_g/count - xhat * sum_g_xhat/count)`` with batch statistics,
    ``dy = scale * g`` with fixed ones. ``sum_g`` is dbeta and ``sum_g_xhat`` is dgamma.
    """
    if not batch:
        return BnBackward(scale, None, None)
    return BnBackward(scale, sum_g / count, invstd * sum_g_xhat / count)


# A 1x1 convolution followed by a normalisation, folded into one product (conv3+bn3, downsample).


def folded_variance(weight: Tensor, weight_cov: Tensor) -> Tensor:
    """Variance of ``D weight^T`` per output channel: ``rowsum((weight cov) * weight)``, ``[W]``.

    Clamped at zero: a rank-deficient covariance can round to slightly below it.
    """
    return (weight_cov * weight).sum(1).clamp_min_(0)


def folded_offset(
    weight: Tensor, centre: Tensor, mean_d: Tensor | None, fixed_mean: Tensor | None
) -> Tensor:
    """``weight centre - mean``, ``[W]``, where mean is that of the convolution's output.

    Then ``xhat = invstd * (D weight^T + offset)``. With batch statistics the mean is
    ``weight (mean_d + centre)``, so the offset is ``-weight mean_d`` and the centre cancels.
    Fixed statistics do not cancel it: that difference is taken in float64.
    """
    if mean_d is not None:
        return -(weight @ mean_d)
    assert fixed_mean is not None
    offset = weight.double() @ centre.double() - fixed_mean.double()
    return offset.to(weight.dtype)


class Folded(NamedTuple):
    """One product ``D weight^T + shift`` that equals BN(conv(a)); weight in the compute dtype."""

    weight: Tensor
    shift: Tensor


def folded_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``round(scale * weight)``, ``[W, K]`` in the compute dtype: Wf, and a of the gradient."""
    return (scale[:, None] * weight).to(dtype)


def fold(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor,
    beta: Tensor | None,
    mean_d: Tensor | None,
    dtype: torch.dtype,
) -> Folded:
    """Fold a normalisation into the convolution before it.

    ``weight_f = round(scale * weight)``; ``shift = beta - weight_f mean_d`` with batch statistics
    (with the rounded weight, so that the mean of the output is exactly beta), else
    ``beta + scale * offset``.
    """
    folded = folded_weight(weight, scale, dtype)
    shift = scale * offset if mean_d is None else -(folded.to(weight.dtype) @ mean_d)
    if beta is not None:
        shift = shift + beta.to(shift.dtype)
    return Folded(folded, shift)


class FoldForward(NamedTuple):
    """A normalisation with batch statistics folded into the convolution before it: the folded
    convolution, mean (with the bias) and biased variance of its output, invstd and offset ``[W]``,
    and ``weight cov`` ``[W, K]``."""

    folded: Folded
    mean: Tensor
    var: Tensor
    invstd: Tensor
    offset: Tensor
    weight_cov: Tensor


def fold_forward(
    weight: Tensor,
    cov: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: Tensor,
    mean_d: Tensor,
) -> FoldForward:
    """From mean_d and cov to the folded convolution, for a weight in the compute dtype.

    In float64 up to invstd, whose roundings would be those of a difference (docs/algebra.md).
    """
    wide = weight.double()
    arguments = gamma, beta, bias, eps, centre, mean_d.double()
    return fold_product(wide, wide @ cov.double(), *arguments, weight.dtype)


def fold_product(
    weight: Tensor,
    weight_cov: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: Tensor,
    mean_d: Tensor,
    dtype: torch.dtype,
) -> FoldForward:
    """From ``weight cov`` to the folded convolution in the compute dtype; up to invstd in that of
    weight, weight_cov and mean_d."""
    acc = accumulation_dtype(dtype)
    var = folded_variance(weight, weight_cov)
    mean = weight @ (mean_d + centre)
    offset = folded_offset(weight, centre, mean_d, None).to(acc)
    invstd = inverse_std(var, eps).to(acc)
    scale = bn_scale(gamma, invstd)
    folded = fold(weight.to(acc), scale, offset, beta, mean_d.to(acc), dtype)
    reported = (mean if bias is None else mean + bias).to(acc)
    return FoldForward(folded, reported, var.to(acc), invstd, offset, weight_cov.to(acc))


def folded_dgamma(
    weight: Tensor, invstd: Tensor, offset: Tensor, s: Tensor, sum_g: Tensor
) -> Tensor:
    """``sum(g * xhat) = invstd * (rowsum(S * weight) + offset * sum_g)``, ``[W]``."""
    return invstd * ((s * weight).sum(1) + offset * sum_g)


def folded_dweight(
    scale: Tensor,
    invstd: Tensor,
    centre: Tensor,
    mean_d: Tensor | None,
    weight_cov: Tensor | None,
    s: Tensor,
    sum_g: Tensor,
    dgamma: Tensor,
) -> Tensor:
    """Gradient of the convolution's weight, ``[W, K]``.

    Batch: ``scale * (S - sum_g mean_d^T - (dgamma * invstd) * (weight cov))``;
    fixed: ``scale * (S + sum_g centre^T)``. Scales multiply rows.
    """
    if mean_d is None or weight_cov is None:
        grad = torch.addr(s, sum_g, centre)
    else:
        grad = torch.addr(s, sum_g, mean_d, alpha=-1)
        grad.addcmul_((dgamma * invstd)[:, None], weight_cov, value=-1)
    return grad.mul_(scale[:, None])


def synchronised_dweight(
    weight: Tensor,
    scale: Tensor,
    invstd: Tensor,
    centre: Tensor,
    mean_d: Tensor,
    weight_cov: Tensor,
    deviation: Tensor,
    s: Tensor,
    sum_g: Tensor,
    shared_sum_g: Tensor,
    shared_dgamma: Tensor,
) -> tuple[Tensor, Tensor]:
    """This rank's part of the weight's gradient ``[W, K]`` and of ``sum(dy)`` ``[W]``, behind
    statistics over several ranks.

    mean_d is the operand's mean over all ranks less this rank's centre, ``mean_d + deviation`` that
    over this rank; weight_cov is of this rank's covariance; shared_sum_g and shared_dgamma are
    this rank's fraction of the sums over all ranks. With ``xhat = invstd (D weight^T + offset)``
    and ``k = invstd shared_dgamma``, row by row:

    ``h = shared_sum_g + k (weight deviation)``, which sums g's mean and xhat's part over this rank;
    ``sum(dy) = scale (sum_g - h)``, zero over all ranks together;
    ``dW = scale (S - h (mean_d + deviation)^T - k (weight cov)) + sum(dy) centre^T``.
    """
    k = invstd * shared_dgamma
    h = shared_sum_g + k * (weight @ deviation)
    grad = torch.addr(s, h, mean_d + deviation, alpha=-1)
    grad.addcmul_(k[:, None], weight_cov, value=-1).mul_(scale[:, None])
    sum_dy = scale * (sum_g - h)
    return grad.addr_(sum_dy, centre), sum_dy


class OperandGrad(NamedTuple):
    """``grad_a = g a + D b + shift``: matrices in the compute dtype; b, shift None when fixed."""

    a: Tensor
    b: Tensor | None
    shift: Tensor | None


def folded_operand_grad(
    weight: Tensor,
    a: Tensor,
    scale: Tensor,
    invstd: Tensor,
    mean_d: Tensor | None,
    sum_g: Tensor,
    dgamma: Tensor,
    count: int,
) -> OperandGrad:
    """Gradient of the operand as one product over ``[g | D]``.

    ``a`` is ``folded_weight``. With batch statistics also
    ``b = -weight^T diag(scale * invstd * dgamma / count) weight`` ``[K, K]`` (rounded) and
    ``shift = -(sum_g / count) a - mean_d b`` ``[K]``: with the rounded a and b, so that the sum of
    the gradient over the pixels is zero, as behind any batch normalisation.
    """
    if mean_d is None:
        return OperandGrad(a, None, None)
    k = folded_factor(scale, invstd, dgamma, count)
    b = (weight.t() @ (-k[:, None] * weight)).to(a.dtype)
    return OperandGrad(a, b, operand_shift(a, b, sum_g, mean_d, count))


def folded_factor(scale: Tensor, invstd: Tensor, dgamma: Tensor, count: int) -> Tensor:
    """``k = scale * invstd * dgamma / count``, ``[W]``: b is ``-weight^T diag(k) weight``."""
    return scale * invstd * dgamma / count


def operand_shift(a: Tensor, b: Tensor, sum_g: Tensor, mean_d: Tensor, count: int) -> Tensor:
    """``-(sum_g / count) a - mean_d b``, ``[K]``: the constant of the operand's gradient."""
    return -((sum_g / count) @ a.to(sum_g.dtype)) - mean_d @ b.to(sum_g.dtype)


class FoldBackward(NamedTuple):
    """The gradients of a folded unit's weight ``[W, K]``, gamma and convolution's bias ``[W]``, and
    the coefficients of its operand's gradient."""

    dweight: Tensor
    dgamma: Tensor
    dbias: Tensor
    coefficients: OperandGrad


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
) -> FoldBackward:
    """From ``S = g^T D`` and sum_g over count pixels to a folded unit's gradients, for a weight in
    the compute dtype. mean_d and weight_cov None: fixed statistics.

    In float64, as its sums are small against their terms where channels go together. The bias's
    gradient is the sum of dy: zero before batch statistics, ``scale * sum_g`` otherwise.
    """
    acc, matrix = invstd.dtype, weight.double()
    invstd, offset, centre = invstd.double(), offset.double(), centre.double()
    s, sum_g = s.double(), sum_g.double()
    if mean_d is not None and weight_cov is not None:
        mean_d, weight_cov = mean_d.double(), weight_cov.double()
    scale = bn_scale(gamma, invstd)
    dgamma = folded_dgamma(matrix, invstd, offset, s, sum_g)
    dweight = folded_dweight(scale, invstd, centre, mean_d, weight_cov, s, sum_g, dgamma)
    _, b, shift = folded_operand_grad(matrix, a, scale, invstd, mean_d, sum_g, dgamma, count)
    dbias = scale * sum_g if mean_d is None else torch.zeros_like(sum_g)
    coefficients = OperandGrad(a, b, None if shift is None else shift.to(acc))
    return FoldBackward(dweight.to(acc), dgamma.to(acc), dbias.to(acc), coefficients)
