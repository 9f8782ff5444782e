"""The networks: a small ResNet or one of torchvision's, of plain or of fused bottleneck blocks."""

import torch
import vision
from config import SMALL, Config
from torch import Tensor, nn

from fused_bottleneck import Bottleneck, ConvBNReLU, FusedBottleneck, FusedConvBNReLU, fuse

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
        image_channels: channels of the images.
        classes: number of classes.

    Shapes: images ``[N, image_channels, H, W]`` to logits ``[N, classes]``.
    """

    def __init__(
        self,
        block: type[Bottleneck],
        stem: type[ConvBNReLU],
        width: int,
        blocks_per_stage: tuple[int, ...],
        image_channels: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.stem = stem(image_channels, width, kernel_size=3, padding=1)
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


def build(config: Config, variant: str) -> nn.Module:
    """The network of one variant. The same seed gives both variants the same weights."""
    torch.manual_seed(config.seed)
    model = (_small if config.model == SMALL else _torchvision)(config, variant)
    return model.to(
        device=config.device,
        dtype=torch.float64 if config.dtype == "float64" else torch.float32,
        memory_format=memory_format(config),
    )


def _small(config: Config, variant: str) -> nn.Module:
    block, stem = BLOCKS[variant]
    return SmallResNet(
        block, stem, config.width, config.blocks_per_stage, config.channels, config.classes
    )


def _torchvision(config: Config, variant: str) -> nn.Module:
    constructor = getattr(vision.torchvision().models, config.model)
    model = constructor(num_classes=config.classes)
    return fuse(model, stem=True) if variant == "fused" else model


def memory_format(config: Config) -> torch.memory_format:
    """The torch constant of ``config.layout``."""
    return torch.channels_last if config.layout == "channels_last" else torch.contiguous_format
