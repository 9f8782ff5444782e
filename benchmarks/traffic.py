"""Bytes and floating-point operations of one training step of a block, by plan and by stage.

Every tensor that a step must read or write is counted once per pass over it; weights, per-channel
vectors and cache hits are left out. Tensors are named as in the derivation: x is the input, y1 and
y2 the outputs of the first two convolutions (width M), `wide` any tensor of the output's size,
x_s the strided pixels of x that a downsample reads.

Operations are two for each multiply-add. A network's published size counts those with the zeros
around an image too (`convolution_flops`), which no one need compute: what a stage needs
(`fused_stages`), and the rates that it is held against (roofline.py), count those with pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shapes import BlockShape


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of one block; `mask` is one bit per output element."""

    x: float
    x_s: float
    y1: float
    y2: float
    wide: float
    mask: float


def sizes(shape: BlockShape, batch: int, itemsize: int) -> Sizes:
    """Bytes of each tensor of `shape` at `batch` images and `itemsize` bytes per element."""
    pixels_in = batch * shape.size**2
    pixels_out = batch * shape.out_size**2
    return Sizes(
        x=pixels_in * shape.in_channels * itemsize,
        x_s=pixels_out * shape.in_channels * itemsize,
        y1=pixels_in * shape.width * itemsize,
        y2=pixels_out * shape.width * itemsize,
        wide=pixels_out * shape.out_channels * itemsize,
        mask=pixels_out * shape.out_channels / 8,
    )


def _convolutions(s: Sizes, downsample: bool) -> float:
    """Forward, data gradient and weight gradient each pass over one input and one output."""
    shortcut = s.x + s.wide if downsample else 0
    return 3 * ((s.x + s.y1) + (s.y1 + s.y2) + (s.y2 + s.wide) + shortcut)


def eager_bytes(shape: BlockShape, batch: int, itemsize: int) -> float:
    """Bytes of one step of the block run operation by operation.

    A batch norm passes 3 times over its tensor forward (statistics; read, write) and 5 times
    backward (sums over gradient and input; both again, and a write), a ReLU 2 and 3 times.
    """
    s = sizes(shape, batch, itemsize)
    batch_norm, relu = 3 + 5, 2 + 3
    narrow = (batch_norm + relu) * (s.y1 + s.y2)
    wide_norms = batch_norm * s.wide * (2 if shape.downsample else 1)
    add = 3 * s.wide
    accumulate_grad_x = 3 * s.x
    tail = add + relu * s.wide
    return _convolutions(s, shape.downsample) + narrow + wide_norms + tail + accumulate_grad_x


def inductor_bytes(shape: BlockShape, batch: int, itemsize: int) -> float:
    """Bytes of one step when a compiler fuses pointwise operations and reductions around eager
    convolutions, and every input and output of a convolution still exists.

    Narrow BN+ReLU: statistics 1, apply 2, gradient sums 3 (gradient, output, input), apply 4.
    Tail: the same per normalized branch, with the masked gradient stored once and shared.
    """
    s = sizes(shape, batch, itemsize)
    branches = 2 if shape.downsample else 1
    narrow = (1 + 2 + 3 + 4) * (s.y1 + s.y2)
    statistics = branches * s.wide
    apply_add_relu = (branches + 1) * s.wide + (0 if shape.downsample else s.x)
    grad_sums = (3 + branches) * s.wide  # read grad_out, out and each branch; write g
    grad_apply = (1 + 2 * branches) * s.wide  # read g and each branch; write each gradient
    tail = statistics + apply_add_relu + grad_sums + grad_apply
    return _convolutions(s, shape.downsample) + narrow + tail + 3 * s.x


@dataclass(frozen=True)
class Cost:
    """What a stage costs at least: bytes that it moves, operations of its products."""

    moved: float
    operations: float


FORWARD_STAGES = ("F1", "F2", "F3", "F4")


