"""The block as one C++ op each way (cpu_block.py) against the same programs stage by stage.

The same ops in the same order: every bit is to be the same.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from helpers import Case, leaf
from tolerances import SAME_FORMULA
from torch import Tensor, nn

from fused_bottleneck import FusedBottleneck, cpu_block, extension, rules, tail_plan
from fused_bottleneck.cpu_block import CpuBlockStages

pytestmark = pytest.mark.skipif(
    not extension.has_products(), reason=extension.reason() or "no products for this CPU"
)
ops = torch.ops.fused_bottleneck

# Channels in multiples of 16; other sizes are those of all tests of blocks.
CASES = {
    "identity": Case(64, 16, size=(4, 12, 11)),
    "7x7": Case(128, 32, size=(11, 7, 7)),
    "conv": Case(48, 16, downsample="conv", size=(4, 12, 11)),
    "conv, stride 2": Case(32, 32, 2, "conv", size=(5, 23, 24)),
    "wide": Case(256, 64, size=(3, 14, 14)),
    "module": Case(64, 16, downsample="module", size=(4, 12, 11)),
    "no bias": Case(48, 16, 2, "conv", bias=False, size=(5, 23, 24)),
}
over_cases = pytest.mark.parametrize("case", CASES)
WAYS = {"rule": None, "gram": True, "product": False}
over_ways = pytest.mark.parametrize("way", WAYS)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Step(NamedTuple):
    """What a training step leaves, by name, and how many programs ran as a whole."""

    tensors: dict[str, Tensor]
    whole: list[str]


def forced(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail's way, whatever the rule says."""
    if WAYS[way] is not None:
        monkeypatch.setattr(tail_plan, "uses_gram", lambda *sizes: WAYS[way])
    cpu_block.block_of.cache_clear()


def step(
    block: FusedBottleneck, x: Tensor, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> Step:
    whole: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("whole_forward", "whole_backward"):
            method = getattr(CpuBlockStages, name)

            def noted(stages: object, *arguments: object, call=method, name=name) -> object:  # type: ignore[no-untyped-def]
                result = call(stages, *arguments)
                whole.extend([name] if result is not None else [])
                return result

            patch.setattr(CpuBlockStages, name, noted)
        source = leaf(x.to(memory_format=layout)) if x.requires_grad else x
        out = block(source)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).contiguous())
    tensors = {"out": out.detach(), "grad x": source.grad}
    tensors |= {f"grad {name}": p.grad for name, p in block.named_parameters()}
    tensors |= dict(block.named_buffers())
    return Step({name: t for name, t in tensors.items() if t is not None}, whole)


def in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program stage by stage."""
    for name in ("whole_forward", "whole_backward"):
        monkeypatch.setattr(CpuBlockStages, name, lambda *arguments: None)


def block_of(case: str) -> FusedBottleneck:
    block = CASES[case].module(FusedBottleneck).float()
    assert isinstance(block, FusedBottleneck)
    return block


def assert_same_bits(whole: Step, lines: Step) -> None:
    assert whole.whole == ["whole_forward", "whole_backward"]
    assert lines.whole == []
    assert whole.tensors.keys() == lines.tensors.keys()
    for name, t in lines.tensors.items():
        assert whole.tensors[name].stride() == t.stride(), name
        torch.testing.assert_close(whole.tensors[name], t, rtol=0, atol=0, msg=name)


def compare(
    case: str, layout: str, monkeypatch: pytest.MonkeyPatch, *, needs_x: bool = True
) -> None:
    x = CASES[case].input().float().requires_grad_(needs_x)
    one, other = block_of(case), block_of(case)
    whole = step(one, x, LAYOUTS[layout], monkeypatch)
    in_lines(monkeypatch)
    assert_same_bits(whole, step(other, x, LAYOUTS[layout], monkeypatch))


@over_ways
@over_cases
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_as_stage_by_stage(
    case: str, way: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(way, monkeypatch)
    compare(case, layout, monkeypatch)


@over_cases
def test_same_bits_on_two_threads(
    case: str, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(case, "channels_last", monkeypatch)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("way", ["gram", "product"])
def test_one_way_for_each_tail_unit(first: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other for the other, whichever comes first in the output's sum."""
    width = CASES["conv"].width

    def uses_gram(device: str, dtype: torch.dtype, pixels: int, k: int, *rest: object) -> bool:
        return ((k == width) == first) == (way == "gram")

    monkeypatch.setattr(tail_plan, "uses_gram", uses_gram)
    cpu_block.block_of.cache_clear()
    for layout in LAYOUTS:
        with monkeypatch.context() as patch:
            compare("conv", layout, patch)


