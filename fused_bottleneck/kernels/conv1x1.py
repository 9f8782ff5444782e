"""1x1 convolutions with stride 1: forward (F1) and the gradient of the block's input (B6)."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import ConvGrad, MaskedGrad, pixels
from ..stages import InputTerm, Moments
from . import config
from .config import blocks
from .launch import grad_pointers, launch
from .prologues import (
    below,
    cdiv,
    channels,
    load_centred,
    load_conv_grad,
    load_masked_grad,
    product,
    put_tile,
    store_moments,
    tile,
)
from .reduce import moments_of


@triton.jit(do_not_specialize=["P", "parts"])
def _conv1x1_forward_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    partial_ptr,
    P,
    C,
    N,
    parts,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """F1: ``y = x W^T`` and mean, M2 of every tile of y.

    x ``[P, C]``, W ``[N, C]``, y ``[P, N]``, partial ``[2, N, parts]``. A program owns BLOCK_M
    pixels of BLOCK_N channels; those of the same pixels are neighbours, so that x comes from L2
    for all but the first. Bytes: x + y; FLOPs: 2 P C N.
    """
    pid = tl.program_id(0)
    part = pid // cdiv(N, BLOCK_N)
    offs_n = pid % cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = part * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_p, mask_n = offs_p < P, below(offs_n, N, EVEN)
    rows = offs_p.to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, C, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = below(offs_k, C, EVEN)
        x = tile(x_ptr, rows, mask_p, C, offs_k, mask_k)
        w = tile(w_ptr, offs_n, mask_n, C, offs_k, mask_k)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=INPUT_PRECISION)
    y = acc.to(y_ptr.dtype.element_ty)
    put_tile(y_ptr, rows, mask_p, N, offs_n, mask_n, y)
    count = tl.minimum(P - part * BLOCK_M, BLOCK_M)
    store_moments(partial_ptr, y, mask_p, count, part, parts, offs_n, N)


def conv1x1_forward(x: Tensor, weight: Tensor, precision: str) -> tuple[Tensor, Moments]:
    """F1: ``y = conv1x1(x)`` ``[N, M, H, W]`` in channels_last memory, and its moments.

    x ``[N, C, H, W]`` in channels_last memory, weight ``[M, C, 1, 1]``.
    """
    rows, in_channels, out_channels = pixels(x), x.shape[1], weight.shape[0]
    cfg = config.choose("conv1x1_forward", rows, out_channels, in_channels, x)
    shape = (x.shape[0], out_channels, *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    parts = blocks(rows, cfg.block_m)
    partial = torch.empty((2, out_channels, parts), dtype=torch.float32, device=x.device)
    launch(
        _conv1x1_forward_kernel,
        (parts * blocks(out_channels, cfg.block_n),),
        x,
        weight,
        y,
        partial,
        rows,
        in_channels,
        out_channels,
        parts,
        INPUT_PRECISION=precision,
        BLOCK_M=cfg.block_m,
        BLOCK_N=cfg.block_n,
        BLOCK_K=cfg.block_k,
        EVEN=config.is_even((in_channels, cfg.block_k), (out_channels, cfg.block_n)),
        config=cfg,
    )
    return y, moments_of(partial, rows, cfg.block_m)


@triton.jit
def _add_downsample(
    acc,
    grad_ptr,
    bits_ptr,
    a_ptr,
    x_ptr,
    centre_ptr,
    b_ptr,
    shift_ptr,
    rows_q,
    rows,
    mask_p,
    offs_n,
    N,
    W,
    INPUT_PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``acc + g a + D b + shift`` for the pixels rows_q of g, rows of x; b_ptr None: ``g a``."""
    mask_n = below(offs_n, N, EVEN)
    for k in range(0, W, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        g = load_masked_grad(grad_ptr, bits_ptr, rows_q, mask_p, W, k, BLOCK_M, BLOCK_K, EVEN)
        a = tile(a_ptr, offs_k, below(offs_k, W, EVEN), N, offs_n, mask_n)
        acc = product(g, a, acc, INPUT_PRECISION, AWAIT)
    if b_ptr is not None:
        for k in range(0, N, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = below(offs_k, N, EVEN)
            d = load_centred(x_ptr, centre_ptr, rows, mask_p, N, offs_k, mask_k)
            b = tile(b_ptr, offs_k, mask_k, N, offs_n, mask_n)
            acc = product(d, b, acc, INPUT_PRECISION, AWAIT)
        acc += channels(shift_ptr, offs_n, mask_n)
    return acc


@triton.jit(do_not_specialize=["images", "H", "W_IN"])
def _input_dgrad_kernel(
    g1_ptr,
    y1_ptr,
    mean_ptr,
    scale_ptr,
    k0_ptr,
    k1_ptr,
    w_ptr,
    out_ptr,
    grad_ptr,
    bits_ptr,
    a_ptr,
    x_ptr,
    centre_ptr,
    b_ptr,
    shift_ptr,
    images,
    H,
    W_IN,
    M,
    N,
    W,
    RESIDUAL: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    AWAIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """B6: ``grad_x = dy1 W1`` (RESIDUAL none), ``+ g`` (identity), ``+ g a + D b + shift`` at the
    strided pixels (downsample).

    dy1 ``[P, M]`` from (g1, y1), or g1 itself (scale_ptr None); W1 ``[M, N]``, grad_x ``[P, N]``;
    g ``[Q, W]``, a ``[W, N]``, D ``[Q, N]`` from x, b ``[N, N]``. Pixels go in SH*SW classes by
    their position modulo the stride: only those of class 0 see the downsample. A program owns
    BLOCK_M pixels of one class and BLOCK_N channels. Bytes: dy1 (or g1 + y1) + grad_x, and g with
    its mask (+ x_s); FLOPs: 2 P M N + 2 Q N (W + N) with a downsample.
    """
    pid = tl.program_id(0)
    offs_n = pid % cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // cdiv(N, BLOCK_N)
    first_h, first_w = pid % (SH * SW) // SW, pid % SW
    rows_h, rows_w = (H - first_h + SH - 1) // SH, (W_IN - first_w + SW - 1) // SW
    offs_q = pid // (SH * SW) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_p, mask_n = offs_q < images * rows_h * rows_w, below(offs_n, N, EVEN)
    rows_q = offs_q.to(tl.int64)
    if SH == 1 and SW == 1:
        rows = rows_q
    else:
        size = tl.maximum(rows_h * rows_w, 1)
        h = first_h + offs_q % size // tl.maximum(rows_w, 1) * SH
        w = first_w + offs_q % tl.maximum(rows_w, 1) * SW
        rows = ((offs_q // size).to(tl.int64) * H + h) * W_IN + w
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, M, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = below(offs_k, M, EVEN)
        dy = load_conv_grad(
            g1_ptr, y1_ptr, mean_ptr, scale_ptr, k0_ptr, k1_ptr, rows, mask_p, M, offs_k, mask_k
        )
        w1 = tile(w_ptr, offs_k, mask_k, N, offs_n, mask_n)
        if scale_ptr is not None:
            acc = product(dy, w1, acc, INPUT_PRECISION, AWAIT)
        else:
            acc = tl.dot(dy, w1, acc, input_precision=INPUT_PRECISION)
    if RESIDUAL == "downsample":  # noqa: SIM102
        if pid % (SH * SW) == 0:
            acc = _add_downsample(
                acc, grad_ptr, bits_ptr, a_ptr, x_ptr, centre_ptr, b_ptr, shift_ptr, rows_q, rows,
                mask_p, offs_n, N, W, INPUT_PRECISION, AWAIT, BLOCK_M, BLOCK_K, EVEN,
            )  # fmt: skip
    if RESIDUAL == "identity":
        start = tl.multiple_of(tl.program_id(0) % cdiv(N, BLOCK_N) * BLOCK_N, BLOCK_N)
        g = load_masked_grad(grad_ptr, bits_ptr, rows, mask_p, N, start, BLOCK_M, BLOCK_N, EVEN)
        acc += g.to(tl.float32)
    put_tile(out_ptr, rows, mask_p, N, offs_n, mask_n, acc)


class Residual(NamedTuple):
    """The residual's part of B6 as the kernel takes it; strides and output size of the shortcut."""

    kind: str
    pointers: tuple[Tensor | None, ...]  # grad_out, bits, a, x, centre, b, shift
    stride: tuple[int, int] = (1, 1)
    channels: int = 0


def _residual(identity: MaskedGrad | None, downsample: InputTerm | None) -> Residual:
    if downsample is not None:
        operand, (a, b, shift), (grad, bits) = downsample
        words = bits.view(torch.int32)
        pointers = (grad, words, a, operand.x, operand.centre, b, shift)
        return Residual("downsample", pointers, operand.stride, grad.shape[1])
    if identity is not None:
        words = identity.mask.view(torch.int32)
        return Residual("identity", (identity.grad_out, words, *(None,) * 5))
    return Residual("none", (None,) * 7)


def input_dgrad(
    grad: Tensor | ConvGrad,
    weight: Tensor,
    x: Tensor,
    identity: MaskedGrad | None,
    downsample: InputTerm | None,
    precision: str,
) -> Tensor:
    """B6: the gradient of x ``[N, C, H, W]``, in channels_last memory.

    grad: that of conv1's output, dy1 or what it is computed from; weight ``[M, C, 1, 1]``; of x
    only the shape matters unless there is a downsample.
    """
    images, in_channels, height, width = x.shape
    out_channels = weight.shape[0]
    residual = _residual(identity, downsample)
    sh, sw = residual.stride
    depth = out_channels + (residual.channels + in_channels if downsample else 0)
    stage, is_computed = f"input_dgrad_{residual.kind}", isinstance(grad, ConvGrad)
    cfg = config.choose(stage, pixels(x), in_channels, depth, x, is_computed)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    per_class = blocks(images * blocks(height, sh) * blocks(width, sw), cfg.block_m)
    launch(
        _input_dgrad_kernel,
        (per_class * sh * sw * blocks(in_channels, cfg.block_n),),
        *grad_pointers(grad),
        weight,
        out,
        *residual.pointers,
        images,
        height,
        width,
        out_channels,
        in_channels,
        residual.channels,
        RESIDUAL=residual.kind,
        SH=sh,
        SW=sw,
        **config.product_constants(precision, x),
        BLOCK_M=cfg.block_m,
        BLOCK_N=cfg.block_n,
        BLOCK_K=cfg.block_k,
        EVEN=config.is_even(
            (out_channels, cfg.block_k),
            (in_channels, cfg.block_n),
            (in_channels, cfg.block_k),
            (residual.channels, cfg.block_k),
        ),
        config=cfg,
    )
    return out
