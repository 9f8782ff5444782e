"""Random blocks: shapes, strides, layouts, groups, dilation, frozen norms, means, shortcuts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from conftest import use
from helpers import (
    Case,
    assert_criterion,
    assert_equal_float64,
    channels_last,
    errors,
    in_dtype,
    leaf,
    noise_gradients,
    norms_of,
    run,
    uses_batch_statistics,
    zero_gradients,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import float64_offset
from torch import Tensor

from fused_bottleneck import extension

LAYOUTS = ["contiguous", "channels_last", "strided"]


@dataclass(frozen=True)
class Example:
    """A case and how it runs."""

    case: Case
    frozen: frozenset[str]
    without_grad: frozenset[str]
    layout: str
    offset: float
    way: str
    seed: int


@st.composite
def examples(draw: st.DrawFn) -> Example:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    width = groups * draw(st.integers(1, 4))
    expansion = draw(st.sampled_from([1, 2, 4, 4]))
    downsample = draw(st.sampled_from(["identity", "conv", "conv", "pool", "module"]))
    stride = draw(st.integers(1, 3)) if downsample in ("conv", "pool") else 1
    wide = width * expansion
    channels = draw(st.integers(1, 9)) if downsample in ("conv", "pool") else wide
    least = 2 * stride if downsample == "pool" else 1
    size = (
        draw(st.integers(1, 4)),
        draw(st.integers(least, 9)),
        draw(st.integers(least, 9)),
    )
    options = {
        "groups": groups,
        "dilation": draw(st.sampled_from([1, 1, 2])),
        "expansion": expansion,
    }
    names = ["bn1", "bn2", "bn3", "identity_downsample.1", "identity_downsample.2"]
    parameters = ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "identity_downsample"]
    return Example(
        Case(channels, width, stride, downsample, draw(st.booleans()), size, options),
        draw(st.frozensets(st.sampled_from(names))),
        draw(st.frozensets(st.sampled_from(parameters), max_size=3)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from([0.0, 0.0, -3.0, 100.0])),
        draw(st.sampled_from(["gram", "product", "torch"])),
        draw(st.integers(0, 2**16)),
    )


def arranged(x: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return torch.stack([x, -x], -1)[..., 0]
    return channels_last(x) if layout == "channels_last" else x


@contextmanager
def computed(way: str) -> Iterator[None]:
    """One of the ways of conftest.py, within a test."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(way if extension.load() else "torch", monkeypatch)
        yield


def blocks(example: Example) -> list[torch.nn.Module]:
    pair = example.case.pair(example.seed)
    for block in pair:
        for name in example.frozen & set(norms_of(block)):
            block.get_submodule(name).eval()
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(example.without_grad)))
    return list(pair)


def output_pixels(example: Example) -> int:
    n, h, w = example.case.size
    stride = example.case.stride
    return n * (-(-h // stride)) * (-(-w // stride))


def bounded(count: int) -> settings:
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def check_float64(example: Example) -> None:
    reference, fused = blocks(example)
    x = arranged(example.case.input(example.seed) + example.offset, example.layout)
    values = output_pixels(example)
    batch = any(uses_batch_statistics(norm) for norm in norms_of(fused).values())
    if values == 1 and batch:
        return  # nn refuses one value per channel: test_module has it
    assert fused.why_not_fused(x) is None
    # Among few values a deviation may be a tenth of what it should, by chance; it enters squared.
    tolerance = float64_offset(abs(example.offset)) * (100 if values < 40 else 1)
    with computed(example.way):
        assert_equal_float64(
            run(fused, x),
            run(reference, x),
            zero_gradients(fused),
            noise_gradients(fused),
            tolerance,
        )


@given(examples())
@bounded(60)
def test_float64(example: Example) -> None:
    check_float64(example)


@pytest.mark.slow
@given(examples())
@bounded(600)
def test_float64_many(example: Example) -> None:
    check_float64(example)


@pytest.mark.slow
@given(examples(), st.sampled_from([torch.float32, torch.bfloat16]))
@bounded(60)
def test_lower_precision(example: Example, dtype: torch.dtype) -> None:
    """The output by the criterion, over seeds; its own rounding does not flip."""
    if output_pixels(example) < 8:
        return  # with so few values a variance may vanish by chance
    fused_errors, eager_errors = [], []
    for seed in range(6):
        case = example.case
        shifted = Example(**{**vars(example), "seed": example.seed + seed})
        pair = [channels_last(in_dtype(b, dtype)) for b in blocks(shifted)]
        for block in pair:
            for norm in norms_of(block).values():
                norm.float()
        x = arranged((case.input(shifted.seed) + example.offset).to(dtype), "channels_last")
        with torch.no_grad(), computed(example.way):
            assert pair[1].why_not_fused(x) is None
            want = run(in_dtype(pair[0], torch.float64), x.double())
            for block, rows in zip(pair, (eager_errors, fused_errors), strict=True):
                rows.append({"out": errors(run(block, x), want)["out"]})
    assert_criterion(fused_errors, eager_errors, dtype)


@given(st.data())
@bounded(40)
def test_any_strides_of_x_and_grad_out(data: st.DataObject) -> None:
    """Permuted, sliced and expanded memory on both sides gives the gradients of dense memory."""
    case = Case(channels=8, width=2, size=(2, 3, 4))
    fused = case.module(type(case.pair()[1]))

    def scattered(t: Tensor) -> Tensor:
        order = data.draw(st.permutations(range(4)))
        inverse = [order.index(i) for i in range(4)]
        t = t.permute(order).contiguous().permute(inverse)
        if data.draw(st.booleans()):
            t = t.repeat(1, 1, 1, 2)[..., : t.shape[3]]
        expand = data.draw(st.sampled_from([None, 0, 1, 2, 3]))
        return t if expand is None else t.narrow(expand, 0, 1).expand_as(t)

    x = scattered(case.input())
    grad = scattered(torch.randn(2, 8, 3, 4, dtype=torch.float64))
    dense = [t.clone(memory_format=torch.contiguous_format) for t in (x, grad)]
    with computed(data.draw(st.sampled_from(["gram", "product", "torch"]))):
        want = run(fused, *dense)
        fused.load_state_dict(case.module(type(fused)).state_dict())
        leaf_x = leaf(x) if data.draw(st.booleans()) else x.detach().requires_grad_()
        out = fused(leaf_x)
        torch.testing.assert_close(out, want.out, rtol=1e-10, atol=1e-10)
        (grad_x,) = torch.autograd.grad(out, leaf_x, grad)
    torch.testing.assert_close(grad_x, want.grads["x"], rtol=1e-9, atol=1e-9)
