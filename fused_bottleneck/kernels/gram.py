"""Mean and covariance of the tail's operands (F3)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Activation, StridedInput
from ..stages import Operand
from . import config
from .config import blocks
from .launch import launch
from .prologues import below, cdiv, lane_sums, load_activation, load_centred, product, strided_rows
from .reduce import parts_tile


@triton.jit
def load_operand(
    y_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, offs_q, mask_q, offs, K, OH, OW, H, W,
    SH: tl.constexpr, SW: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of the operand D: of an activation, or (scale_ptr None) of a strided input."""
    mask = below(offs, K, EVEN)
    if scale_ptr is not None:
        return load_activation(
            y_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, offs_q.to(tl.int64), mask_q, K, offs,
            mask,
        )  # fmt: skip
    else:
        rows = strided_rows(offs_q, OH, OW, H, W, SH, SW)
        return load_centred(y_ptr, centre_ptr, rows, mask_q, K, offs, mask)


def operand_pointers(operand: Operand) -> tuple[Tensor | None, ...]:
    """An operand as ``load_operand`` takes it: y, mean, scale, beta, centre."""
    if isinstance(operand, StridedInput):
        return operand.x, None, None, None, operand.centre
    return tuple(operand)


def operand_shape(operand: Operand) -> tuple[int, ...]:
    """Images, channels, height and width of D, then height and width of what it is read from."""
    if isinstance(operand, Activation):
        return (*operand.y.shape, *operand.y.shape[2:])
    images, channels, height, width = operand.x.shape
    sh, sw = operand.stride
    return images, channels, blocks(height, sh), blocks(width, sw), height, width


def operand_stride(operand: Operand) -> tuple[int, int]:
    """The stride at which D is read."""
    return operand.stride if isinstance(operand, StridedInput) else (1, 1)


@triton.jit(do_not_specialize=["Q", "OH", "OW", "H", "W", "ROWS"])
def _gram_kernel(
    y_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    centre_ptr,
    product_ptr,
    sums_ptr,
    Q,
    K,
    OH,
    OW,
    H,
    W,
    ROWS,
    SH: tl.constexpr,
    SW: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """F3: ``D^T D`` and the column sums of D over ROWS pixels.

    D ``[Q, K]``; product ``[parts, K, K]``, sums ``[parts, K]``. A program owns one block of the
    product on or above its diagonal and one part; those on the diagonal own the sums. Parts are
    short, as float32 accumulates in them, and are combined in float64. Bytes: D, and 4 K^2 per
    part; FLOPs: Q K^2.
    """
    pid = tl.program_id(0)
    count = cdiv(K, BLOCK)
    i, j, part = pid // count % count, pid % count, pid // (count * count)
    if i > j:
        return
    offs_i, offs_j = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    sums = tl.zeros([16, BLOCK], tl.float32)
    end = tl.minimum(Q, (part + 1) * ROWS)
    for start in range(part * ROWS, end, BLOCK_K):
        offs_q = start + tl.arange(0, BLOCK_K)
        mask_q = offs_q < end
        left = load_operand(
            y_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, offs_q, mask_q, offs_i, K,
            OH, OW, H, W, SH, SW, EVEN,
        )  # fmt: skip
        sums += lane_sums(left, BLOCK_K, BLOCK)
        right = left
        if not ONE_BLOCK:
            right = load_operand(
                y_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, offs_q, mask_q, offs_j, K,
                OH, OW, H, W, SH, SW, EVEN,
            )  # fmt: skip
        acc = product(tl.trans(left), right, acc, INPUT_PRECISION, AWAIT)
    mask_i, mask_j = offs_i < K, offs_j < K
    row = (part * K + offs_i).to(tl.int64) * K
    where = row[:, None] + offs_j[None, :]
    tl.store(product_ptr + where, acc, mask=mask_i[:, None] & mask_j[None, :])
    if i == j:
        tl.store(sums_ptr + part * K + offs_i, tl.sum(sums, 0), mask=mask_i)


@triton.jit(do_not_specialize=["Q", "parts"])
def _covariance_kernel(
    product_ptr,
    sums_ptr,
    mean_ptr,
    cov_ptr,
    Q,
    K,
    parts,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``mean = sum / Q`` and ``cov = D^T D / Q - mean mean^T`` from the parts, in float64.

    A program owns BLOCK columns of a row, of which some are on or above the diagonal, and their
    mirror image. Bytes: half the product; the sums come from cache.
    """
    i, start = tl.program_id(0) // cdiv(K, BLOCK), tl.program_id(0) % cdiv(K, BLOCK) * BLOCK
    if i >= start + BLOCK:
        return
    offs, row = start + tl.arange(0, BLOCK), i + tl.arange(0, 1)
    mask = (offs >= i) & (offs < K)
    total = tl.zeros([PARTS, BLOCK], tl.float64)
    sums = tl.zeros([PARTS, BLOCK], tl.float64)
    sums_i = tl.zeros([PARTS, 1], tl.float64)
    for p in range(0, parts, PARTS):
        total += parts_tile(product_ptr + i * K, K * K, p, parts, offs, mask, PARTS)
        sums += parts_tile(sums_ptr, K, p, parts, offs, mask, PARTS)
        sums_i += parts_tile(sums_ptr, K, p, parts, row, row < K, PARTS)
    mean, mean_i = tl.sum(sums, 0) / Q, tl.sum(sums_i, 0) / Q
    cov = (tl.sum(total, 0) / Q - mean_i * mean).to(tl.float32)
    tl.store(cov_ptr + i * K + offs, cov, mask=mask)
    tl.store(cov_ptr + offs * K + i, cov, mask=mask)
    if i == 0:
        tl.store(mean_ptr + offs, mean.to(tl.float32), mask=mask)


def gram(operand: Operand, precision: str) -> tuple[Tensor, Tensor]:
    """F3: mean ``[K]`` and biased covariance ``[K, K]`` of the operand's rows, float32."""
    images, channels, *size = operand_shape(operand)
    rows = images * size[0] * size[1]
    source = operand.x if isinstance(operand, StridedInput) else operand.y
    cfg = config.choose("gram", channels, channels, rows, source)
    count, parts = blocks(channels, cfg.block_m), blocks(rows, cfg.rows)
    device = source.device
    product = torch.empty((parts, channels, channels), dtype=torch.float32, device=device)
    sums = torch.empty((parts, channels), dtype=torch.float32, device=device)
    stride = operand_stride(operand)
    launch(
        _gram_kernel,
        (count * count * parts,),
        *operand_pointers(operand),
        product,
        sums,
        rows,
        channels,
        *size,
        cfg.rows,
        SH=stride[0],
        SW=stride[1],
        ONE_BLOCK=count == 1,
        **config.product_constants(precision, source),
        BLOCK=cfg.block_m,
        BLOCK_K=cfg.block_k,
        EVEN=config.is_even((channels, cfg.block_m)),
        config=cfg,
    )
    mean = torch.empty(channels, dtype=torch.float32, device=device)
    cov = torch.empty((channels, channels), dtype=torch.float32, device=device)
    final = config.combining(parts)
    launch(
        _covariance_kernel,
        (channels * blocks(channels, final.block_n),),
        product,
        sums,
        mean,
        cov,
        rows,
        channels,
        parts,
        PARTS=final.block_m,
        BLOCK=final.block_n,
        config=final,
    )
    return mean, cov
