"""The tail's products with a row per pixel: forward (F4) and the gradient of its operand (B2)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algebra import OperandGrad
from ..operands import Activation, MaskedGrad, StridedInput, pixels
from ..stages import FoldedTerm, GradSums
from . import config
from .config import blocks
from .launch import launch
from .prologues import (
    below,
    cdiv,
    channels,
    load_activation,
    load_centred,
    load_masked_grad,
    pack_bits,
    product,
    put_tile,
    store_through_relu,
    strided_rows,
    tile,
)
from .reduce import sums_of


@triton.jit(do_not_specialize=["Q", "OH", "OW", "H", "W_IN"])
def _tail_forward_kernel(
    y_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    centre_ptr,
    w_ptr,
    shift_ptr,
    x_ptr,
    x_centre_ptr,
    x_w_ptr,
    x_shift_ptr,
    residual_ptr,
    out_ptr,
    bits_ptr,
    Q,
    M,
    C,
    N,
    OH,
    OW,
    H,
    W_IN,
    HAS_DOWNSAMPLE: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """F4: ``out = relu(D Wf^T + shift + residual)`` and a bit per element: not ``<= 0``.

    D ``[Q, M]`` from y2, Wf ``[N, M]``; the residual ``[Q, N]``, or with a downsample
    ``D_x Wfd^T + shift_d`` with D_x ``[Q, C]`` from the strided x. out ``[Q, N]``, bits int32
    ``[Q, N / 32]``. A program owns BLOCK_M pixels of BLOCK_N channels. Bytes: y2 + residual (or
    x_s) + out + bits; FLOPs: 2 Q M N (+ 2 Q C N).
    """
    pid = tl.program_id(0)
    pid_n = pid % cdiv(N, BLOCK_N)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_q = pid // cdiv(N, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_q, mask_n = offs_q < Q, below(offs_n, N, EVEN)
    rows = offs_q.to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, M, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = below(offs_k, M, EVEN)
        d = load_activation(
            y_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, rows, mask_q, M, offs_k, mask_k
        )
        w = tile(w_ptr, offs_n, mask_n, M, offs_k, mask_k)
        acc = product(d, tl.trans(w), acc, INPUT_PRECISION, AWAIT)
    acc += channels(shift_ptr, offs_n, mask_n)
    if HAS_DOWNSAMPLE:
        rows_x = strided_rows(offs_q, OH, OW, H, W_IN, SH, SW)
        for k in range(0, C, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = below(offs_k, C, EVEN)
            d = load_centred(x_ptr, x_centre_ptr, rows_x, mask_q, C, offs_k, mask_k)
            w = tile(x_w_ptr, offs_n, mask_n, C, offs_k, mask_k)
            acc = product(d, tl.trans(w), acc, INPUT_PRECISION, AWAIT)
        acc += channels(x_shift_ptr, offs_n, mask_n)
    else:
        acc += tile(residual_ptr, rows, mask_q, N, offs_n, mask_n).to(tl.float32)
    live = ~(acc <= 0)
    put_tile(out_ptr, rows, mask_q, N, offs_n, mask_n, tl.where(live, acc, 0.0))
    words = pid_n * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
    packed = pack_bits(live, BLOCK_M, BLOCK_N)
    put_tile(bits_ptr, rows, mask_q, N // 32, words, words < N // 32, packed)


def tail_forward(
    terms: Sequence[FoldedTerm], residual: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """F4: out ``[N, W, H', W']`` in channels_last memory, and its mask uint8 ``[Q, W/8]``.

    terms: conv3's and, where residual is None, the downsample's. residual ``[N, W, H', W']`` in
    channels_last memory.
    """
    act, folded = terms[0]
    assert isinstance(act, Activation)
    images, width, height_out, width_out = act.y.shape
    wide = folded.weight.shape[0]
    strides, size, x_channels = (1, 1), (height_out, width_out), 0
    downsample: tuple[Tensor | None, ...] = (None,) * 4
    if residual is None:
        x_s, folded_x = terms[1]
        assert isinstance(x_s, StridedInput)
        downsample = (x_s.x, x_s.centre, folded_x.weight, folded_x.shift)
        strides, x_channels = x_s.stride, x_s.x.shape[1]
        size = (x_s.x.shape[2], x_s.x.shape[3])
    rows = pixels(act.y)
    stage = "tail_forward" if residual is not None else "tail_forward_downsample"
    cfg = config.choose(stage, rows, wide, width + x_channels, act.y)
    out = torch.empty(
        (images, wide, height_out, width_out),
        dtype=act.y.dtype,
        device=act.y.device,
        memory_format=torch.channels_last,
    )
    bits = torch.empty((rows, wide // 32), dtype=torch.int32, device=out.device)
    launch(
        _tail_forward_kernel,
        (blocks(rows, cfg.block_m) * blocks(wide, cfg.block_n),),
        *act,
        *folded,
        *downsample,
        residual,
        out,
        bits,
        rows,
        width,
        x_channels,
        wide,
        height_out,
        width_out,
        *size,
        HAS_DOWNSAMPLE=residual is None,
        SH=strides[0],
        SW=strides[1],
        **config.product_constants(precision, act.y),
        BLOCK_M=cfg.block_m,
        BLOCK_N=cfg.block_n,
        BLOCK_K=cfg.block_k,
        EVEN=config.is_even((width, cfg.block_k), (x_channels, cfg.block_k), (wide, cfg.block_n)),
        config=cfg,
    )
    return out, bits.view(torch.uint8)


@triton.jit(do_not_specialize=["Q", "parts"])
def _tail_dgrad_kernel(
    grad_ptr,
    bits_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    centre_ptr,
    invstd_ptr,
    a_ptr,
    b_ptr,
    shift_ptr,
    out_ptr,
    partial_ptr,
    Q,
    W,
    N,
    parts,
    INPUT_PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """B2: ``g2 = (g A + D B + shift) * [a2 > 0]`` and the tiles' two sums.

    g ``[Q, W]``, A ``[W, N]``, D ``[Q, N]`` from y2, B ``[N, N]`` (b_ptr None: neither B nor
    shift). A program owns BLOCK_M pixels of BLOCK_N channels. Bytes: g + its bits + y2 + g2;
    FLOPs: 2 Q N (W + N).
    """
    pid = tl.program_id(0)
    part = pid // cdiv(N, BLOCK_N)
    offs_n = pid % cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_q = part * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_q, mask_n = offs_q < Q, below(offs_n, N, EVEN)
    rows = offs_q.to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, W, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        g = load_masked_grad(grad_ptr, bits_ptr, rows, mask_q, W, k, BLOCK_M, BLOCK_K, EVEN)
        a = tile(a_ptr, offs_k, below(offs_k, W, EVEN), N, offs_n, mask_n)
        acc = product(g, a, acc, INPUT_PRECISION, AWAIT)
    if b_ptr is not None:
        for k in range(0, N, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = below(offs_k, N, EVEN)
            d = load_activation(
                y_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, rows, mask_q, N, offs_k, mask_k
            )
            b = tile(b_ptr, offs_k, mask_k, N, offs_n, mask_n)
            acc = product(d, b, acc, INPUT_PRECISION, AWAIT)
        acc += channels(shift_ptr, offs_n, mask_n)
    store_through_relu(
        out_ptr, partial_ptr, y_ptr, mean_ptr, scale_ptr, beta_ptr, invstd_ptr, acc, rows, mask_q,
        part, parts, offs_n, N,
    )  # fmt: skip


def tail_dgrad(
    grad: MaskedGrad, act: Activation, coefficients: OperandGrad, invstd: Tensor, precision: str
) -> tuple[Tensor, GradSums]:
    """B2: g2 ``[N, M, H', W']`` in channels_last memory, and its two sums."""
    rows, width, wide = pixels(act.y), act.y.shape[1], grad.grad_out.shape[1]
    cfg = config.choose("tail_dgrad", rows, width, wide + width, act.y)
    out = torch.empty_like(act.y, memory_format=torch.channels_last)
    parts = blocks(rows, cfg.block_m)
    partial = torch.empty((2, width, parts), dtype=torch.float32, device=out.device)
    launch(
        _tail_dgrad_kernel,
        (parts * blocks(width, cfg.block_n),),
        grad.grad_out,
        grad.mask.view(torch.int32),
        *act,
        invstd,
        *coefficients,
        out,
        partial,
        rows,
        wide,
        width,
        parts,
        **config.product_constants(precision, act.y),
        BLOCK_M=cfg.block_m,
        BLOCK_N=cfg.block_n,
        BLOCK_K=cfg.block_k,
        EVEN=config.is_even((wide, cfg.block_k), (width, cfg.block_k), (width, cfg.block_n)),
        config=cfg,
    )
    return out, sums_of(partial)
