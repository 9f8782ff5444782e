"""Batch statistics over the ranks of a process group, as ``nn.SyncBatchNorm`` takes them.

Sums over the pixels of all ranks are what a normalisation needs of the others: count, mean and
mean square in forward, ``sum(g)`` and ``sum(g * xhat)`` in backward. They are reduced in float64,
where a variance may be a difference of squares, and counts are exact. One all-reduce serves a
junction of the program, whatever is known there.

The bottleneck has three junctions in forward (after conv1, after conv2, and before the last
product: conv3 and the downsample together) and three in backward, where ``nn.SyncBatchNorm`` takes
one collective for each normalisation both ways: four with a downsample.
"""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .stages import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Part(NamedTuple):
    """This rank's part of the batch of one normalisation: pixels, the moments ``[C]`` of the
    normalisation's input, and for a folded one the mean ``[K]`` of the convolution's operand."""

    pixels: int
    moments: Moments
    operand_mean: Tensor | None = None


class Whole(NamedTuple):
    """The batch of one normalisation over all ranks, in float64: this rank's fraction of its pixels
    ``[1]``, the factor ``[1]`` that makes its variance unbiased, moments ``[C]``, and the mean
    ``[K]`` of the convolution's operand."""

    fraction: Tensor
    correction: Tensor
    moments: Moments
    operand_mean: Tensor | None


def group_name(group: "ProcessGroup | None") -> str | None:
    """The name of a process group (None: the default one) that has other ranks; else None."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    resolved = dist.group.WORLD if group is None else group
    if resolved is None or dist.get_world_size(resolved) < 2:
        return None
    return resolved.group_name


def _resolved(group: str) -> "ProcessGroup":
    from torch.distributed import distributed_c10d  # not in every build of torch

    return distributed_c10d._resolve_process_group(cast("Any", group))


def all_reduce(group: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each tensor over the ranks of a group, in float64; one collective."""
    flat = torch.cat([t.flatten().double() for t in tensors])
    dist.all_reduce(flat, group=_resolved(group))
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def all_reduce_fraction(group: str, sums: Sequence[Tensor], fraction: Tensor) -> list[Tensor]:
    """This rank's fraction of the sums over all ranks, in fraction's dtype; one collective.

    Divided by this rank's pixels they are the sums over all ranks divided by all pixels.
    """
    return [t.to(fraction.dtype) * fraction for t in all_reduce(group, sums)]


def all_reduce_moments(group: str, parts: Sequence[Part]) -> list[Whole]:
    """The whole of each batch from every rank's part; one collective."""
    sums = all_reduce(group, [t for part in parts for t in _sums(part)])
    wholes = []
    for part in parts:
        count = 3 if part.operand_mean is None else 4
        wholes.append(_whole(part, *sums[:count]))
        sums = sums[count:]
    return wholes


def _sums(part: Part) -> list[Tensor]:
    mean, var = (t.double() for t in part.moments)
    averages = [torch.ones_like(mean[:1]), mean, var + mean.square()]
    if part.operand_mean is not None:
        averages.append(part.operand_mean.double())
    return [t * part.pixels for t in averages]


def _whole(
    part: Part, pixels: Tensor, total: Tensor, squares: Tensor, operand: Tensor | None = None
) -> Whole:
    pixels = pixels.clamp_min(1)  # where no rank has any, all is zero
    mean = total / pixels
    var = (squares / pixels - mean.square()).clamp_min_(0)
    operand_mean = None if operand is None else operand / pixels
    correction = pixels / (pixels - 1).clamp_min(1)
    return Whole(part.pixels / pixels, correction, Moments(mean, var), operand_mean)


# What the ranks of a group agreed on, for as long as the group lives: names are used again.
_agreed: "WeakKeyDictionary[ProcessGroup, set[int]]" = WeakKeyDictionary()


def require_agreement(group: str, description: str, device: torch.device) -> None:
    """Raise on every rank unless all ranks are about to run a block of one description.

    Asked once for each group and description: a collective that costs a synchronisation, and so not
    while a CUDA graph is captured. Ranks that disagree later, having agreed on both descriptions
    before, fail in the next collective.

    Args:
        group: a process group's name.
        description: of the block.
        device: one that the group's collectives serve.

    Raises:
        ValueError: the descriptions differ.
    """
    resolved = _resolved(group)
    digest = zlib.crc32(description.encode())
    agreed = _agreed.setdefault(resolved, set())
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if digest in agreed or capturing:
        return
    extremes = torch.tensor([digest, -digest], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=resolved)
    if extremes.tolist() != [digest, -digest]:
        raise ValueError(
            "normalisations that are synchronised must belong to the same block on every rank of "
            f"the process group, got another one than this rank's on some: {description}"
        )
    agreed.add(digest)
