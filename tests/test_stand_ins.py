"""fuse on blocks of detectron2, OpenMMLab and CLIP, as tests/stand_ins.py builds them."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CRITERION_SEEDS,
    assert_criterion,
    assert_equal_float64,
    channels_last,
    errors,
    in_dtype,
    randomise,
    run,
)
from stand_ins import (
    CLIPBlock,
    Detectron2Block,
    FrozenNorm,
    MMDetBlock,
    MMPretrainBlock,
    OpenMMLabResNet,
    importable,
)
from torch import Tensor, nn

import fused_bottleneck as fb
from fused_bottleneck import adapters
from fused_bottleneck.modules import class_path


def block_of(kind: type[nn.Module], *args: int, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    block = kind(*args, **options)
    randomise(block)
    return block.double()


def input_of(channels: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, channels, 6, 5, dtype=torch.float64, generator=generator)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


FUSIBLE: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "detectron2": (Detectron2Block, (16, 4), {"padding": 1}),
    "detectron2, shortcut": (Detectron2Block, (6, 4, 2), {"padding": 1}),
    "detectron2, dilated": (Detectron2Block, (16, 4), {"padding": 2, "dilation": 2}),
    "detectron2, groups": (Detectron2Block, (6, 4, 2), {"padding": 1, "groups": 2}),
    "detectron2, FrozenBN": (Detectron2Block, (6, 4, 2), {"padding": 1, "norm": FrozenNorm}),
    "mmpretrain": (MMPretrainBlock, (16, 4), {}),
    "mmpretrain, downsample": (MMPretrainBlock, (6, 4, 2), {}),
    "mmdet": (MMDetBlock, (6, 4, 2), {}),
    "CLIP": (CLIPBlock, (16, 4), {}),
    "CLIP, downsample": (CLIPBlock, (6, 4), {}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", FUSIBLE)
def test_fused(case: str, training: bool) -> None:
    kind, args, options = FUSIBLE[case]
    plain = block_of(kind, *args, **options).train(training)
    fused = fb.fuse(copy.deepcopy(plain), strict=True)
    x = input_of(args[0])
    assert fused.why_not_fused(x) is None
    assert_equal_float64(run(fused, x), run(plain, x))


@pytest.mark.parametrize("kind", [Detectron2Block, MMDetBlock, MMPretrainBlock])
def test_known_by_name(kind: type[nn.Module]) -> None:
    """What switches something on afterwards is seen only where the class is known."""
    assert class_path(kind) in adapters.KNOWN


def test_detectron2_shortcut_is_fused() -> None:
    block = block_of(Detectron2Block, 6, 4, 2, padding=1)
    parts = adapters.layout.read(block, adapters.KNOWN[class_path(Detectron2Block)])
    assert parts.pairs[3] == (block.shortcut, block.shortcut.norm)
    assert parts.called is None


DECLINED: dict[str, tuple[type[nn.Module], tuple[int, ...], dict[str, Any], str]] = {
    "detectron2, stride in 1x1": (
        Detectron2Block,
        (6, 4, 2),
        {"padding": 1, "stride_in_1x1": True},
        "conv1 must be 1x1",
    ),
    "detectron2, GN": (
        Detectron2Block,
        (16, 4),
        {"padding": 1, "norm": group_norm},
        "conv1.norm is a GroupNorm",
    ),
    "OpenMMLab, caffe style": (
        MMPretrainBlock,
        (6, 4, 2),
        {"stride_in_1x1": True},
        "conv1 must be 1x1",
    ),
    "OpenMMLab, GN": (MMDetBlock, (16, 4), {"norm": group_norm}, "norm1 is a GroupNorm"),
    "CLIP, strided": (CLIPBlock, (6, 4, 2), {}, "comes from avgpool (AvgPool2d), not from a ReLU"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_declined(case: str) -> None:
    kind, args, options, words = DECLINED[case]
    block = block_of(kind, *args, **options)
    (row,) = fb.explain(block)
    assert words in str(row.reason)
    with pytest.raises(ValueError, match="cannot fuse"):
        fb.fuse(block, strict=True)
    assert type(block) is kind


def plug(block: nn.Module) -> None:
    block.context = nn.Hardtanh()
    block.after_conv3_plugin_names.append("context")


SWITCHES: dict[str, tuple[type[nn.Module], Callable[[nn.Module], object], str]] = {
    "checkpointing": (MMDetBlock, lambda b: setattr(b, "with_cp", True), "with_cp is set"),
    "plugins": (MMDetBlock, plug, "after_conv3_plugin_names is set"),
    "stochastic depth": (
        MMPretrainBlock,
        lambda b: setattr(b, "drop_path", nn.Hardtanh()),
        "drop_path is not empty",
    ),
    "activation": (
        Detectron2Block,
        lambda b: setattr(b.conv3, "activation", torch.sin),
        "conv3.activation is set",
    ),
    "hook on a norm": (
        Detectron2Block,
        lambda b: b.conv2.norm.register_forward_hook(lambda m, a, out: out / 2),
        "conv2.norm has hooks",
    ),
    "hook on a convolution": (
        Detectron2Block,
        lambda b: b.conv2.register_forward_hook(lambda m, a, out: out / 2),
        "conv2 has hooks",
    ),
    "no norm": (Detectron2Block, lambda b: setattr(b.conv2, "norm", None), "conv2.norm"),
}


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("case", SWITCHES)
def test_switched_on(case: str, after: bool) -> None:
    """Before fuse: declined. After it: composed."""
    kind, switch, words = SWITCHES[case]
    plain = block_of(kind, 16, 4, **({"padding": 1} if kind is Detectron2Block else {}))
    block = copy.deepcopy(plain)
    if after:
        fb.fuse(block, strict=True)
    for each in (plain, block):
        switch(each)
    (row,) = fb.explain(block)
    assert words in str(row.reason)
    assert row.fused == after
    want, got = run(plain, input_of(16)), run(block, input_of(16))
    assert torch.equal(got.out, want.out)
    assert all(torch.equal(got.buffers[name], value) for name, value in want.buffers.items())


class Given(nn.Module):
    """A shortcut known only when it is called, that is broadcast."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linspace(-1, 1, 16, dtype=x.dtype).view(1, 16, 1, 1)


