"""Fused ResNet bottleneck blocks: drop-in modules that do not keep their wide intermediates."""

from . import extension
from .bottleneck import FusedBottleneck
from .conv_bn_relu import FusedConvBNReLU
from .convert import fuse, unfuse
from .functional import BatchNorm, Conv, bottleneck, conv_bn_relu
from .reference import Bottleneck, ConvBNReLU
from .report import explain
from .scratch import release as release_scratch
from .tuning import BlockShape, tune

__version__ = "0.1.0"

extension_loaded = extension.loaded
extension.load()  # a few ms; before torch.compile could trace it

__all__ = [
    "BatchNorm",
    "BlockShape",
    "Bottleneck",
    "Conv",
    "ConvBNReLU",
    "FusedBottleneck",
    "FusedConvBNReLU",
    "bottleneck",
    "conv_bn_relu",
    "explain",
    "extension_loaded",
    "fuse",
    "release_scratch",
    "tune",
    "unfuse",
]
