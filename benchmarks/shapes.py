"""The bottleneck blocks of ResNets at 224x224 pixels: per network its distinct shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockShape:
    """One block: input channels C, width M, input height and width, and how often it occurs.

    Its output has ``expansion * M`` channels; groups are those of the 3x3 convolution.
    """

    in_channels: int
    width: int
    size: int
    stride: int
    downsample: bool
    count: int
    expansion: int = 4
    groups: int = 1

    @property
    def name(self) -> str:
        """`C-M@size`, `C-M@size->size` with a stride; `-ds` where the shortcut is a convolution,
        `-x2` for another expansion than 4, `-g32` for groups."""
        size = f"{self.size}" if self.stride == 1 else f"{self.size}->{self.out_size}"
        parts = [f"{self.in_channels}-{self.width}@{size}"]
        parts += ["ds"] if self.downsample else []
        parts += [f"x{self.expansion}"] if self.expansion != 4 else []
        parts += [f"g{self.groups}"] if self.groups != 1 else []
        return "-".join(parts)

    @property
    def out_channels(self) -> int:
        """Output channels W = expansion * M."""
        return self.expansion * self.width

    @property
    def out_size(self) -> int:
        """Output height and width."""
        return (self.size - 1) // self.stride + 1


def network(
    blocks: Sequence[int], expansion: int = 4, groups: int = 1, size: int = 56
) -> tuple[BlockShape, ...]:
    """The shapes of a ResNet with that many blocks in its four stages, in their order.

    A stage's output has 256, 512, 1024, 2048 channels whatever the expansion; all but the first
    stage start with a stride of 2. size: height and width of the first stage's input.
    """
    shapes = []
    channels = 64
    for stage, count in enumerate(blocks):
        wide = 256 << stage
        width = wide // expansion
        stride = 1 if stage == 0 else 2
        first = BlockShape(channels, width, size, stride, True, 1, expansion, groups)
        size = first.out_size
        shapes.append(first)
        if count > 1:
            shapes.append(BlockShape(wide, width, size, 1, False, count - 1, expansion, groups))
        channels = wide
    return tuple(shapes)


RESNET50 = network((3, 4, 6, 3))
NETWORKS = {
    "resnet50": RESNET50,
    "resnet152": network((3, 8, 36, 3)),
    "resnext50_32x4d": network((3, 4, 6, 3), expansion=2, groups=32),
    "wide_resnet50_2": network((3, 4, 6, 3), expansion=2),
}
# By name. A shape that several networks share has ResNet-50's count.
SHAPES = {shape.name: shape for shapes in NETWORKS.values() for shape in shapes}
SHAPES |= {shape.name: shape for shape in RESNET50}