@pytest.mark.parametrize("shortcut", [Given(), nn.Conv2d(16, 16, 3, padding=1)])
def test_detectron2_with_a_shortcut_that_is_called(shortcut: nn.Module) -> None:
    """Where its result does not fit, the children are called, each normalisation once."""
    plain = block_of(Detectron2Block, 16, 4, padding=1)
    plain.shortcut = shortcut.double()
    fused = fb.fuse(copy.deepcopy(plain), strict=True)
    assert_equal_float64(run(fused, input_of(16)), run(plain, input_of(16)))


def test_detectron2_shortcut_with_an_activation_is_called() -> None:
    plain = block_of(Detectron2Block, 6, 4, 2, padding=1)
    plain.shortcut.activation = torch.sin
    fused = fb.fuse(copy.deepcopy(plain), strict=True)
    assert fused.why_not_fused(input_of(6)) is None
    assert_equal_float64(run(fused, input_of(6)), run(plain, input_of(6)))


@pytest.mark.parametrize("stride", [1, 2])
def test_detectron2_frozen_norms_keep_bfloat16(stride: int) -> None:
    """Other than torchvision's they promote nothing under autocast, and so the block is fused."""
    channels = 16 if stride == 1 else 6
    fused_errors, eager_errors = [], []
    for seed in CRITERION_SEEDS[torch.bfloat16]:
        options = {"padding": 1, "norm": FrozenNorm, "seed": seed}
        block = channels_last(block_of(Detectron2Block, channels, 4, stride, **options).float())
        x = channels_last(input_of(channels, seed).float())
        exact = run(in_dtype(block, torch.float64), x.double())
        fused = fb.fuse(copy.deepcopy(block), strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert fused.why_not_fused(x) is None
            results = [run(each, x) for each in (block, fused)]
        assert results[1].out.dtype == results[0].out.dtype == torch.bfloat16
        for result, rows in zip(results, (eager_errors, fused_errors), strict=True):
            rows.append(errors(result, exact))
    assert_criterion(fused_errors, eager_errors, torch.bfloat16)


@pytest.mark.parametrize("deep", [True, False])
def test_stem_of_openmmlab(deep: bool) -> None:
    plain = block_of(OpenMMLabResNet, deep)
    fused = fb.fuse(copy.deepcopy(plain), stem=True, strict=True)
    assert [row.name for row in fb.explain(fused)] == ["stem" if deep else ""]
    biases = {"stem.0.bias" if deep else "conv1.bias"}
    assert_equal_float64(run(fused, input_of(3)), run(plain, input_of(3)), noise=biases)


@pytest.mark.parametrize("kind", [Detectron2Block, MMPretrainBlock])
def test_pickle(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    importable(monkeypatch)
    options = {"padding": 1} if kind is Detectron2Block else {}
    fused = fb.fuse(block_of(kind, 6, 4, 2, **options), strict=True)
    other = pickle.loads(pickle.dumps(fused))
    assert type(other) is type(fused)
    assert_equal_float64(run(other, input_of(6)), run(fused, input_of(6)))
    assert type(fb.unfuse(other)) is kind
