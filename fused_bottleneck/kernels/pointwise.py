"""Elementwise stages: the standalone unit's activation and its gradient, the masked gradient, and
operands that are written once, where products would compute them many times (rules.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Activation, ConvGrad, MaskedGrad, pixels
from ..stages import GradSums
from .config import POINTWISE, blocks
from .launch import grad_pointers, launch
from .prologues import (
    cdiv,
    load_activation,
    load_conv_grad,
    load_masked_grad,
    put_tile,
    store_through_relu,
    tile,
)
from .reduce import sums_of


@triton.jit(do_not_specialize=["P"])
def _activation_kernel(
    y_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    centre_ptr,
    out_ptr,
    P,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``out = relu((y - mean) * scale + beta) - centre``, ``[P, C]``. Bytes: y + out."""
    pid = tl.program_id(0)
    offs = pid % cdiv(C, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = pid // cdiv(C, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, mask_p, mask = offs_p.to(tl.int64), offs_p < P, offs < C
    value = load_activation(
        y_ptr, mean_ptr, scale_ptr, beta_ptr, centre_ptr, rows, mask_p, C, offs, mask
    )
    put_tile(out_ptr, rows, mask_p, C, offs, mask, value)


def activation(act: Activation) -> Tensor:
    """``relu(BN(y)) - centre`` ``[N, C, H, W]`` in channels_last memory."""
    rows, channels = pixels(act.y), act.y.shape[1]
    out = torch.empty_like(act.y, memory_format=torch.channels_last)
    launch(
        _activation_kernel,
        (blocks(rows, POINTWISE.block_m) * blocks(channels, POINTWISE.block_n),),
        *act,
        out,
        rows,
        channels,
        BLOCK_M=POINTWISE.block_m,
        BLOCK_N=POINTWISE.block_n,
        config=POINTWISE,
    )
    return out


@triton.jit(do_not_specialize=["P"])
def _conv_grad_kernel(
    g_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    k0_ptr,
    k1_ptr,
    out_ptr,
    P,
    C,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``dy = scale * (g - k0 - (y - mean) * k1)``, ``[P, C]``. Bytes: g + y + dy."""
    pid = tl.program_id(0)
    offs = pid % cdiv(C, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = pid // cdiv(C, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, mask_p, mask = offs_p.to(tl.int64), offs_p < P, offs < C
    dy = load_conv_grad(
        g_ptr, y_ptr, mean_ptr, scale_ptr, k0_ptr, k1_ptr, rows, mask_p, C, offs, mask
    )
    put_tile(out_ptr, rows, mask_p, C, offs, mask, dy)


def conv_grad(grad: ConvGrad) -> Tensor:
    """dy ``[N, C, H, W]`` in channels_last memory."""
    rows, channels = pixels(grad.y), grad.y.shape[1]
    out = torch.empty_like(grad.y, memory_format=torch.channels_last)
    launch(
        _conv_grad_kernel,
        (blocks(rows, POINTWISE.block_m) * blocks(channels, POINTWISE.block_n),),
        *grad_pointers(grad),
        out,
        rows,
        channels,
        BLOCK_M=POINTWISE.block_m,
        BLOCK_N=POINTWISE.block_n,
        config=POINTWISE,
    )
    return out


@triton.jit(do_not_specialize=["P", "parts"])
def _relu_backward_kernel(
    grad_ptr,
    y_ptr,
    mean_ptr,
    scale_ptr,
    beta_ptr,
    invstd_ptr,
    out_ptr,
    partial_ptr,
    P,
    C,
    parts,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``g = grad_out * [a > 0]`` and the tiles' two sums, ``[P, C]``. Bytes: grad_out + y + g."""
    pid = tl.program_id(0)
    part = pid // cdiv(C, BLOCK_N)
    offs = pid % cdiv(C, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = part * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, mask_p = offs_p.to(tl.int64), offs_p < P
    grad = tile(grad_ptr, rows, mask_p, C, offs, offs < C).to(tl.float32)
    store_through_relu(
        out_ptr, partial_ptr, y_ptr, mean_ptr, scale_ptr, beta_ptr, invstd_ptr, grad, rows, mask_p,
        part, parts, offs, C,
    )  # fmt: skip


def relu_backward(grad_out: Tensor, act: Activation, invstd: Tensor) -> tuple[Tensor, GradSums]:
    """``g = grad_out * [a > 0]`` and its two sums; grad_out in channels_last memory."""
    rows, channels = pixels(act.y), act.y.shape[1]
    out = torch.empty_like(act.y, memory_format=torch.channels_last)
    parts = blocks(rows, POINTWISE.block_m)
    partial = torch.empty((2, channels, parts), dtype=torch.float32, device=out.device)
    launch(
        _relu_backward_kernel,
        (parts * blocks(channels, POINTWISE.block_n),),
        grad_out,
        *act[:4],
        invstd,
        out,
        partial,
        rows,
        channels,
        parts,
        BLOCK_M=POINTWISE.block_m,
        BLOCK_N=POINTWISE.block_n,
        config=POINTWISE,
    )
    return out, sums_of(partial)


@triton.jit(do_not_specialize=["Q"])
def _masked_grad_kernel(
    grad_ptr, bits_ptr, out_ptr, Q, W, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """``g = grad_out * bit``, ``[Q, W]``. Bytes: grad_out, its bits and g."""
    pid = tl.program_id(0)
    start = pid % cdiv(W, BLOCK_N) * BLOCK_N
    offs = start + tl.arange(0, BLOCK_N)
    offs_q = pid // cdiv(W, BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows, mask_q = offs_q.to(tl.int64), offs_q < Q
    g = load_masked_grad(grad_ptr, bits_ptr, rows, mask_q, W, start, BLOCK_M, BLOCK_N, False)
    put_tile(out_ptr, rows, mask_q, W, offs, offs < W, g)


def masked_grad(grad: MaskedGrad) -> Tensor:
    """``g = grad_out * bit`` ``[N, W, H', W']`` in channels_last memory."""
    rows, wide = pixels(grad.grad_out), grad.grad_out.shape[1]
    out = torch.empty_like(grad.grad_out, memory_format=torch.channels_last)
    launch(
        _masked_grad_kernel,
        (blocks(rows, POINTWISE.block_m) * blocks(wide, POINTWISE.block_n),),
        grad.grad_out,
        grad.mask.view(torch.int32),
        out,
        rows,
        wide,
        BLOCK_M=POINTWISE.block_m,
        BLOCK_N=POINTWISE.block_n,
        config=POINTWISE,
    )
    return out