@pytest.mark.parametrize("percent", [0, 30, 1000])
@pytest.mark.parametrize("case", ["identity", "conv, stride 2"])
def test_kept_images(case: str, percent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, some and all images of an output."""
    monkeypatch.setattr(rules, "_MOST_KEPT_PERCENT", percent)
    forced("product", monkeypatch)
    compare(case, "channels_last", monkeypatch)


@over_ways
@pytest.mark.parametrize("case", ["identity", "conv, stride 2"])
def test_frozen_parameters_and_input(case: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(way, monkeypatch)
    original = block_of

    def frozen(name: str) -> FusedBottleneck:
        block = original(name)
        for parameter in (block.conv1.weight, block.conv2.weight, block.conv3.weight):
            parameter.requires_grad_(False)
        return block

    monkeypatch.setitem(globals(), "block_of", frozen)
    compare(case, "channels_last", monkeypatch, needs_x=False)


@pytest.mark.parametrize("case", ["identity", "conv, stride 2"])
def test_without_affine(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = block_of

    def plain(name: str) -> FusedBottleneck:
        block = original(name)
        for norm in [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.weight = norm.bias = None
        return block

    monkeypatch.setitem(globals(), "block_of", plain)
    for way in WAYS:
        with monkeypatch.context() as patch:
            forced(way, patch)
            compare(case, "contiguous", patch)


def correlated(block: FusedBottleneck) -> FusedBottleneck:
    """conv3 sees what is left of nearly equal channels without their mean."""
    with torch.no_grad():
        filters = block.conv2.weight
        filters.copy_(filters[:1] + 1e-2 * filters)
        block.bn2.weight.fill_(1)
        block.bn2.bias.fill_(3)
        block.conv3.weight.mul_(30).sub_(block.conv3.weight.mean(1, keepdim=True))
    return block


def test_covariance_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the terms of a variance cancel; it is summed in another order here and there."""
    forced("gram", monkeypatch)
    cancellations: list[float] = []

    def needs_double(cancellation: float) -> bool:
        cancellations.append(cancellation)
        return cancellation > rules.MOST_CANCELLATION

    monkeypatch.setattr("fused_bottleneck.cpu_products.needs_double", needs_double)
    x = CASES["identity"].input().float()
    whole = step(correlated(block_of("identity")), x, torch.channels_last, monkeypatch)
    assert whole.whole == ["whole_forward", "whole_backward"]
    in_lines(monkeypatch)
    lines = step(correlated(block_of("identity")), x, torch.channels_last, monkeypatch)
    assert cancellations[0] > rules.MOST_CANCELLATION
    for name, t in lines.tensors.items():
        difference = (whole.tensors[name] - t).double().norm()
        assert difference <= SAME_FORMULA[torch.float32] * t.double().norm(), name


def test_what_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs stage by stage: fixed statistics, few pixels, other convolutions, other channels, other
    dtypes and weights that are not dense."""

    def served(block: nn.Module, x: Tensor) -> bool:
        assert isinstance(block, FusedBottleneck)
        return bool(step(block, x, torch.channels_last, monkeypatch).whole)

    case = CASES["identity"]
    x = case.input().float()
    assert served(block_of("identity"), x)
    fixed = block_of("identity")
    fixed.bn2.eval()
    assert not served(fixed, x)
    assert served(block_of("identity"), x[:1])
    many = Case(576, 144, size=(1, 12, 11))
    assert not served(many.module(FusedBottleneck).float(), many.input().float())
    assert not served(Case(64, 16, options={"groups": 2}).module(FusedBottleneck).float(), x)
    assert not served(Case(64, 16, options={"dilation": 2}).module(FusedBottleneck).float(), x)
    assert not served(Case(32, 8).module(FusedBottleneck).float(), x[:, :32])
    assert not served(case.module(FusedBottleneck), x.double())
    strided = block_of("identity")
    strided.conv1.weight = nn.Parameter(strided.conv1.weight.detach().repeat(1, 2, 1, 1)[:, ::2])
    assert not served(strided, x)


def test_weight_gradients_take_the_memory_of_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not of those that someone holds: those keep their values."""
    case = Case(1024, 256, size=(1, 14, 14))  # each weight has a mebibyte at least
    block = case.module(FusedBottleneck).float().to(memory_format=torch.channels_last)
    x = case.input().float()
    weights = [p for p in block.parameters() if p.dim() == 4]

    def grads() -> list[Tensor]:
        block.zero_grad(set_to_none=True)
        assert step(block, x, torch.channels_last, monkeypatch).whole  # type: ignore[arg-type]
        return [w.grad for w in weights if w.grad is not None]

    places = {g.data_ptr() for g in grads()}
    held = grads()
    assert {g.data_ptr() for g in held} == places
    values = [g.clone() for g in held]
    assert places.isdisjoint(g.data_ptr() for g in grads())
    for now, then in zip(held, values, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


@pytest.mark.parametrize("change", [lambda t: t[:1], lambda t: t.double(), lambda t: t.mT])
def test_memory_that_is_no_gradients_is_an_error(
    change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    result_empty = cpu_block.result_empty

    def changed(shape: Sequence[int], *arguments: object) -> Tensor:
        result = result_empty(shape, *arguments)  # type: ignore[arg-type]
        return change(result) if shape[2:] == (3, 3) else result

    block, x = block_of("identity"), CASES["identity"].input().float()
    out = block(x)
    monkeypatch.setattr(cpu_block, "result_empty", changed)
    with pytest.raises(RuntimeError, match="block_backward_: expected weight_grads to be float32"):
        out.sum().backward()


def test_scratch_that_is_too_small_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = block_of("identity"), CASES["identity"].input().float()
    out = block(x)
    lend = CpuBlockStages._lend
    monkeypatch.setattr(CpuBlockStages, "_lend", lambda *arguments: lend(*arguments)[:4096])
    with pytest.raises(RuntimeError, match=r"block_forward_: expected scratch to have \d+ bytes"):
        block(x)
    with pytest.raises(RuntimeError, match=r"block_backward_: expected scratch to have \d+ bytes"):
        out.sum().backward()


def test_sizes_that_are_no_block_are_an_error() -> None:
    sizes, images = [4, 64, 12, 11, 16, 64, 12, 11, 1, 0], [-1]
    assert ops.block_scratch(sizes, images, 0, False) > 0
    with pytest.raises(RuntimeError, match="expected 10 sizes"):
        ops.block_scratch(sizes[:-1], images, 0, False)
    with pytest.raises(RuntimeError, match="images of each tail unit"):
        ops.block_scratch(sizes, images * 2, 0, False)


@pytest.mark.parametrize("name", ["x", "y1", "y2", "out"])
def test_images_of_other_sizes_are_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes decide where everything is read and written."""
    found = cpu_block.block_of

    place, more = {"x": (1, 16), "y1": (4, 16), "y2": (6, 1), "out": (5, 16)}[name]

    def block_of_other_sizes(*shapes: object) -> object:
        block = found(*shapes)
        assert block is not None
        sizes = list(block.sizes)
        sizes[place] += more
        return block._replace(sizes=sizes)

    monkeypatch.setattr(cpu_block, "block_of", block_of_other_sizes)
    with pytest.raises(RuntimeError, match=f"block_forward_: expected {name} to be float32"):
        block_of("identity")(CASES["identity"].input().float())


def test_default_dtype_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail's way goes by the block's dtype."""
    torch.set_default_dtype(torch.float64)
    compare("identity", "channels_last", monkeypatch)
