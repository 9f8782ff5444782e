"""Products over pixels: the tail's weight gradient (B1), the convolutions' (B4, B5).

All split the pixels into parts; a part's result is a float32 partial, and the partials are added
in a fixed order, in float64 (reduce.py).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import POINTWISE, Activation, ConvGrad, Geometry, MaskedGrad, StridedInput, pixels
from ..stages import Operand
from . import config
from .config import blocks
from .gram import load_operand
from .launch import grad_pointers, launch, source_pointers
from .prologues import (
    below,
    cdiv,
    lane_sums,
    load_activation,
    load_conv_grad,
    load_masked_grad,
    product,
    tile,
)
from .reduce import products_of


@triton.jit
def _grad_product(
    grad_ptr, bits_ptr, y_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, start, end, pid_w, pid_k,
    W, K, OH, OW, H, W_IN, SH: tl.constexpr, SW: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    AWAIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, HAS_SUMS: tl.constexpr,
):  # fmt: skip
    """A block of ``g^T D`` over the pixels start to end; g's column sums in 16 lanes (HAS_SUMS)."""
    offs_k = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = tl.zeros([16, BLOCK_M], tl.float32)
    for q in range(start, end, BLOCK_K):
        offs_q = q + tl.arange(0, BLOCK_K)
        mask_q = offs_q < end
        g = load_masked_grad(
            grad_ptr, bits_ptr, offs_q.to(tl.int64), mask_q, W, pid_w * BLOCK_M, BLOCK_K, BLOCK_M,
            EVEN,
        )  # fmt: skip
        if HAS_SUMS:
            sums += lane_sums(g, BLOCK_K, BLOCK_M)
        d = load_operand(
            y_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, offs_q, mask_q, offs_k, K,
            OH, OW, H, W_IN, SH, SW, EVEN,
        )  # fmt: skip
        acc = product(tl.trans(g), d, acc, INPUT_PRECISION, AWAIT)
    return acc, sums


