"""fuse, unfuse and explain on blocks and small models of no library."""

import copy
import importlib
import pickle
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_float64, randomise, run
from model_helpers import load
from torch import Tensor, nn

import fused_bottleneck as fb
from fused_bottleneck import Bottleneck, FusedBottleneck, tracing
from fused_bottleneck.block import FusedBlock

ROOT = Path(__file__).resolve().parent.parent


class Pasted(nn.Module):
    """The block as users paste it into their project."""

    expansion = 4

    def __init__(
        self, channels: int, width: int, downsample: nn.Module | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        stride = 1 if downsample is None else 2
        self.conv1 = nn.Conv2d(channels, width, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.identity_downsample = downsample

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))

    def forward(self, x: Tensor) -> Tensor:
        identity = x.clone()
        x = self.branch(x)
        if self.identity_downsample is not None:
            identity = self.identity_downsample(identity)
        x += identity
        return self.relu(x)


class SumAndFunctions(Pasted):
    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)).relu()
        out = self.bn3(self.conv3(out))
        shortcut = x if self.identity_downsample is None else self.identity_downsample(x)
        return torch.relu(shortcut + out)


class OtherArgument(Pasted):
    def forward(self, features: Tensor) -> Tensor:  # its own name for x
        return self.relu(torch.add(self.branch(features), self.shortcut(features)))

    def shortcut(self, features: Tensor) -> Tensor:
        return features if self.identity_downsample is None else self.identity_downsample(features)


class Nested(nn.Module):
    """Everything in containers, and a shortcut of two children."""

    def __init__(self, channels: int, width: int, downsample: nn.Module | None = None) -> None:
        super().__init__()
        stride = 1 if downsample is None else 2
        self.branch = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU(True)),
            nn.Sequential(
                nn.Conv2d(width, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU(True)
            ),
            nn.Sequential(nn.Conv2d(width, 4 * width, 1), nn.BatchNorm2d(4 * width), nn.Identity()),
        )
        self.project = nn.Conv2d(channels, 4 * width, 1, stride)
        self.project_bn = nn.BatchNorm2d(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.project_bn(self.project(x)))


FUSIBLE: dict[str, type[nn.Module]] = {
    "reference": Bottleneck,
    "pasted": Pasted,
    "sum and functions": SumAndFunctions,
    "other argument": OtherArgument,
    "nested": Nested,
}


def downsample() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 16, 1, 2), nn.BatchNorm2d(16))


def block_of(
    kind: type[nn.Module], shortcut: nn.Module | None = None, **options: bool
) -> nn.Module:
    torch.manual_seed(0)
    if shortcut is not None and kind is Bottleneck:
        block: nn.Module = Bottleneck(6, 4, shortcut, 2, **options)
    else:
        block = kind(16 if shortcut is None else 6, 4, shortcut, **options)
    randomise(block)
    return block.double()


def input_of(block: nn.Module) -> Tensor:
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    return torch.randn(3, channels, 6, 5, dtype=torch.float64)


def assert_same(fused: nn.Module, plain: nn.Module) -> None:
    """Gradients of biases before batch statistics are zero, up to rounding in the plain block."""
    x = input_of(plain)
    biases = {n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)}
    zero = {f"{n}.bias" for n in biases if plain.training}
    noise = {n for n in zero if n.startswith(("identity_downsample", "project"))}
    assert_equal_float64(run(fused, x), run(plain, x), noise=zero | noise)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_downsample", [False, True])
@pytest.mark.parametrize("kind", FUSIBLE)
def test_fuse(kind: str, with_downsample: bool, training: bool) -> None:
    plain = block_of(FUSIBLE[kind], downsample() if with_downsample else None).train(training)
    fused = fb.fuse(copy.deepcopy(plain), strict=True)
    assert isinstance(fused, FusedBlock)
    assert isinstance(fused, type(plain))
    assert fused.why_not_fused(input_of(plain)) is None
    assert_same(fused, plain)


@pytest.mark.parametrize("bias", [True, False])
def test_fuse_with_and_without_bias(bias: bool) -> None:
    plain = block_of(Pasted, bias=bias)
    assert_same(fb.fuse(copy.deepcopy(plain), strict=True), plain)


