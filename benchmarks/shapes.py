"""The sixteen bottleneck blocks of ResNet-50 at 224x224 pixels, as eight distinct shapes."""

from __future__ import annotations

from dataclasses import dataclass

EXPANSION = 4


@dataclass(frozen=True)
class BlockShape:
    """One block: input channels C, width M, input height and width, and how often it occurs."""

    in_channels: int
    width: int
    size: int
    stride: int
    downsample: bool
    count: int

    @property
    def name(self) -> str:
        """`C-M@size`, `C-M@size->size` with a stride; `-ds` where the shortcut is a convolution."""
        size = f"{self.size}" if self.stride == 1 else f"{self.size}->{self.out_size}"
        return f"{self.in_channels}-{self.width}@{size}" + ("-ds" if self.downsample else "")

    @property
    def out_channels(self) -> int:
        """Output channels W = 4M."""
        return EXPANSION * self.width

    @property
    def out_size(self) -> int:
        """Output height and width."""
        return (self.size - 1) // self.stride + 1


RESNET50 = (
    BlockShape(64, 64, 56, stride=1, downsample=True, count=1),
    BlockShape(256, 64, 56, stride=1, downsample=False, count=2),
    BlockShape(256, 128, 56, stride=2, downsample=True, count=1),
    BlockShape(512, 128, 28, stride=1, downsample=False, count=3),
    BlockShape(512, 256, 28, stride=2, downsample=True, count=1),
    BlockShape(1024, 256, 14, stride=1, downsample=False, count=5),
    BlockShape(1024, 512, 14, stride=2, downsample=True, count=1),
    BlockShape(2048, 512, 7, stride=1, downsample=False, count=2),
)
SHAPES = {shape.name: shape for shape in RESNET50}
