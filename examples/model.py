"""The network of the demo: a small ResNet of bottleneck blocks, in plain and in fused blocks."""

import torch
from config import Config
from torch import Tensor, nn

from fused_bottleneck import Bottleneck, ConvBNReLU, FusedBottleneck, FusedConvBNReLU

#: variant -> (block, stem); both variants have the same parameters under the same names.
BLOCKS: dict[str, tuple[type[Bottleneck], type[ConvBNReLU]]] = {
    "reference": (Bottleneck, ConvBNReLU),
    "fused": (FusedBottleneck, FusedConvBNReLU),
}


class SmallResNet(nn.Module):
    """Stem 3x3, stages of bottlenecks (the width doubles, the resolution halves), linear head.

    Args:
        block, stem: the module classes to build from; see ``BLOCKS``.
        width: bottleneck width of the first stage; its blocks have ``4 * width`` outputs.
        blocks_per_stage: number of blocks of each stage; the first has a 1x1 + BN downsample.
        classes: number of classes.

    Shapes: images ``[N, 1, H, W]`` to logits ``[N, classes]``.
    """

    def __init__(
        self,
        block: type[Bottleneck],
        stem: type[ConvBNReLU],
        width: int,
        blocks_per_stage: tuple[int, ...],
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = stem(1, width, kernel_size=3, padding=1)
        channels = width
        stages = []
        for index, count in enumerate(blocks_per_stage):
            stride = 1 if index == 0 else 2
            stages.append(_stage(block, channels, width << index, count, stride))
            channels = (width << index) * block.expansion
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(self.stem(images))
        return self.head(features.mean(dim=(2, 3)))


def _stage(
    block: type[Bottleneck], channels: int, width: int, count: int, stride: int
) -> nn.Sequential:
    wide = width * block.expansion
    downsample = nn.Sequential(nn.Conv2d(channels, wide, 1, stride), nn.BatchNorm2d(wide))
    first = block(channels, width, downsample, stride)
    return nn.Sequential(first, *(block(wide, width) for _ in range(count - 1)))


def build(config: Config, variant: str) -> SmallResNet:
    """The network of one variant. The same seed gives both variants the same weights."""
    torch.manual_seed(config.seed)
    block, stem = BLOCKS[variant]
    model = SmallResNet(block, stem, config.width, config.blocks_per_stage)
    return model.to(
        device=config.device,
        dtype=torch.float64 if config.dtype == "float64" else torch.float32,
        memory_format=memory_format(config),
    )


def memory_format(config: Config) -> torch.memory_format:
    """The torch constant of ``config.layout``."""
    return torch.channels_last if config.layout == "channels_last" else torch.contiguous_format