def test_the_argument_keeps_its_name() -> None:
    plain = block_of(OtherArgument)
    fused = fb.fuse(copy.deepcopy(plain))
    x = input_of(plain)
    torch.testing.assert_close(fused(features=x), plain(features=x), rtol=1e-10, atol=1e-10)
    with pytest.raises(TypeError, match="argument"):
        fused(x=x)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Pasted, torch.bfloat16), (OtherArgument, torch.float32)]
)
def test_autocast_keeps_the_dtype_of_the_sum(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """A float32 input added in place is cast to bfloat16; out of place the sum is float32."""
    plain = block_of(kind).float()
    fused = fb.fuse(copy.deepcopy(plain), strict=True)
    x = input_of(plain).float()
    with torch.autocast("cpu", torch.bfloat16):
        want, got = plain(x), fused(x)
        assert (fused.why_not_fused(x) is None) == (dtype == torch.bfloat16)
    assert got.dtype == want.dtype == dtype


class Twice(Pasted):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + x) * 2


class NoLastReLU(Pasted):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x


class Scaled(Pasted):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(torch.add(self.branch(x), x, alpha=2))


class Swapped(Pasted):
    """The children's names say nothing: bn2 comes before conv2."""

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.conv2(self.relu(self.bn2(x)))
        return self.bn3(self.conv3(x))


class ConvolutionTwice(Pasted):
    """conv1 is applied to the block's input, and so is conv3 by the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return self.relu(self.branch(x) + self.bn3(self.conv3(out)))


class ReturnsTwo(Pasted):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = self.relu(self.branch(x) + x)
        return out, x


class DropsInTraining(Pasted):
    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        return self.relu(F.dropout(out, 0.1, self.training) + x)


class Skips(Pasted):
    """The formula in training only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu((self.branch(x) if self.training else self.bn3(x)) + x)


class DependsOnData(Pasted):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + x) if x.sum() > 0 else x


class AlsoCalls(Pasted):
    """A normalisation besides, whose statistics go on."""

    def forward(self, x: Tensor) -> Tensor:
        self.bn3(x)
        return self.relu(self.branch(x) + x)


class UsesAMiddle(Pasted):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out2 = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out2)) + torch.cat([out] * 4, 1))


class IntoItsShortcut(Pasted):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x.clone()
        shortcut += self.branch(x)
        return self.relu(shortcut)


DECLINED: dict[str, tuple[type[nn.Module], str]] = {
    "twice": (Twice, "not from a ReLU"),
    "no last ReLU": (NoLastReLU, "not from a ReLU"),
    "scaled": (Scaled, "weights"),
    "swapped": (Swapped, "comes from conv2 (Conv2d), not from a ReLU"),
    "a convolution twice": (ConvolutionTwice, "its shortcut is not one module"),
    "returns two": (ReturnsTwo, "one tensor"),
    "drops": (DropsInTraining, "dropout"),
    "skips": (Skips, ""),
    "depends on data": (DependsOnData, "torch.fx cannot trace"),
    "calls besides": (AlsoCalls, "besides"),
    "uses a middle": (UsesAMiddle, ""),
    "in place into the shortcut": (IntoItsShortcut, "in place"),
}


@pytest.mark.parametrize("kind", DECLINED)
def test_declined_by_its_graph(kind: str) -> None:
    """Names prove nothing; the block stays as it is, and the report says why."""
    cls, words = DECLINED[kind]
    block = block_of(cls)
    (row,) = fb.explain(block)
    assert not row.fused
    assert row.reason is not None
    assert words in row.reason, row.reason
    with pytest.warns(UserWarning, match="nothing to fuse"):
        assert fb.fuse(block) is block
    assert type(block) is cls
    with pytest.raises(ValueError, match="cannot fuse the whole model"):
        fb.fuse(block, strict=True)


def test_tracing_leaves_the_block_as_it_was() -> None:
    class Counts(Pasted):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.relu(self.branch(x) + x)

    block = block_of(Counts)
    before = dict(block.__dict__)
    assert isinstance(tracing.prove(block), fb.layout.Layout)
    assert block.__dict__ == before
    assert block.training


