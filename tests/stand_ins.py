"""Blocks built as libraries build theirs that the tests cannot install, under the names they have.

detectron2 is in no package index; OpenMMLab's need their own builds of mmcv; CLIP's are no
test's business to download. What matters here is where each block keeps its parts, which of its
attributes switch something on, and what its modules compute.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Kind = TypeVar("Kind", bound=type)
_registered: dict[str, type] = {}


def known_as(path: str) -> Callable[[Kind], Kind]:
    """Gives a class the module and the name that the library's class has."""

    def rename(kind: Kind) -> Kind:
        kind.__module__, _, kind.__qualname__ = path.rpartition(".")
        kind.__name__ = kind.__qualname__
        _registered[path] = kind
        return kind

    return rename


def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts modules with the stand-ins where an import, as pickle's, finds them."""
    for path, kind in _registered.items():
        package, _, name = path.rpartition(".")
        steps = package.split(".")
        for end in range(1, len(steps) + 1):
            parent = ".".join(steps[:end])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setattr(sys.modules[package], name, kind, raising=False)


# detectron2: a convolution calls its own normalisation; ReLUs are functions.


@known_as("detectron2.layers.batch_norm.FrozenBatchNorm2d")
class FrozenNorm(nn.Module):
    """An affine map with fixed vectors, cast to its input's dtype."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels).uniform_(0.5, 1.5))
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


@known_as("detectron2.layers.wrappers.Conv2d")
class ConvWithNorm(nn.Conv2d):
    def __init__(self, *args: int, norm: nn.Module | None, **options: int) -> None:
        super().__init__(*args, bias=False, **options)
        self.norm = norm
        self.activation: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        args = (self.stride, self.padding, self.dilation, self.groups)
        x = F.conv2d(x, self.weight, self.bias, *args)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


@known_as("detectron2.modeling.backbone.resnet.BottleneckBlock")
class Detectron2Block(nn.Module):
    def __init__(
        self,
        channels: int,
        width: int,
        stride: int = 1,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        stride_in_1x1: bool = False,
        **options: int,
    ) -> None:
        super().__init__()
        strides = (stride, 1) if stride_in_1x1 else (1, stride)
        wide = 4 * width
        self.shortcut = None
        if channels != wide:
            self.shortcut = ConvWithNorm(channels, wide, 1, stride, norm=norm(wide))
        self.conv1 = ConvWithNorm(channels, width, 1, strides[0], norm=norm(width))
        self.conv2 = ConvWithNorm(width, width, 3, strides[1], norm=norm(width), **options)
        self.conv3 = ConvWithNorm(width, wide, 1, norm=norm(wide))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


# OpenMMLab: names of normalisations are data, and attributes switch things on.


class OpenMMLabBlock(nn.Module):
    def __init__(
        self,
        channels: int,
        width: int,
        stride: int = 1,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        strides = (stride, 1) if stride_in_1x1 else (1, stride)
        abbreviation = "bn" if norm is nn.BatchNorm2d else "norm_layer"
        self.norm_names = [f"{abbreviation}{i}" for i in (1, 2, 3)]
        self.conv1 = nn.Conv2d(channels, width, 1, strides[0], bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, strides[1], 1, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        for name, size in zip(self.norm_names, (width, width, 4 * width), strict=True):
            self.add_module(name, norm(size))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), norm(4 * width)
            )
        self.with_cp = False

    norm1 = property(lambda self: getattr(self, self.norm_names[0]))
    norm2 = property(lambda self: getattr(self, self.norm_names[1]))
    norm3 = property(lambda self: getattr(self, self.norm_names[2]))

    def branch_and_sum(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.relu(self.norm2(self.conv2(out)))
        out = self.after(self.norm3(self.conv3(out)))
        out += x if self.downsample is None else self.downsample(x)
        return out

    def after(self, out: Tensor) -> Tensor:
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and x.requires_grad:
            return self.relu(checkpoint(self.branch_and_sum, x, use_reentrant=False))
        return self.relu(self.branch_and_sum(x))


@known_as("mmpretrain.models.backbones.resnet.Bottleneck")
class MMPretrainBlock(OpenMMLabBlock):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.drop_path: nn.Module = nn.Identity()

    def after(self, out: Tensor) -> Tensor:
        return self.drop_path(out)


@known_as("mmdet.models.backbones.resnet.Bottleneck")
class MMDetBlock(OpenMMLabBlock):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.after_conv3_plugin_names: list[str] = []

    def after(self, out: Tensor) -> Tensor:
        for name in self.after_conv3_plugin_names:
            out = getattr(self, name)(out)
        return out


@known_as("mmseg.models.backbones.resnet.ResNet")
class OpenMMLabResNet(nn.Module):
    """Only its stem, which is a Sequential where it is deep."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.stem = None
        if deep:
            self.stem = nn.Sequential(
                nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            )
        else:
            self.conv1 = nn.Conv2d(3, 4, 7, 2, 3)
            self.bn1, self.relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    norm1 = property(lambda self: self.bn1)

    def forward(self, x: Tensor) -> Tensor:
        if self.stem is None:
            return self.maxpool(self.relu(self.norm1(self.conv1(x))))
        return self.maxpool(self.stem(x))


# CLIP: strides are poolings.


@known_as("clip.model.Bottleneck")
class CLIPBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        wide = 4 * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, wide, 1, bias=False)
        self.bn3, self.relu3 = nn.BatchNorm2d(wide), nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != wide:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.avgpool(self.relu2(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu3(out)
