"""Convolutions of any kernel, stride, padding and dilation as implicit GEMMs: F2 and B3."""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Activation, ConvGrad, Geometry, pixels
from ..stages import GradSums, Moments
from . import config
from .config import Config, blocks
from .launch import grad_pointers, launch, source_pointers
from .prologues import (
    below,
    cdiv,
    load_activation,
    load_conv_grad,
    product,
    put_tile,
    store_moments,
    store_through_relu,
    tile,
)
from .reduce import moments_of, sums_of


@triton.jit
def _taps_inside(first, size, TAPS: tl.constexpr, STEP: tl.constexpr):
    """Bit i: whether ``0 <= first + i * STEP < size``. Computed ahead of a loop over the taps."""
    bits = tl.zeros_like(first)
    for i in tl.static_range(TAPS):
        at = first + i * STEP
        bits |= ((at >= 0) & (at < size)).to(tl.int32) << i
    return bits


@triton.jit(do_not_specialize=["Q", "H", "W", "OH", "OW", "parts"])
def _conv2d_forward_kernel(
    x_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    centre_ptr,
    w_ptr,
    y_ptr,
    partial_ptr,
    Q,
    C,
    N,
    H,
    W,
    OH,
    OW,
    parts,
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
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """F2: ``y = conv(a)`` and mean, M2 of every tile of y; a is relu(BN(x)), or x (scale_ptr None).

    x ``[images * H * W, C]``, weight ``[N, KH, KW, C]``, y ``[Q, N]`` with
    ``Q = images * OH * OW``, partial ``[2, N, parts]``. The padding is zero after the prologue. A
    program owns BLOCK_M output pixels of BLOCK_N channels and goes through taps and C in one
    loop. Bytes: x + y (the taps' overlap comes from cache); FLOPs: 2 Q C N KH KW.
    """
    pid = tl.program_id(0)
    part = pid // cdiv(N, BLOCK_N)
    offs_n = pid % cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_q = part * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_q, mask_n = offs_q < Q, below(offs_n, N, EVEN)
    image = (offs_q // (OH * OW)).to(tl.int64) * H
    top = offs_q // OW % OH * SH - PH
    left = offs_q % OW * SW - PW
    inside_h = tl.where(mask_q, _taps_inside(top, H, KH, DH), 0)
    inside_w = _taps_inside(left, W, KW, DW)
    rows = (image + top) * W + left  # of the first tap; the others are a constant away
    offs = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(KH * KW * STEPS):
        tap, k = step // STEPS, step % STEPS * BLOCK_K
        kh, kw = tap // KW, tap % KW
        mask_k = below(k + offs, C, EVEN)
        inside = (inside_h >> kh & inside_w >> kw & 1) != 0
        away = kh * DH * W + kw * DW
        if scale_ptr is not None:
            x = load_activation(
                x_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, rows + away, inside, C, k + offs,
                mask_k,
            )  # fmt: skip
        else:
            x = tile(x_ptr + (away * C + k), rows, inside, C, offs, mask_k)
        weight = tile(w_ptr + (tap * C + k), offs_n, mask_n, KH * KW * C, offs, mask_k)
        acc = product(x, tl.trans(weight), acc, INPUT_PRECISION, AWAIT)
    y = acc.to(y_ptr.dtype.element_ty)
    put_tile(y_ptr, offs_q.to(tl.int64), mask_q, N, offs_n, mask_n, y)
    count = tl.minimum(Q - part * BLOCK_M, BLOCK_M)
    store_moments(partial_ptr, y, mask_q, count, part, parts, offs_n, N)


def _constants(weight: Tensor, geometry: Geometry) -> dict[str, int]:
    """Kernel size and geometry as the kernels' constants."""
    (sh, sw), (ph, pw), (dh, dw), _ = geometry
    kh, kw = weight.shape[2:]
    return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw, "DH": dh, "DW": dw}


def _steps(depth: int, width: int, cfg: Config) -> dict[str, int | bool]:
    """The steps over a product's inner channels (a constant, as loops divide by it), and whether
    the blocks divide both of its channels."""
    steps = blocks(depth, cfg.block_k)
    even = config.is_even((depth, cfg.block_k), (width, cfg.block_n))
    return {"STEPS": steps, "EVEN": even}


def conv2d_forward(
    source: Tensor | Activation, weight: Tensor, geometry: Geometry, precision: str
) -> tuple[Tensor, Moments]:
    """F2: ``y = conv(source)`` ``[N, M, H', W']`` in channels_last memory, and its moments.

    source ``[N, C, H, W]`` in channels_last memory, weight ``[M, C, kh, kw]``.
    """
    is_computed = isinstance(source, Activation)
    x = source.y if isinstance(source, Activation) else source
    images, channels, height, width = x.shape
    out_channels = weight.shape[0]
    size = geometry.output_size(height, width, (weight.shape[2], weight.shape[3]))
    rows = images * size[0] * size[1]
    cfg = config.choose("conv2d_forward", rows, out_channels, channels, x, is_computed)
    y = torch.empty(
        (images, out_channels, *size),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    parts = blocks(rows, cfg.block_m)
    partial = torch.empty((2, out_channels, parts), dtype=torch.float32, device=y.device)
    launch(
        _conv2d_forward_kernel,
        (parts * blocks(out_channels, cfg.block_n),),
        *source_pointers(source),
        weight.contiguous(memory_format=torch.channels_last),
        y,
        partial,
        rows,
        channels,
        out_channels,
        height,
        width,
        *size,
        parts,
        **_constants(weight, geometry),
        **config.product_constants(precision, x, is_computed),
        BLOCK_M=cfg.block_m,
        BLOCK_N=cfg.block_n,
        BLOCK_K=cfg.block_k,
        **_steps(channels, out_channels, cfg),
        config=cfg,
    )
    return y, moments_of(partial, rows, cfg.block_m)


@triton.jit
def _first_tap(
    position, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr
):
    """The first tap whose output pixel is a whole one for an input position; K if there is none.

    ``position + P - tap * D`` must be a multiple of S; so are those STEP taps on.
    """
    first = K
    for i in tl.static_range(STEP - 1, -1, -1):
        if i < K:
            first = tl.where((position + P + (S * K - i) * D) % S == 0, i, first)
    return first


@triton.jit(do_not_specialize=["images", "H", "W", "OH", "OW", "parts"])
def _conv2d_dgrad_kernel(
    g_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    k0_ptr,
    k1_ptr,
    w_ptr,
    out_ptr,
    partial_ptr,
    act_ptr,
    act_mean_ptr,
    act_scale_ptr,
    act_beta_ptr,
    act_invstd_ptr,
    images,
    C,
    N,
    H,
    W,
    OH,
    OW,
    parts,
    HAS_RELU: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
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
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """B3: ``g1 = conv^T(dy) * [a > 0]`` with its sums (HAS_RELU), or ``conv^T(dy)``.

    dy ``[images * OH * OW, C]`` from (g, y), or g itself (scale_ptr None); weight
    ``[C, KH, KW, N]``, out and act ``[images * H * W, N]``. Input pixels go in SH*SW classes by
    their position modulo the stride: those of one class have the same taps, every STEP-th from a
    first one, so that no product is with a zero between the strides. A program owns BLOCK_M pixels
    of one class and BLOCK_N channels. Bytes: g + y + act + out; FLOPs: 2 Q C N KH KW.
    """
    pid = tl.program_id(0)
    part = pid // cdiv(N, BLOCK_N)
    offs_n = pid % cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_h, first_w = part % (SH * SW) // SW, part % SW
    size_h, size_w = (H - first_h + SH - 1) // SH, (W - first_w + SW - 1) // SW
    offs_p = part // (SH * SW) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_p, mask_n = offs_p < images * size_h * size_w, below(offs_n, N, EVEN)
    image = offs_p // tl.maximum(size_h * size_w, 1)
    h = first_h + offs_p // tl.maximum(size_w, 1) % tl.maximum(size_h, 1) * SH
    w = first_w + offs_p % tl.maximum(size_w, 1) * SW
    tap_h = _first_tap(first_h, KH, SH, PH, DH, STEP_H)
    tap_w = _first_tap(first_w, KW, SW, PW, DW, STEP_W)
    taps_w = (KW - tap_w + STEP_W - 1) // STEP_W
    # The output pixel of the first tap; from tap to tap of a class it goes back by BACK.
    oh, ow = (h + PH - tap_h * DH) // SH, (w + PW - tap_w * DW) // SW
    BACK_H: tl.constexpr = STEP_H * DH // SH
    BACK_W: tl.constexpr = STEP_W * DW // SW
    inside_h = tl.where(mask_p, _taps_inside(oh, OH, KH, -BACK_H), 0)
    inside_w = _taps_inside(ow, OW, KW, -BACK_W)
    rows = (image.to(tl.int64) * OH + oh) * OW + ow
    offs = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range((KH - tap_h + STEP_H - 1) // STEP_H * taps_w * STEPS):
        i, j, k = step // STEPS // taps_w, step // STEPS % taps_w, step % STEPS * BLOCK_K
        mask_k = below(k + offs, C, EVEN)
        inside = (inside_h >> i & inside_w >> j & 1) != 0
        back = i * BACK_H * OW + j * BACK_W
        if scale_ptr is not None:
            dy = load_conv_grad(
                g_ptr, y_ptr, mean_ptr, scale_ptr, k0_ptr, k1_ptr, rows - back, inside, C, k + offs,
                mask_k,
            )  # fmt: skip
        else:
            dy = tile(g_ptr + (k - back * C), rows, inside, C, offs, mask_k)
        tap = (tap_h + i * STEP_H) * KW + tap_w + j * STEP_W
        weight = tile(
            w_ptr + (tap * N + k * (KH * KW * N)), offs, mask_k, KH * KW * N, offs_n, mask_n
        )
        acc = product(dy, weight, acc, INPUT_PRECISION, AWAIT)
    rows = (image.to(tl.int64) * H + h) * W + w
    if HAS_RELU:
        store_through_relu(
            out_ptr, partial_ptr, act_ptr, act_mean_ptr, act_scale_ptr, act_beta_ptr,
            act_invstd_ptr, acc, rows, mask_p, part, parts, offs_n, N,
        )  # fmt: skip
    else:
        put_tile(out_ptr, rows, mask_p, N, offs_n, mask_n, acc)


def conv2d_dgrad(
    grad: Tensor | ConvGrad,
    weight: Tensor,
    geometry: Geometry,
    x: Tensor,
    precision: str,
    act: Activation | None = None,
    invstd: Tensor | None = None,
) -> tuple[Tensor, GradSums | None]:
    """B3: the gradient of the convolution's input, through its ReLU with the two sums if act.

    grad: that of the convolution's output, dy or what it is computed from; weight
    ``[C, N, kh, kw]``; x ``[images, N, H, W]``: of it only the shape matters.
    """
    images, channels, height, width = x.shape
    out_channels = weight.shape[0]
    (sh, sw), _, (dh, dw), _ = geometry
    g, is_computed = grad_pointers(grad)[0], isinstance(grad, ConvGrad)
    assert g is not None
    cfg = config.choose("conv2d_dgrad", pixels(x), channels, out_channels, x, is_computed)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    rows_per_class = images * blocks(height, sh) * blocks(width, sw)
    parts = sh * sw * blocks(rows_per_class, cfg.block_m)
    partial = None
    pointers: tuple[Tensor | None, ...] = (None,) * 5
    if act is not None:
        partial = torch.empty((2, channels, parts), dtype=torch.float32, device=x.device)
        pointers = (act.y, act.mean, act.scale, act.beta, invstd)
    launch(
        _conv2d_dgrad_kernel,
        (parts * blocks(channels, cfg.block_n),),
        *grad_pointers(grad),
        weight.contiguous(memory_format=torch.channels_last),
        out,
        partial,
        *pointers,
        images,
        out_channels,
        channels,
        height,
        width,
        *g.shape[2:],
        parts,
        HAS_RELU=act is not None,
        STEP_H=sh // gcd(sh, dh),
        STEP_W=sw // gcd(sw, dw),
        **_constants(weight, geometry),
        **config.product_constants(precision, x, is_computed),
        BLOCK_M=cfg.block_m,
        BLOCK_N=cfg.block_n,
        BLOCK_K=cfg.block_k,
        **_steps(out_channels, channels, cfg),
        config=cfg,
    )
    return out, None if partial is None else sums_of(partial)
