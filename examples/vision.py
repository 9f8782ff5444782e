"""torchvision, which only image folders and its models need."""

import importlib
import sys
from types import ModuleType

import torch
from config import Stop

_fragments: list[torch.library.Library] = []  # alive as long as their operators


def torchvision() -> ModuleType:
    """The package; raises ``Stop`` if it is not installed."""
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError:
        raise Stop(
            "torchvision is needed for this --data or --model: pip install torchvision", exit_code=2
        ) from None
    except RuntimeError:
        return _without_operators()


def _without_operators() -> ModuleType:
    """torchvision beside a torch that it was not compiled for, as a wheel for CUDA beside torch for
    CPU: it fails at import, as it registers fakes of operators, which only detection calls."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _fragments.append(fragment)
    return importlib.import_module("torchvision")
