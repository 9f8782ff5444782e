"""Misuse of the functional interface: every message names argument, expected and actual."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_bottleneck import BatchNorm, Conv, bottleneck, conv_bn_relu

Arguments = dict[str, Any]


def conv(w: int, c: int, kernel: int = 1, **options: Any) -> Conv:
    return Conv(torch.ones(w, c, kernel, kernel), torch.ones(w), **options)


def norm(c: int, **options: Any) -> BatchNorm:
    vectors = (torch.ones(c), torch.ones(c), torch.zeros(c), torch.ones(c))
    return BatchNorm(*vectors, **options)


def good() -> Arguments:
    """Arguments of a strided bottleneck with a downsample: C = 6, M = 4, W = 16."""
    return {
        "x": torch.randn(2, 6, 5, 4),
        "conv1": conv(4, 6),
        "bn1": norm(4),
        "conv2": conv(4, 4, 3, stride=2, padding=1),
        "bn2": norm(4),
        "conv3": conv(16, 4),
        "bn3": norm(16),
        "downsample": (conv(16, 6, stride=2), norm(16)),
    }


def change(name: str, **fields: Any) -> Callable[[Arguments], None]:
    """Replace fields of one argument."""

    def apply(arguments: Arguments) -> None:
        arguments[name] = arguments[name]._replace(**fields)

    return apply


def put(**values: Any) -> Callable[[Arguments], None]:
    return lambda arguments: arguments.update(values)


# What is wrong; the error; what its message must name: argument, expected, actual.
Case = tuple[Callable[[Arguments], None], type[Exception], list[str]]
CASES: dict[str, Case] = {
    "x not a tensor": (put(x=[1.0]), TypeError, ["x", "Tensor", "list"]),
    "x rank": (put(x=torch.randn(6, 5, 4)), ValueError, ["x", "[6, 5, 4]"]),
    "x integer": (put(x=torch.ones(2, 6, 5, 4, dtype=torch.int32)), TypeError, ["x", "int32"]),
    "x complex": (
        put(x=torch.ones(2, 6, 5, 4, dtype=torch.complex64)),
        TypeError,
        ["x", "complex64"],
    ),
    "x channels": (put(x=torch.randn(2, 5, 5, 4)), ValueError, ["6", "5"]),
    "x empty": (put(x=torch.randn(0, 6, 5, 4)), ValueError, ["x", "[0, 6, 5, 4]"]),
    "weight dtype": (
        change("conv2", weight=torch.ones(4, 4, 3, 3).double()),
        TypeError,
        ["conv2", "weight", "float32", "float64"],
    ),
    "weight rank": (
        change("conv2", weight=torch.ones(4, 4, 3)),
        ValueError,
        ["conv2", "weight", "[4, 4, 3]"],
    ),
    "weight channels": (
        change("conv3", weight=torch.ones(16, 3, 1, 1)),
        ValueError,
        ["conv3", "weight", "4", "3"],
    ),
    "weight device": (
        change("conv1", weight=torch.ones(4, 6, 1, 1, device="meta")),
        ValueError,
        ["conv1", "weight", "cpu", "meta"],
    ),
    "bias shape": (
        change("conv1", bias=torch.ones(5)),
        ValueError,
        ["conv1", "bias", "[4]", "[5]"],
    ),
    "bias dtype": (
        change("conv1", bias=torch.ones(4).double()),
        TypeError,
        ["conv1", "bias", "float32", "float64"],
    ),
    "groups do not divide": (
        change("conv2", groups=3),
        ValueError,
        ["conv2", "groups", "3"],
    ),
    "groups of conv1": (
        change("conv1", groups=2, weight=torch.ones(4, 3, 1, 1)),
        ValueError,
        ["conv1", "groups", "1", "2"],
    ),
    "conv1 kernel": (
        change("conv1", weight=torch.ones(4, 6, 3, 3)),
        ValueError,
        ["conv1", "1", "3"],
    ),
    "conv1 stride": (change("conv1", stride=2), ValueError, ["conv1", "stride", "1", "2"]),
    "conv3 padding": (
        change("conv3", padding=1),
        ValueError,
        ["conv3", "without padding", "padding (1, 1)"],
    ),
    "stride zero": (change("conv2", stride=0), ValueError, ["conv2", "stride", "0"]),
    "padding negative": (change("conv2", padding=-1), ValueError, ["conv2", "padding", "-1"]),
    "dilation zero": (change("conv2", dilation=0), ValueError, ["conv2", "dilation", "0"]),
    "stride a string": (change("conv2", stride="same"), TypeError, ["stride", "same"]),
    "stride a triple": (change("conv2", stride=(1, 1, 1)), TypeError, ["stride", "(1, 1, 1)"]),
    "kernel beyond the input": (
        change("conv2", weight=torch.ones(4, 4, 9, 9)),
        ValueError,
        ["conv2"],
    ),
    "gamma shape": (
        change("bn2", weight=torch.ones(5)),
        ValueError,
        ["bn2", "weight", "[4]", "[5]"],
    ),
    "beta shape": (
        change("bn3", bias=torch.ones(4)),
        ValueError,
        ["bn3", "bias", "[16]", "[4]"],
    ),
    "running_mean shape": (
        change("bn1", running_mean=torch.ones(6)),
        ValueError,
        ["bn1", "running_mean", "[4]", "[6]"],
    ),
    "running_var device": (
        change("bn1", running_var=torch.ones(4, device="meta")),
        ValueError,
        ["bn1", "running_var", "cpu", "meta"],
    ),
    "no running statistics": (
        change("bn1", running_mean=None, running_var=None, training=False),
        ValueError,
        ["bn1", "running_mean"],
    ),
    "one running statistic": (
        change("bn1", running_var=None, training=False),
        ValueError,
        ["bn1", "running_var"],
    ),
    "downsample kernel": (
        put(downsample=(conv(16, 6, 3, stride=2, padding=1), norm(16))),
        ValueError,
        ["downsample", "1", "3"],
    ),
    "downsample width": (
        put(downsample=(conv(12, 6, stride=2), norm(12))),
        ValueError,
        ["downsample", "16", "12"],
    ),
    "downsample stride": (
        put(downsample=(conv(16, 6), norm(16))),
        ValueError,
        ["downsample", "[2, 16, 3, 2]", "[2, 16, 5, 4]"],
    ),
    "identity of another shape": (
        put(downsample=None),
        ValueError,
        ["[2, 16, 3, 2]", "[2, 6, 5, 4]"],
    ),
    "shortcut shape": (
        put(downsample=None, shortcut=torch.ones(2, 16, 5, 4)),
        ValueError,
        ["shortcut", "[2, 16, 3, 2]", "[2, 16, 5, 4]"],
    ),
    "shortcut dtype": (
        put(downsample=None, shortcut=torch.ones(2, 16, 3, 2).double()),
        TypeError,
        ["shortcut", "float32", "float64"],
    ),
    "shortcut not a tensor": (
        put(downsample=None, shortcut=3),
        TypeError,
        ["shortcut", "Tensor", "int"],
    ),
    "shortcut and downsample": (
        put(shortcut=torch.ones(2, 16, 3, 2)),
        ValueError,
        ["shortcut", "downsample"],
    ),
}


def buffers(arguments: Arguments) -> list[Tensor]:
    norms = [arguments[n] for n in ("bn1", "bn2", "bn3")]
    return [t for n in norms for t in (n.running_mean, n.running_var) if t is not None]


@pytest.mark.parametrize("case", CASES)
def test_bottleneck_message(case: str) -> None:
    apply, kind, words = CASES[case]
    arguments = good()
    apply(arguments)
    before = [t.clone() for t in buffers(arguments)]
    with pytest.raises(kind) as caught:
        bottleneck(**arguments)
    message = str(caught.value)
    assert all(word in message for word in words), message
    for was, tensor in zip(before, buffers(arguments), strict=True):
        assert tensor.is_meta or torch.equal(was, tensor)


def test_the_arguments_are_good() -> None:
    """What the cases change works unchanged."""
    assert bottleneck(**good()).shape == (2, 16, 3, 2)


UNIT_CASES: dict[str, Case] = {
    "x not a tensor": (put(x=None), TypeError, ["x", "Tensor", "NoneType"]),
    "x rank": (put(x=torch.randn(6, 5)), ValueError, ["x", "[6, 5]"]),
    "x channels": (put(x=torch.randn(2, 5, 5, 4)), ValueError, ["6", "5"]),
    "weight dtype": (
        change("conv", weight=torch.ones(4, 6, 3, 3).half()),
        TypeError,
        ["conv", "weight", "float32", "float16"],
    ),
    "bias shape": (change("conv", bias=torch.ones(3)), ValueError, ["bias", "[4]", "[3]"]),
    "kernel beyond the input": (change("conv", padding=0, dilation=5), ValueError, ["conv"]),
    "gamma shape": (change("bn", weight=torch.ones(3)), ValueError, ["bn", "weight", "[4]", "[3]"]),
    "no running statistics": (
        change("bn", running_mean=None, running_var=None, training=False),
        ValueError,
        ["bn", "running_mean"],
    ),
}


@pytest.mark.parametrize("case", UNIT_CASES)
def test_conv_bn_relu_message(case: str) -> None:
    apply, kind, words = UNIT_CASES[case]
    arguments = {"x": torch.randn(2, 6, 5, 4), "conv": conv(4, 6, 3, padding=1), "bn": norm(4)}
    assert conv_bn_relu(**arguments).shape == (2, 4, 5, 4)
    apply(arguments)
    with pytest.raises(kind) as caught:
        conv_bn_relu(**arguments)
    message = str(caught.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("size", [(1, 6, 1, 1), (1, 6, 2, 2)])
def test_one_value_per_channel(size: tuple[int, ...]) -> None:
    """nn's text; nothing is updated, not even what comes before."""
    arguments = good() | {"x": torch.randn(size)}
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        bottleneck(**arguments)
    for was, tensor in zip(buffers(good()), buffers(arguments), strict=True):
        assert torch.equal(was, tensor)
    fixed = {n: v._replace(training=False) for n, v in arguments.items() if n.startswith("bn")}
    downsample = (arguments["downsample"][0], arguments["downsample"][1]._replace(training=False))
    assert bottleneck(**arguments | fixed | {"downsample": downsample}).shape == (1, 16, 1, 1)