def change(path: str, make: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def apply(block: nn.Module) -> None:
        torch.manual_seed(3)
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, make().double())

    return apply


INSTANCES: dict[str, tuple[type[nn.Module], Callable[[nn.Module], object], str]] = {
    "group norm": (Bottleneck, change("bn2", lambda: nn.GroupNorm(2, 4)), "bn2"),
    "activation": (Bottleneck, change("relu", nn.SiLU), "relu"),
    "stride on conv1": (Bottleneck, lambda b: setattr(b.conv1, "stride", (2, 2)), "conv1"),
    "conv1 of 3x3": (Bottleneck, change("conv1", lambda: nn.Conv2d(16, 4, 3, padding=1)), "conv1"),
    "stride without downsample": (Bottleneck, lambda b: setattr(b.conv2, "stride", (2, 2)), "x"),
    "hook": (Bottleneck, lambda b: b.conv2.register_forward_hook(print), "conv2 has hooks"),
    "hook on a container": (
        Nested,
        lambda b: b.branch[1].register_forward_hook(print),
        "branch.1 has hooks",
    ),
    "forward on the instance": (Bottleneck, lambda b: setattr(b, "forward", torch.relu), "forward"),
    "one norm twice": (Pasted, lambda b: setattr(b, "bn2", b.bn1), "one module"),
    "dtypes": (Bottleneck, lambda b: b.conv3.float(), "conv3.weight"),
    "parametrization": (
        Bottleneck,
        lambda b: nn.utils.parametrizations.weight_norm(b.conv1),
        "conv1",
    ),
}


@pytest.mark.parametrize("case", INSTANCES)
def test_declined_by_its_instance(case: str) -> None:
    kind, apply, words = INSTANCES[case]
    block = block_of(kind)
    apply(block)
    (row,) = fb.explain(block)
    assert row.reason is not None
    assert words in row.reason, row.reason
    with pytest.raises(ValueError, match="cannot fuse"):
        fb.fuse(block, strict=True)
    assert type(block) is kind


class Flagged(Pasted):
    """With a switch, which its graph does not show."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.doubled = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2 if self.doubled else super().forward(x)


CHANGES_AFTERWARDS: dict[str, tuple[type[nn.Module], Callable[[nn.Module], object]]] = {
    "a shortcut where there was none": (
        Pasted,
        change("identity_downsample", lambda: nn.Conv2d(16, 16, 3, padding=1)),
    ),
    "one more child of a container": (
        Nested,
        lambda b: b.branch[1].append(nn.Tanh()),
    ),
    "a container replaced": (
        Nested,
        change("branch.0", lambda: Tanhs(16, 4)),
    ),
    "an empty place filled": (Nested, change("branch.2.2", nn.Tanh)),
    "norm replaced": (Pasted, change("bn2", lambda: nn.InstanceNorm2d(4))),
    "a flag set": (Flagged, lambda b: setattr(b, "doubled", True)),
}


class Tanhs(nn.Sequential):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


@pytest.mark.parametrize("case", CHANGES_AFTERWARDS)
def test_changes_after_fuse_run_composed(case: str) -> None:
    kind, apply = CHANGES_AFTERWARDS[case]
    plain = block_of(kind)
    fused = fb.fuse(copy.deepcopy(plain), strict=True)
    for block in (plain, fused):
        apply(block)
    x = input_of(plain)
    assert fused.why_not_fused(x) is not None
    assert fb.explain(fused)[0].fused
    assert fb.explain(fused)[0].reason is not None
    want, got = run(plain, x), run(fused, x)
    assert torch.equal(got.out, want.out)


# Whole models.


class Model(nn.Module):
    """Blocks in a ModuleList, one of them at two places, and one that is declined."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shared = Bottleneck(16, 4)
        self.blocks = nn.ModuleList([Pasted(16, 4), shared, shared, Twice(16, 4)])
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def test_model() -> None:
    """Identity, order and everything else of modules and parameters; results; the way back."""
    plain = Model().double()
    randomise(plain)
    fused = copy.deepcopy(plain)
    modules, parameters = list(fused.named_modules()), list(fused.named_parameters())
    kinds = [type(m) for m in fused.modules()]
    assert fb.fuse(fused) is fused
    assert fused.blocks[1] is fused.blocks[2]
    assert [isinstance(b, FusedBlock) for b in fused.blocks] == [True, True, True, False]
    for before, after in ((modules, fused.named_modules()), (parameters, fused.named_parameters())):
        for (name, a), (new_name, b) in zip(before, after, strict=True):
            assert name == new_name
            assert a is b
    assert [type(b) for b in fused.blocks][3] is Twice
    x = torch.randn(3, 16, 6, 5, dtype=torch.float64)
    zero = {f"blocks.{i}.conv{j}.bias" for i in range(4) for j in (1, 2, 3)}
    assert_equal_float64(run(fused, x), run(plain, x), noise=zero)
    assert fb.unfuse(fused) is fused
    assert [type(m) for m in fused.modules()] == kinds


