"""A small ResNet of torchvision's, plain and fused, and comparisons of whole models."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from helpers import leaf, randomise
from torch import Tensor, nn

import fused_bottleneck as fb
from benchmarks import model_zoo
from fused_bottleneck.block import FusedBlock


def load(package: str) -> Any:
    """The package; the test is skipped where it is not installed."""
    try:
        return model_zoo.load(package)
    except ImportError as error:
        pytest.skip(f"{package} is not installed: {error}")


@cache
def _small_resnet() -> nn.Module:
    torch.manual_seed(0)
    resnet = load("torchvision").models.resnet
    model = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1])
    model.inplanes = 64
    for stage, blocks in enumerate((2, 1, 1, 1)):  # an eighth of the channels: whole seconds less
        layer = model._make_layer(resnet.Bottleneck, 8 << stage, blocks, 1 if stage == 0 else 2)
        setattr(model, f"layer{stage + 1}", layer)
    model.fc = nn.Linear(model.inplanes, 7)
    randomise(model)
    return model.double()


def small_resnet() -> nn.Module:
    """torchvision's ResNet of five bottleneck blocks, one of them without a downsample."""
    return copy.deepcopy(_small_resnet())


def pair() -> tuple[nn.Module, nn.Module]:
    """The small ResNet, plain and fused, with equal parameters."""
    return small_resnet(), fb.fuse(small_resnet(), strict=True)


def images(count: int = 3, size: int = 33, seed: int = 1) -> Tensor:
    """Random images in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)


def blocks_of(model: nn.Module) -> list[FusedBlock]:
    """The fused blocks of a model."""
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


def reasons(model: nn.Module, *inputs: Any) -> list[str | None]:
    """Why each fused block ran composed when the model was called; None for one that was fused."""
    found: list[str | None] = []
    handles = [
        block.register_forward_pre_hook(lambda b, args: found.append(b.why_not_fused(*args)))
        for block in blocks_of(model)
    ]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


def first_tensor(result: Any) -> Tensor:
    """The tensor that a model's result is about."""
    if isinstance(result, Tensor):
        return result
    return result["out"] if "out" in result else result["logits"]


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step, by name; seeded for dropout."""
    torch.manual_seed(0)
    model.zero_grad()
    x = leaf(x)
    out = first_tensor(model(x))
    generator = torch.Generator().manual_seed(2)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    found = {"out": out.detach(), "grad x": x.grad}
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {n: b.detach().clone() for n, b in model.named_buffers()}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor, relative to its largest element, or to a hundredth of the largest gradient."""
    assert got.keys() == want.keys()
    largest = max(
        (float(t.abs().max()) for n, t in want.items() if n.startswith("grad")), default=0
    )
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        limit = float(tensor.double().abs().max()) if tensor.numel() else 0.0
        if name.startswith("grad"):
            limit = max(limit, 1e-2 * largest)
        error = float((got[name].double() - tensor.double()).abs().max()) if tensor.numel() else 0.0
        assert error <= tolerance * limit, f"{name}: {error / (limit or 1):.3g}"