@triton.jit(do_not_specialize=["Q", "OH", "OW", "H", "W_IN", "ROWS"])
def _tail_wgrad_kernel(
    grad_ptr,
    bits_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    centre_ptr,
    x_ptr,
    x_centre_ptr,
    partial_ptr,
    Q,
    W,
    K,
    C,
    OH,
    OW,
    H,
    W_IN,
    ROWS,
    SH: tl.constexpr,
    SW: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """B1: ``S = g^T D`` and the column sums of g over ROWS pixels; of D_x too (x_ptr not None).

    g ``[Q, W]``, D ``[Q, K]``, D_x ``[Q, C]``; partial ``[parts, W (K + C + 1)]``: S, S_x, sums. A
    program owns a block of S or of S_x and one part; those of S's first columns own the sums. The
    programs of one part are neighbours, so that g comes from L2 for all but the first. Bytes: g,
    its bits, D and D_x, and 4 W (K + C) per part; FLOPs: 2 Q W (K + C).
    """
    pid = tl.program_id(0)
    blocks_k = cdiv(K, BLOCK_N)
    columns = blocks_k + cdiv(C, BLOCK_N)
    pid_k = pid % columns
    pid_w = pid // columns % cdiv(W, BLOCK_M)
    part = pid // (columns * cdiv(W, BLOCK_M))
    start, end = part * ROWS, tl.minimum(Q, (part + 1) * ROWS)
    offs_w = pid_w * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_w = offs_w < W
    partial_ptr += part.to(tl.int64) * W * (K + C + 1)
    if pid_k < blocks_k:
        acc, sums = _grad_product(
            grad_ptr, bits_ptr, y_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, start, end,
            pid_w, pid_k, W, K, OH, OW, OH, OW, 1, 1, INPUT_PRECISION, AWAIT, BLOCK_M, BLOCK_N,
            BLOCK_K, EVEN, True,
        )  # fmt: skip
        offs_k = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
        where = offs_w[:, None] * K + offs_k[None, :]
        tl.store(partial_ptr + where, acc, mask=mask_w[:, None] & (offs_k < K)[None, :])
        if pid_k == 0:
            tl.store(partial_ptr + W * (K + C) + offs_w, tl.sum(sums, 0), mask=mask_w)
    elif x_ptr is not None:
        acc, _ = _grad_product(
            grad_ptr, bits_ptr, x_ptr, None, None, None, x_centre_ptr, start, end, pid_w,
            pid_k - blocks_k, W, C, OH, OW, H, W_IN, SH, SW, INPUT_PRECISION, AWAIT, BLOCK_M,
            BLOCK_N, BLOCK_K, EVEN, False,
        )  # fmt: skip
        offs_c = (pid_k - blocks_k) * BLOCK_N + tl.arange(0, BLOCK_N)
        where = W * K + offs_w[:, None] * C + offs_c[None, :]
        tl.store(partial_ptr + where, acc, mask=mask_w[:, None] & (offs_c < C)[None, :])


def tail_wgrad(
    grad: MaskedGrad, operands: Sequence[Operand], precision: str
) -> tuple[Tensor, list[Tensor]]:
    """B1: column sums of g ``[W]``, and ``S = g^T D`` ``[W, K]`` for each operand; float32.

    operands: conv3's, then the downsample's if there is one.
    """
    act, *others = operands
    assert isinstance(act, Activation)
    x_s = others[0] if others else None
    assert x_s is None or isinstance(x_s, StridedInput)
    rows, wide, channels = pixels(grad.grad_out), grad.grad_out.shape[1], act.y.shape[1]
    x_channels = 0 if x_s is None else x_s.x.shape[1]
    columns = channels + x_channels
    stage = "tail_wgrad" if x_s is None else "tail_wgrad_downsample"
    cfg = config.choose(stage, wide, columns, rows, grad.grad_out)
    parts, size = blocks(rows, cfg.rows), wide * (columns + 1)
    device = grad.grad_out.device
    partial = torch.empty((parts, size), dtype=torch.float32, device=device)
    tiles = blocks(channels, cfg.block_n) + blocks(x_channels, cfg.block_n)
    stride = (1, 1) if x_s is None else x_s.stride
    image = act.y.shape[2:] if x_s is None else x_s.x.shape[2:]
    launch(
        _tail_wgrad_kernel,
        (blocks(wide, cfg.block_m) * tiles * parts,),
        grad.grad_out,
        grad.mask.view(torch.int32),
        *act,
        None if x_s is None else x_s.x,
        None if x_s is None else x_s.centre,
        partial,
        rows,
        wide,
        channels,
        x_channels,
        *act.y.shape[2:],
        *image,
        cfg.rows,
        SH=stride[0],
        SW=stride[1],
        **config.product_constants(precision, grad.grad_out),
        BLOCK_M=cfg.block_m,
        BLOCK_N=cfg.block_n,
        BLOCK_K=cfg.block_k,
        EVEN=config.is_even(
            (wide, cfg.block_m), (channels, cfg.block_n), (x_channels, cfg.block_n)
        ),
        config=cfg,
    )
    total = products_of(partial, torch.empty(size, dtype=torch.float32, device=device))
    s, s_x, sum_g = total.split([wide * channels, wide * x_channels, wide])
    products = [s.view(wide, channels), s_x.view(wide, x_channels)]
    return sum_g, products[: len(operands)]


@triton.jit
def _advance(n, h, w, H, W, STEP: tl.constexpr):
    """The pixels (n, h, w) of ``[N, H, W]`` that are STEP further on: additions, where to divide
    each pixel's index anew would cost as much as the rest of a loop's addresses."""
    w += STEP % W
    over = w >= W
    w = tl.where(over, w - W, w)
    h += STEP // W % H + over.to(tl.int32)
    over = h >= H
    return n + STEP // (H * W) + over.to(tl.int32), tl.where(over, h - H, h), w


@triton.jit(do_not_specialize=["Q", "H", "W", "OH", "OW", "ROWS"])
def _conv_wgrad_kernel(
    g_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    k0_ptr,
    k1_ptr,
    x_ptr,
    x_mean_ptr,
    x_scale_ptr,
    x_beta_ptr,
    x_centre_ptr,
    partial_ptr,
    Q,
    M,
    C,
    H,
    W,
    OH,
    OW,
    ROWS,
    TAPS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    POINTWISE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """B4, B5: ``dW = sum over pixels of dy^T a`` for TAPS neighbouring taps, over ROWS pixels.

    dy ``[Q, M]`` from (g, y), or g itself (scale_ptr None); a ``[images * H * W, C]``:
    relu(BN(x)), or x (x_scale_ptr None); partial ``[parts, M, KH, KW, C]``. A program owns a block
    ``[BLOCK_M, BLOCK_N]`` of the weight's channels, TAPS taps and one part; the programs of one
    part are neighbours, so that dy and a come from L2 for all but the first. Bytes: dy + a, and
    4 M C KH KW per part; FLOPs: 2 Q M C KH KW.
    """
    pid = tl.program_id(0)
    tap = pid % (KH * KW // TAPS) * TAPS
    pid = pid // (KH * KW // TAPS)
    offs_c = pid % cdiv(C, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // cdiv(C, BLOCK_N)
    offs_m = pid % cdiv(M, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = pid // cdiv(M, BLOCK_M)
    mask_m, mask_c = below(offs_m, M, EVEN), below(offs_c, C, EVEN)
    accs = (tl.zeros([BLOCK_M, BLOCK_N], tl.float32),) * TAPS
    end = tl.minimum(Q, (part + 1) * ROWS)
    lanes = tl.arange(0, BLOCK_K)
    offs_q = part * ROWS + lanes
    n, oh, ow = offs_q // (OH * OW), offs_q // OW % OH, offs_q % OW
    q, rows, left = offs_q.to(tl.int64), offs_q.to(tl.int64), ow
    for start in range(part * ROWS, end, BLOCK_K):
        inside = start + lanes < end
        dy = load_conv_grad(
            g_ptr, y_ptr, mean_ptr, scale_ptr, k0_ptr, k1_ptr, q, inside, M, offs_m, mask_m
        )
        q += BLOCK_K
        if not POINTWISE:
            top, left = oh * SH - PH + tap // KW * DH, ow * SW - PW + tap % KW * DW
            rows = (n.to(tl.int64) * H + top) * W + left
            inside = inside & (top >= 0) & (top < H)
            n, oh, ow = _advance(n, oh, ow, OH, OW, BLOCK_K)
        sums = ()
        for i in tl.static_range(TAPS):
            live = inside if POINTWISE else inside & (left + i * DW >= 0) & (left + i * DW < W)
            if x_scale_ptr is not None:
                a = load_activation(
                    x_ptr, x_mean_ptr, x_scale_ptr, x_beta_ptr, x_centre_ptr, rows + i * DW, live,
                    C, offs_c, mask_c,
                )  # fmt: skip
            else:
                a = tile(x_ptr + i * DW * C, rows, live, C, offs_c, mask_c)
            acc = product(tl.trans(dy), a, accs[i], INPUT_PRECISION, AWAIT)
            sums = sums + (acc,)  # type: ignore[assignment]  # noqa: RUF005
        accs = sums
        if POINTWISE:
            rows += BLOCK_K
    partial_ptr += part.to(tl.int64) * (M * KH * KW) * C
    mask = mask_m[:, None] & mask_c[None, :]
    for i in tl.static_range(TAPS):
        row = (offs_m * (KH * KW) + tap + i) * C
        tl.store(partial_ptr + row[:, None] + offs_c[None, :], accs[i], mask=mask)


def conv_wgrad(
    grad: Tensor | ConvGrad,
    source: Tensor | Activation,
    weight: Tensor,
    geometry: Geometry,
    precision: str,
) -> Tensor:
    """B4, B5: the gradient of the weight ``[M, C, kh, kw]``, channels_last, in its dtype."""
    x, *coefficients = source_pointers(source)
    g, *_ = grad_pointers(grad)
    assert x is not None
    assert g is not None
    is_computed = isinstance(grad, ConvGrad) or isinstance(source, Activation)
    out_channels, channels, kh, kw = weight.shape
    (sh, sw), (ph, pw), (dh, dw), _ = geometry
    rows = pixels(g)
    kind = "pointwise" if kh * kw == 1 else "taps"
    stage = f"conv_wgrad_{kind}"
    cfg = config.choose(stage, out_channels, channels, rows, weight, is_computed)
    taps = kw if kw <= cfg.taps else 1
    parts = blocks(rows, cfg.rows)
    device = weight.device
    partial = torch.empty((parts, weight.numel()), dtype=torch.float32, device=device)
    tiles = blocks(out_channels, cfg.block_m) * blocks(channels, cfg.block_n)
    launch(
        _conv_wgrad_kernel,
        (tiles * (kh * kw // taps) * parts,),
        *grad_pointers(grad),
        x,
        *coefficients,
        partial,
        rows,
        out_channels,
        channels,
        *x.shape[2:],
        *g.shape[2:],
        cfg.rows,
        TAPS=taps,
        KH=kh,
        KW=kw,
        SH=sh,
        SW=sw,
        PH=ph,
        PW=pw,
        DH=dh,
        DW=dw,
        **config.product_constants(precision, weight, is_computed),
        BLOCK_M=cfg.block_m,
        BLOCK_N=cfg.block_n,
        BLOCK_K=cfg.block_k,
        POINTWISE=kh * kw == 1 and geometry == POINTWISE,
        EVEN=config.is_even((out_channels, cfg.block_m), (channels, cfg.block_n)),
        config=cfg,
    )
    out = torch.empty(
        weight.shape, dtype=weight.dtype, device=device, memory_format=torch.channels_last
    )
    return products_of(partial, out)
