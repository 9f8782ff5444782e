"""Models of the libraries that ``fuse`` is for: what the tests and the compatibility page run on.

Nothing is downloaded: weights are random. Each constructor takes keyword arguments of the
library's own, so that a test can ask for fewer blocks or classes.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

# torch's CPU builds and torchvision's wheels do not always match: without its compiled operators
# torchvision fails at import, as it registers fakes for these two. Only detection calls them.
_TORCHVISION_OPERATORS = ("nms", "qnms")
_fragments: list[torch.library.Library] = []  # alive as long as their operators


class Model(NamedTuple):
    """A model: the package it is from, its name there, and what makes it."""

    package: str
    name: str
    make: Callable[..., nn.Module]


def load(package: str) -> Any:
    """The package, imported; ImportError where it is not installed."""
    with suppress(ModuleNotFoundError):  # the others import it if it is there
        _import_torchvision()
    return importlib.import_module(package)


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        fragment = torch.library.Library("torchvision", "FRAGMENT")
        for name in _TORCHVISION_OPERATORS:
            fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _fragments.append(fragment)
        importlib.import_module("torchvision")


def _torchvision(name: str, **defaults: Any) -> Model:
    def make(**options: Any) -> nn.Module:
        models = load("torchvision").models
        path, _, function = name.rpartition(".")
        module = importlib.import_module(f"{models.__name__}.{path}") if path else models
        return getattr(module, function)(**defaults, **options)

    return Model("torchvision", name, make)


def _segmentation(name: str) -> Model:
    return _torchvision(f"segmentation.{name}", weights=None, weights_backbone=None)


def _frozen_detection(name: str) -> Model:
    """As it is made where pretrained weights are given: with fixed affine normalisations."""

    def make(**options: Any) -> nn.Module:
        torchvision = load("torchvision")
        frozen = torchvision.ops.misc.FrozenBatchNorm2d
        detection, utils = (
            importlib.import_module(f"torchvision.models.detection.{part}")
            for part in ("faster_rcnn", "backbone_utils")
        )
        backbone = utils.resnet_fpn_backbone(
            backbone_name="resnet50", weights=None, norm_layer=frozen, trainable_layers=3
        )
        return detection.FasterRCNN(backbone, num_classes=91, **options)

    return Model("torchvision", name, make)


def _timm(name: str) -> Model:
    def make(**options: Any) -> nn.Module:
        return load("timm").create_model(name, **options)

    return Model("timm", name, make)


def _transformers(name: str, config_name: str, **defaults: Any) -> Model:
    def make(**options: Any) -> nn.Module:
        transformers = load("transformers")
        config = getattr(transformers, config_name)(**(defaults | options))
        return getattr(transformers, name)(config)

    return Model("transformers", name, make)


def _smp(name: str, encoder: str) -> Model:
    def make(**options: Any) -> nn.Module:
        library = load("segmentation_models_pytorch")
        return getattr(library, name)(encoder, encoder_weights=None, **options)

    return Model("segmentation_models_pytorch", f"{name}({encoder!r})", make)


def _monai(name: str, **defaults: Any) -> Model:
    def make(**options: Any) -> nn.Module:
        load("monai")
        nets = importlib.import_module("monai.networks.nets")
        return getattr(nets, name)(**(defaults | options))

    return Model("monai", f"{name}({', '.join(f'{k}={v}' for k, v in defaults.items())})", make)


_MODELS = [
    _torchvision("resnet50"),
    _torchvision("resnet101"),
    _torchvision("resnet152"),
    _torchvision("resnext50_32x4d"),
    _torchvision("resnext101_32x8d"),
    _torchvision("wide_resnet50_2"),
    _torchvision("regnet_x_400mf"),
    _torchvision("regnet_y_400mf"),
    _torchvision("resnet18"),
    _torchvision("mobilenet_v2"),
    _segmentation("fcn_resnet50"),
    _segmentation("deeplabv3_resnet50"),
    _frozen_detection("detection.fasterrcnn_resnet50_fpn, frozen"),
    _torchvision("detection.fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None),
    _torchvision("quantization.resnet50"),
    _timm("resnet50"),
    _timm("resnet50d"),
    _timm("resnetaa50"),
    _timm("resnet50_gn"),
    _timm("seresnet50"),
    _timm("resnext50_32x4d"),
    _timm("wide_resnet50_2"),
    _timm("skresnext50_32x4d"),
    _timm("res2net50_26w_4s"),
    _timm("resnest50d"),
    _timm("resnetv2_50"),
    _timm("cspresnet50"),
    _transformers("ResNetForImageClassification", "ResNetConfig"),
    _transformers("RegNetForImageClassification", "RegNetConfig", layer_type="x"),
    _smp("Unet", "resnet50"),
    _smp("DeepLabV3Plus", "resnet50"),
    _monai("resnet50", spatial_dims=2, n_input_channels=3),
    _monai("resnet50", spatial_dims=3, n_input_channels=1),
]

MODELS = {f"{model.package}.{model.name}": model for model in _MODELS}
