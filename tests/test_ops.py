"""The custom ops under torch's own checks: schema, fakes, no aliasing, no mutation."""

from itertools import cycle
from typing import Any

import pytest
import torch
from helpers import Case, in_dtype, randomise, run
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fused_bottleneck import FusedBottleneck, FusedConvBNReLU

pytestmark = pytest.mark.usefixtures("backend")

OPS = [
    "bottleneck_forward",
    "bottleneck_backward",
    "conv_bn_relu_forward",
    "conv_bn_relu_backward",
]
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorder(TorchDispatchMode):
    """Records the calls of this library's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if str(func).split(".")[1] in OPS:
            # Detached: an argument may be the result of a graph that is freed by now.
            detached = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
            self.calls.append((func, *detached))
        return func(*args, **(kwargs or {}))


def recorded(block: torch.nn.Module, x: Tensor) -> list[Call]:
    with Recorder() as recorder:
        run(block, x)
    return recorder.calls


def frozen(block: torch.nn.Module, *names: str) -> torch.nn.Module:
    for name in names:
        block.get_submodule(name).eval()
    return block


def without_grad(block: torch.nn.Module, prefix: str) -> torch.nn.Module:
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(prefix))
    return block


DOWNSAMPLE = Case(channels=6, stride=2, downsample="conv", size=(2, 5, 4))
BLOCKS = {
    "identity": (Case(size=(2, 4, 3)), lambda b: b),
    "identity, no bias": (Case(size=(2, 4, 3), bias=False), lambda b: b),
    "odd mask": (Case(channels=12, width=3, size=(2, 4, 3)), lambda b: b),
    "downsample": (DOWNSAMPLE, lambda b: b),
    "downsample, eval": (DOWNSAMPLE, lambda b: b.eval()),
    "downsample, bn2 and its own frozen": (
        DOWNSAMPLE,
        lambda b: frozen(b, "bn2", "identity_downsample.1"),
    ),
    "shortcut": (Case(channels=6, stride=2, downsample="pool", size=(2, 5, 4)), lambda b: b),
    "groups, dilation": (
        Case(size=(2, 4, 3), options={"groups": 2, "dilation": 2}),
        lambda b: b,
    ),
    "some without grad": (DOWNSAMPLE, lambda b: without_grad(b, "conv2")),
    "float32": (DOWNSAMPLE, lambda b: in_dtype(b, torch.float32)),
    "bfloat16": (DOWNSAMPLE, lambda b: in_dtype(b, torch.bfloat16)),
}


LAYOUTS = [torch.contiguous_format, torch.channels_last]
KERNELS = ("test_schema", "test_autograd_registration", "test_faketensor")
# By far the slowest. It traces the fakes alone, which know of no implementation and treat layouts
# alike in all blocks: one implementation, and the layouts in turn.
DYNAMIC = ("test_aot_dispatch_dynamic",)
in_one_implementation = pytest.mark.parametrize("backend", ["extension"], indirect=True)


def check(calls: list[Call], names: list[str], utilities: tuple[str, ...]) -> None:
    assert [func.name().split("::")[1].split(".")[0] for func, _, _ in calls] == names
    for func, args, kwargs in calls:
        opcheck(func, args, kwargs, test_utils=utilities)


def calls_of_block(block: str, layout: torch.memory_format) -> list[Call]:
    case, prepare = BLOCKS[block]
    module = prepare(case.module(FusedBottleneck))
    dtype = next(module.parameters()).dtype
    return recorded(module, case.input().to(dtype).contiguous(memory_format=layout))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_opcheck_bottleneck(block: str, layout: torch.memory_format) -> None:
    check(calls_of_block(block, layout), OPS[:2], KERNELS)


@pytest.mark.slow
@in_one_implementation
@pytest.mark.parametrize(("block", "layout"), list(zip(BLOCKS, cycle(LAYOUTS))), ids=str)
def test_opcheck_bottleneck_of_any_size(block: str, layout: torch.memory_format) -> None:
    check(calls_of_block(block, layout), OPS[:2], DYNAMIC)


UNITS = {
    "1x1": {"kernel_size": 1},
    "3x3, stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "7x7, no bias": {"kernel_size": 7, "stride": 2, "padding": 3, "bias": False},
    "groups": {"kernel_size": 3, "groups": 2, "dilation": 2, "padding": 2},
}


def calls_of_unit(unit: str, training: bool) -> list[Call]:
    module = FusedConvBNReLU(4, 6, **UNITS[unit], dtype=torch.float64).train(training)
    randomise(module)
    return recorded(module, torch.randn(2, 4, 6, 5, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("unit", UNITS)
def test_opcheck_conv_bn_relu(unit: str, training: bool) -> None:
    check(calls_of_unit(unit, training), OPS[2:], KERNELS)


@in_one_implementation
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("unit", UNITS)
def test_opcheck_conv_bn_relu_of_any_size(unit: str, training: bool) -> None:
    check(calls_of_unit(unit, training), OPS[2:], DYNAMIC)


@pytest.mark.parametrize("name", OPS)
def test_ops_are_functional(name: str) -> None:
    """No argument is mutated, no result aliases one: what torch.compile may rely on."""
    schema = getattr(torch.ops.fused_bottleneck, name).default._schema
    assert not schema.is_mutable
    assert all(r.alias_info is None for r in schema.returns)
