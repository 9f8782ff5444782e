"""Fused ResNet bottleneck blocks: drop-in modules whose wide intermediates never reach memory."""

from .bottleneck import FusedBottleneck
from .conv_bn_relu import FusedConvBNReLU
from .extension import loaded as extension_loaded
from .functional import BatchNorm, Conv, bottleneck, conv_bn_relu
from .reference import Bottleneck, ConvBNReLU
from .scratch import release as release_scratch

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "Bottleneck",
    "Conv",
    "ConvBNReLU",
    "FusedBottleneck",
    "FusedConvBNReLU",
    "bottleneck",
    "conv_bn_relu",
    "extension_loaded",
    "release_scratch",
]
