"""The block's programs on CPU as one C++ op each way (csrc/cpu/block_*.cpp).

The same ops in the same order as program.py makes of ``CpuProductStages``. Between two of them the
caches hold tensors, so that Python and torch's dispatch take several times what they take in a loop
of nothing else. Measured, batch 16, interleaved: 107.1 ms to 101.5 for 256-64 channels at 56x56,
96.2 to 90.3 for 1024-256 at 14x14, 211.0 to 207.1 for 1024-512 to 7x7.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu import chunk_images, products_fit
from .cpu_products import WINOGRAD_GEOMETRIES, CpuProductStages
from .operands import POINTWISE, Geometry, MaskedGrad
from .rules import MOST_CANCELLATION, uses_winograd
from .scratch import result_empty
from .tail_plan import TailPlan, tail_plans
from .units import Unit, UnitGrads

_passes = torch.ops.fused_bottleneck

_STATES_OF_CONVS = 4  # mean and invstd of conv1's and conv2's normalisations
_GRADS_OF_NORM = 3  # of bias, gamma and beta
_GRAM = -1  # in place of the number of images
Shape = tuple[int, ...]


class _Block(NamedTuple):
    """What shapes say about a block: of its narrow tensors, its output and the outputs that are
    kept, and the arguments of the ops. chunk: images of a contiguous output at a time."""

    y1: Shape
    y2: Shape
    out: Shape
    plans: list[TailPlan]
    sizes: list[int]
    images: list[int]
    chunk: int

    def scratch_bytes(self, channels_last: bool, backward: bool) -> int:
        chunk = 0 if channels_last else self.chunk
        return _scratch_bytes(
            torch.get_num_threads(), tuple(self.sizes), tuple(self.images), chunk, backward
        )


@lru_cache(maxsize=4096)
def _scratch_bytes(threads: int, sizes: Shape, images: Shape, chunk: int, backward: bool) -> int:
    return _passes.block_scratch(sizes, images, chunk, backward)


@lru_cache(maxsize=1024)
def block_of(
    x: Shape, weights: tuple[Shape, ...], geometries: tuple[Geometry, ...]
) -> _Block | None:
    """What the shapes say; None: the ops do not take them."""
    if not _fits(weights, geometries):
        return None
    n, _, h, w = x
    y1 = (n, weights[0][0], h, w)
    y2 = (n, weights[1][0], *geometries[1].output_size(h, w, (3, 3)))
    out = (n, weights[2][0], *y2[2:])
    if not uses_winograd(y2):
        return None
    none = torch.empty((), dtype=torch.float32)
    tails = [none.expand(shape) for shape in weights[2:]]
    operands = none.expand(x), none.expand(y1), none.expand(y2)
    plans = tail_plans(tails, [True for _ in tails], *operands, None)
    stride = geometries[3].stride[0] if len(weights) > 3 else 0
    sizes = [*x, y1[1], *out[1:], geometries[1].stride[0], stride]
    images = [_GRAM if plan.gram else plan.images for plan in plans]
    folded = sum(t.numel() for t, plan in zip(tails, plans, strict=True) if plan.gram)
    return _Block(y1, y2, out, plans, sizes, images, chunk_images(none.expand(out), folded))


def _fits(weights: Sequence[Shape], geometries: Sequence[Geometry]) -> bool:
    kernels = [shape[2:] for shape in weights]
    if kernels[:3] != [(1, 1), (3, 3), (1, 1)] or not all(products_fit(*w[:2]) for w in weights):
        return False
    if geometries[0] != POINTWISE or geometries[2] != POINTWISE:
        return False
    if geometries[1] not in WINOGRAD_GEOMETRIES:
        return False
    return len(weights) == 3 or _is_downsample(kernels[3], geometries[3])


def _is_downsample(kernel: Shape, geometry: Geometry) -> bool:
    stride, padding, _, groups = geometry
    return kernel == (1, 1) and stride[0] == stride[1] and padding == (0, 0) and groups == 1


def _is_dense(weight: Tensor) -> bool:
    """Whether a 1x1 weight ``[W, K, 1, 1]`` is a contiguous matrix."""
    return weight.stride(0) == weight.shape[1] and weight.stride(1) == 1


def _is_single(t: Tensor | None) -> bool:
    return t is None or t.dtype == torch.float32


def _served(x: Tensor, units: Sequence[Unit]) -> _Block | None:
    """What the ops need to know of a block that they can take; None if they cannot."""
    if not all(unit.batch for unit in units):
        return None
    weights = tuple(tuple(unit.weight.shape) for unit in units)
    block = block_of(tuple(x.shape), weights, tuple(unit.geometry for unit in units))
    if block is None:
        return None
    dense = all(_is_dense(unit.weight) for unit in (units[0], *units[2:]))
    single = all(_is_single(t) for unit in units for t in (unit.gamma, unit.beta, unit.bias))
    return block if dense and single else None


class CpuBlockStages(CpuProductStages):
    """``CpuProductStages``, and the programs of the block as a whole."""

    def whole_forward(
        self, x: Tensor, shortcut: Tensor | None, units: Sequence[Unit], channels_last: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
        block = _served(x, units)
        if block is None:
            return None
        x = self.channels_last(x)
        residual = None
        if len(units) == 3:
            residual = x if shortcut is None else self.channels_last(shortcut)
        n, width, h, w = block.out
        y1, y2 = (result_empty(shape, x.dtype, True) for shape in (block.y1, block.y2))
        out = result_empty(block.out, x.dtype, channels_last)
        kept = [result_empty((plan.images, width, h, w), x.dtype, True) for plan in block.plans]
        mask = torch.empty(n * h * w, -(-width // 8), dtype=torch.uint8)
        states, reported = _passes.block_forward_(
            x,
            residual,
            [unit.weight for unit in units],
            [unit.bias for unit in units],
            [unit.gamma for unit in units],
            [unit.beta for unit in units],
            [unit.eps for unit in units],
            block.sizes,
            block.images,
            0 if channels_last else block.chunk,
            MOST_CANCELLATION,
            y1,
            y2,
            kept,
            out,
            mask,
            self._lend(block.scratch_bytes(channels_last, False)),
        )
        saved = [y1, y2, mask, *states[:_STATES_OF_CONVS]]
        rest = iter(states[_STATES_OF_CONVS:])
        for plan, output in zip(block.plans, kept, strict=True):
            outputs = [] if plan.gram else [output]
            saved += [*islice(rest, plan.state_length - len(outputs)), *outputs]
        return out, saved, reported

    def whole_backward(
        self,
        grad: MaskedGrad,
        x: Tensor,
        units: Sequence[Unit],
        saved: Sequence[Tensor],
        needs_x: bool,
        needs_weight: Sequence[bool],
        identity: bool,
        channels_last: bool,
    ) -> tuple[Tensor | None, list[UnitGrads]] | None:
        """x and grad in channels_last memory."""
        block = _served(x, units)
        if block is None:
            return None
        grad_x = None
        if needs_x:
            grad_x = self._result(x) if channels_last else self._scratch(x)
        tails = zip(needs_weight[2:], block.plans, strict=True)
        written = [*needs_weight[:2], *(needed or plan.gram for needed, plan in tails)]
        weight_grads = [
            result_empty(unit.weight.shape, x.dtype, unit.weight.shape[2] > 1)
            if computed
            else x.new_empty(0, 0, 0, 0)
            for unit, computed in zip(units, written, strict=True)
        ]
        flat = _passes.block_backward_(
            grad.grad_out,
            x,
            identity,
            [unit.weight for unit in units],
            [unit.gamma for unit in units],
            [unit.beta for unit in units],
            saved,
            block.sizes,
            block.images,
            needs_weight,
            [t.permute(0, 2, 3, 1) for t in weight_grads],
            grad_x,
            self._lend(block.scratch_bytes(True, True)),
        )
        grads = [
            UnitGrads(weight, *flat[i * _GRADS_OF_NORM : (i + 1) * _GRADS_OF_NORM])
            for i, weight in enumerate(weight_grads)
        ]
        if grad_x is not None and not channels_last:
            grad_x = self._from_channels_last(grad_x)
        return grad_x, grads