def test_hooks_from_before_fuse_run() -> None:
    """On the block, as on any module; they are no reason to decline it."""
    block = block_of(Pasted)
    block.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    block.register_forward_hook(lambda m, args, out: out + 1)
    plain = copy.deepcopy(block)
    assert fb.fuse(block, strict=True).why_not_fused(input_of(block)) is None
    assert_same(block, plain)


@pytest.mark.slow
def test_no_library_is_imported() -> None:
    """Whoever has an instance of a library's class has imported the library."""
    code = """
import sys, fused_bottleneck as fb
fb.fuse(fb.Bottleneck(16, 4), stem=True, strict=True)
names = {"torchvision", "timm", "transformers", "monai", "detectron2", "mmdet", "mmpretrain"}
assert not names & {name.split(".")[0] for name in sys.modules}, names
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_explain_lists_each_block_once() -> None:
    model = Model()
    before = fb.explain(model)
    assert [(r.name, r.fused, r.reason is None) for r in before] == [
        ("blocks.0", False, True),
        ("blocks.1", False, True),
        ("blocks.3", False, False),
    ]
    after = fb.explain(fb.fuse(model))
    assert [r.fused for r in after] == [True, True, False]
    assert [r.kind for r in after] == [r.kind for r in before]
    text = str(after)
    assert "2 fused, 0 can be fused, 1 declined" in text
    assert "blocks.3" in text
    assert str(fb.explain(nn.Linear(2, 2))) == "no bottleneck blocks"


def test_fusing_twice_changes_nothing() -> None:
    model = fb.fuse(Model())
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in fb.fuse(model).modules()] == kinds
    assert [type(m) for m in fb.unfuse(fb.unfuse(model)).modules()] == [
        type(m) for m in Model().modules()
    ]


def test_one_class_for_all_instances() -> None:
    a, b = (fb.fuse(block_of(Pasted)) for _ in range(2))
    assert type(a) is type(b)
    assert type(fb.fuse(block_of(Bottleneck))) is FusedBottleneck
    assert type(fb.unfuse(FusedBottleneck(16, 4))) is Bottleneck


def test_stem_of_no_library() -> None:
    model = nn.Sequential(fb.ConvBNReLU(3, 16, 3), Bottleneck(16, 4))
    assert [type(m) for m in fb.fuse(model, stem=True)] == [fb.FusedConvBNReLU, FusedBottleneck]
    assert [row.fused for row in fb.explain(model)] == [True, True]
    assert [type(m) for m in fb.unfuse(model)] == [fb.ConvBNReLU, Bottleneck]


def test_derived_from_fused_bottleneck_stays() -> None:
    class Mine(FusedBottleneck):
        pass

    assert type(fb.unfuse(Mine(16, 4))) is Mine


def test_filter() -> None:
    model = Model()
    seen: list[tuple[str, type]] = []

    def first_only(name: str, module: nn.Module) -> bool:
        seen.append((name, type(module)))
        return name == "blocks.0"

    fb.fuse(model, filter_fn=first_only)
    assert seen == [("blocks.0", Pasted), ("blocks.1", Bottleneck)]
    assert [r.fused for r in fb.explain(model)] == [True, False, False]


def test_strict_touches_nothing_when_it_raises() -> None:
    model = Model()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"blocks\.3: its output comes from mul"):
        fb.fuse(model, strict=True)
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(), nn.Conv2d(2, 2, 1)])
def test_nothing_to_fuse(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match="no bottleneck blocks"):
        assert fb.fuse(model) is model
    with pytest.raises(ValueError, match="no bottleneck blocks"):
        fb.fuse(model, strict=True)
    assert fb.unfuse(model) is model


def test_not_a_module() -> None:
    for function in (fb.fuse, fb.unfuse, fb.explain):
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
            function([Bottleneck(16, 4)])  # type: ignore[operator]


def test_an_error_leaves_no_partial_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_bottleneck import convert

    model = Model()
    made = convert.fused_class

    def second_fails(plain: type, layout: object) -> type:
        return int if plain is Bottleneck else made(plain, layout)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "fused_class", second_fails)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(TypeError):
        fb.fuse(model)
    assert [type(m) for m in model.modules()] == kinds


def test_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_BOTTLENECK_DISABLE", "1")
    block = block_of(Pasted)
    assert type(fb.fuse(block, strict=True)) is Pasted
    assert fb.explain(block)[0].reason == "FUSED_BOTTLENECK_DISABLE is set"


def test_parts_on_two_devices_are_declined() -> None:
    block = block_of(Bottleneck)
    block.conv2.to("meta")
    assert "device" in str(fb.explain(block)[0].reason)


def test_meta_models() -> None:
    with torch.device("meta"):
        model = fb.fuse(Bottleneck(16, 4), strict=True)
    model.to_empty(device="cpu")
    assert model.why_not_fused(torch.zeros(2, 16, 4, 4)) is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol: int) -> None:
    fused = fb.fuse(block_of(Pasted))
    x = input_of(fused)
    other = pickle.loads(pickle.dumps(fused, protocol))
    assert type(other) is type(fused)
    assert_equal_float64(run(other, x), run(fused, x))


class BuiltFromArguments(Pasted):
    """A class with a pickling of its own."""

    def __reduce__(self) -> tuple:
        return BuiltFromArguments, (16, 4), self.__dict__


def test_pickling_of_its_own_is_kept() -> None:
    fused = fb.fuse(block_of(BuiltFromArguments))
    other = pickle.loads(pickle.dumps(fused))
    assert type(other) is type(fused)
    x = input_of(fused)
    assert_equal_float64(run(other, x), run(fused, x))


# The command.


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """As ``python -m fused_bottleneck.explain`` runs it."""
    monkeypatch.setattr(sys, "argv", ["explain", *arguments])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("fused_bottleneck.explain", run_name="__main__", alter_sys=True)
    if stopped.value.code:
        raise stopped.value


@pytest.mark.parametrize(
    "arguments",
    [("16", "4", "bias=False"), ("16", "out_channels=4"), ("in_channels=16", "out_channels=4")],
)
def test_command(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "fused_bottleneck.Bottleneck", *arguments)
    assert "0 fused, 1 can be fused, 0 declined" in capsys.readouterr().out


def test_command_on_a_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load("torchvision")
    command(monkeypatch, "torchvision.models.resnet50", "num_classes=2")
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == [
        "layer1.0",
        "torchvision.models.resnet.Bottleneck",
        *["can", "be", "fused"],
    ]
    assert table[-1] == "0 fused, 16 can be fused, 0 declined"
    command(monkeypatch, "--stem", "torchvision.models.resnet50")
    assert "0 fused, 17 can be fused, 0 declined" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere.at_all", "torch.nn.nothing", "torch.pi", "?"])
def test_command_says_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, name)
    assert name in str(stopped.value.code)
    assert "\n" not in str(stopped.value.code)


def test_importing_the_command_leaves_the_function() -> None:
    """Importing a submodule binds its name in the package."""
    function = fb.explain
    importlib.import_module("fused_bottleneck.explain")
    assert fb.explain is function
    assert len(fb.explain(Bottleneck(16, 4))) == 1


@pytest.mark.slow
def test_command_in_its_own_process() -> None:
    arguments = ["fused_bottleneck.Bottleneck", "16", "4"]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fused_bottleneck.explain", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "1 can be fused" in result.stdout
    assert not result.stderr
