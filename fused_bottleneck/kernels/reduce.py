"""Combining the tiles' partial results, always in the same order: one small kernel each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..stages import GradSums, Moments
from .config import REDUCE, blocks, combining
from .launch import launch
from .prologues import tile


@triton.jit(do_not_specialize=["parts", "count", "last"])
def _combine_moments_kernel(
    partial_ptr, mean_ptr, var_ptr, N, parts, count, last, BLOCK: tl.constexpr
):
    """Mean and variance of a channel from mean, M2 of its tiles (Chan et al. for many parts).

    ``mean = sum(n_i mean_i) / n``; ``var = sum(M2_i + n_i (mean_i - mean)^2) / n``; the means are
    taken relative to the first tile's, so that a large one costs nothing. A program owns a
    channel; partial ``[2, N, parts]``, every tile has count rows but the final one, last.
    Bytes: 16 N parts.
    """
    channel = tl.program_id(0).to(tl.int64)
    mean_ptrs = partial_ptr + channel * parts
    first = tl.load(mean_ptrs)
    rows = (parts - 1).to(tl.float32) * count + last
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        size = tl.where(offs == parts - 1, last, count).to(tl.float32)
        mean = tl.load(mean_ptrs + offs, mask=offs < parts, other=0.0)
        total += tl.where(offs < parts, (mean - first) * size, 0.0)
    shift = tl.sum(total, 0) / rows
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        size = tl.where(offs == parts - 1, last, count).to(tl.float32)
        mean = tl.load(mean_ptrs + offs, mask=offs < parts, other=0.0)
        m2 = tl.load(mean_ptrs + N.to(tl.int64) * parts + offs, mask=offs < parts, other=0.0)
        deviation = mean - first - shift
        squares += tl.where(offs < parts, m2 + deviation * deviation * size, 0.0)
    tl.store(mean_ptr + channel, first + shift)
    tl.store(var_ptr + channel, tl.sum(squares, 0) / rows)


def moments_of(partial: Tensor, rows: int, count: int) -> Moments:
    """The moments of ``[rows, N]`` from those of its tiles of count rows, ``[2, N, parts]``."""
    _, channels, parts = partial.shape
    result = torch.empty((2, channels), dtype=torch.float32, device=partial.device)
    mean, var = result.unbind()
    launch(
        _combine_moments_kernel,
        (channels,),
        partial,
        mean,
        var,
        channels,
        parts,
        count,
        rows - (parts - 1) * count,
        BLOCK=REDUCE.block_m,
        config=REDUCE,
    )
    return Moments(mean, var)


@triton.jit(do_not_specialize=["parts"])
def _combine_sums_kernel(partial_ptr, sums_ptr, parts, BLOCK: tl.constexpr):
    """``sums[i] = sum over parts of partial[i, part]``. A program owns one i."""
    i = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + i * parts + offs, mask=offs < parts, other=0.0)
    tl.store(sums_ptr + i, tl.sum(total, 0))


def sums_of(partial: Tensor) -> GradSums:
    """The two sums per channel from those of the tiles, ``[2, N, parts]``."""
    _, channels, parts = partial.shape
    sums = torch.empty((2, channels), dtype=torch.float32, device=partial.device)
    launch(
        _combine_sums_kernel,
        (2 * channels,),
        partial,
        sums,
        parts,
        BLOCK=REDUCE.block_m,
        config=REDUCE,
    )
    return GradSums(*sums.unbind())


@triton.jit
def parts_tile(ptr, stride, start, parts, offs, mask, PARTS: tl.constexpr):
    """``ptr[p * stride + offs]`` of PARTS parts from start on, ``[PARTS, BLOCK]`` in float64.

    Partial results are loaded by so many at a time: one by one they are a chain of waits.
    """
    part = start + tl.arange(0, PARTS)
    return tile(ptr, part.to(tl.int64), part < parts, stride, offs, mask).to(tl.float64)


@triton.jit(do_not_specialize=["parts"])
def _combine_products_kernel(
    partial_ptr, out_ptr, size, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """``out[i] = sum over parts of partial[part, i]``, in float64. A program owns BLOCK elements.

    Bytes: 4 size parts + out.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    total = tl.zeros([PARTS, BLOCK], tl.float64)
    for start in range(0, parts, PARTS):
        total += parts_tile(partial_ptr, size, start, parts, offs, mask, PARTS)
    tl.store(out_ptr + offs, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=mask)


def products_of(partial: Tensor, out: Tensor) -> Tensor:
    """``out = partial.sum(0)`` for partial ``[parts, *]`` float32 and a dense out."""
    size = partial[0].numel()
    cfg = combining(partial.shape[0])
    launch(
        _combine_products_kernel,
        (blocks(size, cfg.block_n),),
        partial,
        out,
        size,
        partial.shape[0],
        PARTS=cfg.block_m,
        BLOCK=cfg.block_n,
        config=cfg,
    )
    return out