def fused_stages(shape: BlockShape, batch: int, itemsize: int) -> dict[str, Cost]:
    """The ten fused stages of a training step, in which no wide intermediate exists, by name."""
    s = sizes(shape, batch, itemsize)
    x_s = s.x_s if shape.downsample else 0
    identity = 0 if shape.downsample else s.x
    grad_out = s.wide + s.mask
    conv1, conv2, conv3, downsample = _necessary_operations(shape, batch)
    # Half of a covariance is computed: it is symmetric. The products with B, [M, M] and [C, C].
    narrow = 2.0 * batch * shape.out_size**2 * shape.width**2
    shortcut = 2.0 * batch * shape.out_size**2 * shape.in_channels**2 if shape.downsample else 0
    return {
        "F1": Cost(s.x + s.y1, conv1),
        "F2": Cost(s.y1 + s.y2, conv2),
        "F3": Cost(s.y2 + x_s, (narrow + shortcut) / 2),
        "F4": Cost(s.y2 + x_s + identity + s.wide + s.mask, conv3 + downsample),
        "B1": Cost(grad_out + s.y2 + x_s, conv3 + downsample),
        "B2": Cost(grad_out + s.y2 + s.y2, conv3 + narrow),
        "B3": Cost(s.y2 + s.y2 + s.y1 + s.y1, conv2),
        "B4": Cost(s.y2 + s.y2 + s.y1, conv2),
        "B5": Cost(s.y1 + s.y1 + s.x, conv1),
        "B6": Cost(s.y1 + s.y1 + grad_out + x_s + s.x, conv1 + downsample + shortcut),
    }


def fused_bytes(shape: BlockShape, batch: int, itemsize: int) -> float:
    """Bytes of one step of the ten fused stages."""
    return sum(cost.moved for cost in fused_stages(shape, batch, itemsize).values())


def _convolution_operations(shape: BlockShape, batch: int) -> tuple[float, float, float, float]:
    """Two operations per multiply-add of conv1, conv2, conv3 and the downsample's convolution."""
    pixels_in = 2.0 * batch * shape.size**2
    pixels_out = 2.0 * batch * shape.out_size**2
    return (
        pixels_in * shape.in_channels * shape.width,
        pixels_out * 9 * shape.width**2 / shape.groups,
        pixels_out * shape.width * shape.out_channels,
        pixels_out * shape.in_channels * shape.out_channels if shape.downsample else 0.0,
    )


def pixel_share(size: int, kernel: int, stride: int, padding: int) -> float:
    """The part of a square convolution's multiply-adds whose factor is a pixel, not padding."""
    outputs = (size + 2 * padding - kernel) // stride + 1
    inputs = [o * stride + tap - padding for o in range(outputs) for tap in range(kernel)]
    return (sum(0 <= i < size for i in inputs) / len(inputs)) ** 2


def _necessary_operations(shape: BlockShape, batch: int) -> tuple[float, float, float, float]:
    """Of the four convolutions, without those on padding."""
    conv1, conv2, conv3, downsample = _convolution_operations(shape, batch)
    return conv1, conv2 * pixel_share(shape.size, 3, shape.stride, 1), conv3, downsample


def convolution_flops(shape: BlockShape, batch: int) -> float:
    """Operations of one forward pass: two per multiply-add of each convolution."""
    return sum(_convolution_operations(shape, batch))


def step_flops(shape: BlockShape, batch: int) -> float:
    """Convolution operations of one training step: forward, data gradient, weight gradient."""
    return 3 * convolution_flops(shape, batch)


def fused_extra_flops(shape: BlockShape, batch: int) -> float:
    """Operations that only the fused plan has: Gram matrices (F3) and the B terms (B2, B6)."""
    stages = fused_stages(shape, batch, itemsize=1).values()
    return sum(cost.operations for cost in stages) - 3 * sum(_necessary_operations(shape, batch))
