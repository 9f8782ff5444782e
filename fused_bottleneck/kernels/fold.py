"""The algebra between the tail's stages (algebra.py), one kernel per junction and not one per
formula: as torch operations it is a dozen launches each way, as long as a stage at 7x7.

Products are in exact float32: they feed a variance and differences of large sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algebra import FoldBackward, Folded, FoldForward, OperandGrad
from .config import FOLD, FOLD_PRODUCT, FOLD_SHIFT, blocks
from .launch import launch
from .prologues import put_tile, tile


@triton.jit
def _weight_cov_kernel(
    w_ptr,
    cov_ptr,
    weight_cov_ptr,
    W,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``W cov`` ``[W, K]``; cov is symmetric. A program owns a block. FLOPs: 2 W K^2."""
    pid = tl.program_id(0)
    offs_j = pid % tl.cdiv(K, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_w = pid // tl.cdiv(K, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_w, mask_j = offs_w < W, offs_j < K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        w = tile(w_ptr, offs_w, mask_w, K, offs_k, offs_k < K).to(tl.float32)
        cov = tile(cov_ptr, offs_k, offs_k < K, K, offs_j, mask_j)
        acc = tl.dot(w, cov, acc, input_precision="ieee")
    put_tile(weight_cov_ptr, offs_w, mask_w, K, offs_j, mask_j, acc)


def _weight_cov(weight: Tensor, cov: Tensor) -> Tensor:
    """``W cov`` ``[W, K]``, float32, for the kernels of a row each: in them it would be a chain of
    steps in few programs."""
    wide, channels = weight.shape[:2]
    product = torch.empty((wide, channels), dtype=torch.float32, device=weight.device)
    launch(
        _weight_cov_kernel,
        (blocks(wide, FOLD_PRODUCT.block_m) * blocks(channels, FOLD_PRODUCT.block_n),),
        weight,
        cov,
        product,
        wide,
        channels,
        BLOCK_M=FOLD_PRODUCT.block_m,
        BLOCK_N=FOLD_PRODUCT.block_n,
        BLOCK_K=FOLD_PRODUCT.block_k,
        config=FOLD_PRODUCT,
    )
    return product


@triton.jit
def _fold_kernel(
    w_ptr,
    gamma_ptr,
    beta_ptr,
    bias_ptr,
    centre_ptr,
    mean_d_ptr,
    weight_cov_ptr,
    folded_ptr,
    vectors_ptr,
    W,
    K,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``var = rowsum((W cov) * W)``, ``Wf = round(gamma invstd W)``, ``shift = beta - Wf mean_d``.

    W and ``W cov`` ``[W, K]``; vectors ``[5, W]``: mean (with the bias) and variance of the
    convolution's output, invstd, offset, shift. A program owns BLOCK_M rows.
    """
    offs_w = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_w = offs_w < W
    var = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    offset = tl.zeros([BLOCK_M], tl.float32)
    for j in range(0, K, BLOCK_N):
        offs_j = j + tl.arange(0, BLOCK_N)
        mask_j = offs_j < K
        w = tile(w_ptr, offs_w, mask_w, K, offs_j, mask_j).to(tl.float32)
        mean_d = tl.load(mean_d_ptr + offs_j, mask=mask_j, other=0.0)
        centre = tl.load(centre_ptr + offs_j, mask=mask_j, other=0.0)
        product = tile(weight_cov_ptr, offs_w, mask_w, K, offs_j, mask_j)
        var += tl.sum(product * w, 1)
        mean += tl.sum(w * (mean_d + centre)[None, :], 1)
        offset -= tl.sum(w * mean_d[None, :], 1)
    var = tl.maximum(var, 0.0, propagate_nan=tl.PropagateNan.ALL)
    invstd = 1.0 / tl.sqrt_rn(var + eps)
    scale = invstd
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)
    shift = tl.zeros([BLOCK_M], tl.float32)
    if beta_ptr is not None:
        shift = tl.load(beta_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)
    for j in range(0, K, BLOCK_N):
        offs_j = j + tl.arange(0, BLOCK_N)
        mask_j = offs_j < K
        w = tile(w_ptr, offs_w, mask_w, K, offs_j, mask_j).to(tl.float32)
        folded = (scale[:, None] * w).to(folded_ptr.dtype.element_ty)
        where = offs_w[:, None] * K + offs_j[None, :]
        tl.store(folded_ptr + where, folded, mask=mask_w[:, None] & mask_j[None, :])
        mean_d = tl.load(mean_d_ptr + offs_j, mask=mask_j, other=0.0)
        shift -= tl.sum(folded.to(tl.float32) * mean_d[None, :], 1)
    if bias_ptr is not None:
        mean += tl.load(bias_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)
    tl.store(vectors_ptr + offs_w, mean, mask=mask_w)
    tl.store(vectors_ptr + W + offs_w, var, mask=mask_w)
    tl.store(vectors_ptr + 2 * W + offs_w, invstd, mask=mask_w)
    tl.store(vectors_ptr + 3 * W + offs_w, offset, mask=mask_w)
    tl.store(vectors_ptr + 4 * W + offs_w, shift, mask=mask_w)


def fold(
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centre: Tensor,
    mean_d: Tensor,
    cov: Tensor,
) -> FoldForward:
    """The junction of F3 and F4: see ``Stages.fold``. weight ``[W, K, 1, 1]``."""
    wide, channels = weight.shape[:2]
    weight_cov = _weight_cov(weight, cov)
    folded = torch.empty((wide, channels), dtype=weight.dtype, device=weight.device)
    vectors = torch.empty((5, wide), dtype=torch.float32, device=weight.device)
    launch(
        _fold_kernel,
        (blocks(wide, FOLD.block_m),),
        weight,
        gamma,
        beta,
        bias,
        centre,
        mean_d,
        weight_cov,
        folded,
        vectors,
        wide,
        channels,
        eps,
        BLOCK_M=FOLD.block_m,
        BLOCK_N=FOLD.block_n,
        config=FOLD,
    )
    mean, var, invstd, offset, shift = vectors.unbind()
    return FoldForward(Folded(folded, shift), mean, var, invstd, offset, weight_cov)


@triton.jit
def _folded_weight_kernel(
    w_ptr, gamma_ptr, invstd_ptr, folded_ptr, W, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """``Wf = round(gamma invstd W)`` ``[W, K]``."""
    pid = tl.program_id(0)
    offs_k = pid % tl.cdiv(K, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_w = pid // tl.cdiv(K, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_w, mask_k = offs_w < W, offs_k < K
    scale = tl.load(invstd_ptr + offs_w, mask=mask_w, other=0.0)
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)
    w = tile(w_ptr, offs_w, mask_w, K, offs_k, mask_k).to(tl.float32)
    where = offs_w[:, None] * K + offs_k[None, :]
    value = (scale[:, None] * w).to(folded_ptr.dtype.element_ty)
    tl.store(folded_ptr + where, value, mask=mask_w[:, None] & mask_k[None, :])


def folded_weight(weight: Tensor, gamma: Tensor | None, invstd: Tensor) -> Tensor:
    """The coefficient a of the operand's gradient: ``round(gamma invstd W)`` ``[W, K]``."""
    wide, channels = weight.shape[:2]
    folded = torch.empty((wide, channels), dtype=weight.dtype, device=weight.device)
    launch(
        _folded_weight_kernel,
        (blocks(wide, FOLD.block_m) * blocks(channels, FOLD.block_n),),
        weight,
        gamma,
        invstd,
        folded,
        wide,
        channels,
        BLOCK_M=FOLD.block_m,
        BLOCK_N=FOLD.block_n,
        config=FOLD,
    )
    return folded


@triton.jit(do_not_specialize=["count"])
def _fold_backward_kernel(
    w_ptr,
    gamma_ptr,
    invstd_ptr,
    offset_ptr,
    mean_d_ptr,
    weight_cov_ptr,
    s_ptr,
    sum_g_ptr,
    grad_w_ptr,
    vectors_ptr,
    W,
    K,
    count,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dgamma = invstd (rowsum(S * W) + offset sum_g)``, ``k = scale invstd dgamma / count`` and
    ``dW = scale (S - sum_g mean_d^T - dgamma invstd (W cov))``.

    S and ``W cov`` ``[W, K]``; vectors ``[2, W]``: dgamma, k. A program owns BLOCK_M rows.
    """
    offs_w = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_w = offs_w < W
    dot = tl.zeros([BLOCK_M], tl.float32)
    for j in range(0, K, BLOCK_N):
        offs_j = j + tl.arange(0, BLOCK_N)
        w = tile(w_ptr, offs_w, mask_w, K, offs_j, offs_j < K).to(tl.float32)
        dot += tl.sum(tile(s_ptr, offs_w, mask_w, K, offs_j, offs_j < K) * w, 1)
    invstd = tl.load(invstd_ptr + offs_w, mask=mask_w, other=0.0)
    sum_g = tl.load(sum_g_ptr + offs_w, mask=mask_w, other=0.0)
    dgamma = invstd * (dot + tl.load(offset_ptr + offs_w, mask=mask_w, other=0.0) * sum_g)
    scale = invstd
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)
    tl.store(vectors_ptr + offs_w, dgamma, mask=mask_w)
    tl.store(vectors_ptr + W + offs_w, scale * invstd * dgamma / count, mask=mask_w)
    for j in range(0, K, BLOCK_N):
        offs_j = j + tl.arange(0, BLOCK_N)
        mask_j = offs_j < K
        grad = tile(s_ptr, offs_w, mask_w, K, offs_j, mask_j)
        grad -= sum_g[:, None] * tl.load(mean_d_ptr + offs_j, mask=mask_j, other=0.0)[None, :]
        product = tile(weight_cov_ptr, offs_w, mask_w, K, offs_j, mask_j)
        grad = scale[:, None] * (grad - (dgamma * invstd)[:, None] * product)
        where = offs_w[:, None] * K + offs_j[None, :]
        grad = grad.to(grad_w_ptr.dtype.element_ty)
        tl.store(grad_w_ptr + where, grad, mask=mask_w[:, None] & mask_j[None, :])


@triton.jit
def _operand_product_kernel(
    w_ptr,
    k_ptr,
    b_ptr,
    W,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``B = -round(W^T diag(k) W)`` ``[K, K]``. A program owns a block. FLOPs: 2 W K^2."""
    pid = tl.program_id(0)
    offs_j = pid % tl.cdiv(K, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_i = pid // tl.cdiv(K, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_i, mask_j = offs_i < K, offs_j < K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, W, BLOCK_K):
        offs_w = start + tl.arange(0, BLOCK_K)
        mask_w = offs_w < W
        k = tl.load(k_ptr + offs_w, mask=mask_w, other=0.0)
        left = tile(w_ptr, offs_w, mask_w, K, offs_i, mask_i).to(tl.float32)
        right = tile(w_ptr, offs_w, mask_w, K, offs_j, mask_j).to(tl.float32) * k[:, None]
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    where = offs_i[:, None] * K + offs_j[None, :]
    value = (-acc).to(b_ptr.dtype.element_ty)
    tl.store(b_ptr + where, value, mask=mask_i[:, None] & mask_j[None, :])


@triton.jit(do_not_specialize=["count"])
def _operand_shift_kernel(
    a_ptr,
    b_ptr,
    sum_g_ptr,
    mean_d_ptr,
    shift_ptr,
    W,
    K,
    count,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``shift = -(sum_g / count) a - mean_d B`` ``[K]``. A program owns BLOCK_N channels."""
    offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < K
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in range(0, W, BLOCK_K):
        offs_w = start + tl.arange(0, BLOCK_K)
        mask_w = offs_w < W
        g = tl.load(sum_g_ptr + offs_w, mask=mask_w, other=0.0) / count
        total += tile(a_ptr, offs_w, mask_w, K, offs, mask).to(tl.float32) * g[:, None]
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        d = tl.load(mean_d_ptr + offs_k, mask=mask_k, other=0.0)
        total += tile(b_ptr, offs_k, mask_k, K, offs, mask).to(tl.float32) * d[:, None]
    tl.store(shift_ptr + offs, -tl.sum(total, 0), mask=mask)


def fold_backward(
    weight: Tensor,
    gamma: Tensor | None,
    invstd: Tensor,
    offset: Tensor,
    mean_d: Tensor,
    weight_cov: Tensor,
    a: Tensor,
    s: Tensor,
    sum_g: Tensor,
    count: int,
) -> FoldBackward:
    """The junction of B1 and B2: see ``Stages.fold_backward``. weight ``[W, K, 1, 1]``."""
    wide, channels = weight.shape[:2]
    device = weight.device
    vectors = torch.empty((2, wide), dtype=torch.float32, device=device)
    dgamma, k = vectors.unbind()
    grad_weight = torch.empty((wide, channels), dtype=weight.dtype, device=device)
    launch(
        _fold_backward_kernel,
        (blocks(wide, FOLD.block_m),),
        weight,
        gamma,
        invstd,
        offset,
        mean_d,
        weight_cov,
        s,
        sum_g,
        grad_weight,
        vectors,
        wide,
        channels,
        count,
        BLOCK_M=FOLD.block_m,
        BLOCK_N=FOLD.block_n,
        config=FOLD,
    )
    b = torch.empty((channels, channels), dtype=weight.dtype, device=device)
    launch(
        _operand_product_kernel,
        (blocks(channels, FOLD_PRODUCT.block_m) * blocks(channels, FOLD_PRODUCT.block_n),),
        weight,
        k,
        b,
        wide,
        channels,
        BLOCK_M=FOLD_PRODUCT.block_m,
        BLOCK_N=FOLD_PRODUCT.block_n,
        BLOCK_K=FOLD_PRODUCT.block_k,
        config=FOLD_PRODUCT,
    )
    shift = torch.empty(channels, dtype=torch.float32, device=device)
    launch(
        _operand_shift_kernel,
        (blocks(channels, FOLD_SHIFT.block_n),),
        a,
        b,
        sum_g,
        mean_d,
        shift,
        wide,
        channels,
        count,
        BLOCK_N=FOLD_SHIFT.block_n,
        BLOCK_K=FOLD_SHIFT.block_k,
        config=FOLD_SHIFT,
    )
    dbias = torch.zeros_like(sum_g)
    return FoldBackward(grad_weight, dgamma, dbias, OperandGrad(a, b, shift))
