"""``fuse(stem=True)``: conv+BN+ReLU in an nn.Sequential, and where a ResNet starts with them."""

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_equal_float64, randomise, run
from model_helpers import load
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fused_bottleneck as fb
from fused_bottleneck import Bottleneck, functional, rules
from fused_bottleneck.chain import FusedChain


def unit(channels: int, width: int, **options: Any) -> list[nn.Module]:
    options = {"kernel_size": 3, "padding": 1, "bias": False} | options
    return [nn.Conv2d(channels, width, **options), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


class Named(nn.Sequential):
    """A class of its own that runs as nn.Sequential, like torchvision's Conv2dNormActivation."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(*unit(channels, width))
        self.out_channels = width


def in_doubles(chain: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in chain.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    randomise(chain)
    return chain.double()


CHAINS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "one": (lambda: nn.Sequential(*unit(4, 6)), 1),
    "deep stem": (
        lambda: nn.Sequential(
            *unit(4, 5, stride=2), *unit(5, 6), nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7)
        ),
        2,
    ),
    "head": (lambda: nn.Sequential(*unit(4, 6), nn.Dropout(0.5), nn.Conv2d(6, 2, 1)), 1),
    "in the middle": (
        lambda: nn.Sequential(nn.MaxPool2d(2), *unit(4, 6), nn.Tanh(), nn.AvgPool2d(2)),
        1,
    ),
    "pooled between": (lambda: nn.Sequential(*unit(4, 6), nn.MaxPool2d(2), *unit(6, 8)), 2),
    "names": (lambda: nn.Sequential(OrderedDict(zip("abc", unit(4, 6), strict=True))), 1),
    "a class of its own": (lambda: Named(4, 6), 1),
    "only some pay": (
        lambda: nn.Sequential(
            *unit(4, 8, kernel_size=1, padding=0), *unit(8, 8, groups=2), *unit(8, 6)
        ),
        1,
    ),
    "other activations": (
        lambda: nn.Sequential(*unit(4, 6)[:2], nn.SiLU(), *unit(6, 6)[:2], nn.ReLU6(), *unit(6, 4)),
        1,
    ),
}
over_chains = pytest.mark.parametrize("case", CHAINS)


def chain_of(case: str = "pooled between") -> nn.Module:
    return in_doubles(CHAINS[case][0]())


def pair(case: str = "pooled between") -> tuple[nn.Module, nn.Module]:
    plain = chain_of(case)
    return plain, fb.fuse(copy.deepcopy(plain), stem=True, strict=True)


def input_of(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 9, 8, dtype=torch.float64, generator=generator)


@pytest.fixture
def fused_units(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of all units that ran fused."""
    seen: list[Tensor] = []
    run_unit = functional.run_conv_bn_relu

    def counted(x: Tensor, *arguments: Any) -> Tensor:
        seen.append(x)
        return run_unit(x, *arguments)

    monkeypatch.setattr(functional, "run_conv_bn_relu", counted)
    return seen


def seeded(module: nn.Module, x: Tensor) -> Any:
    torch.manual_seed(5)
    return run(module, x)


@pytest.mark.parametrize("training", [True, False])
@over_chains
def test_equals_the_plain_chain(case: str, training: bool, fused_units: list[Tensor]) -> None:
    plain, fused = (module.train(training) for module in pair(case))
    assert isinstance(fused, FusedChain)
    assert isinstance(fused, type(plain))
    x = input_of()
    assert fused.why_not_fused(x) is None
    assert_equal_float64(seeded(fused, x), seeded(plain, x))
    assert len(fused_units) == CHAINS[case][1]


def test_which_units_pay() -> None:
    assert rules.unit_pays((3, 3), 1)
    assert rules.unit_pays((1, 5), 1)
    assert not rules.unit_pays((1, 1), 1)
    assert not rules.unit_pays((3, 3), 2)


def test_only_on_request() -> None:
    model = nn.Sequential(nn.Sequential(*unit(4, 16)), Bottleneck(16, 4))
    fb.fuse(model)
    assert type(model[0]) is nn.Sequential
    assert [row.name for row in fb.explain(model)] == ["1"]
    rows = fb.explain(model, stem=True)
    assert [(row.name, row.fused, row.reason) for row in rows] == [
        ("0", False, None),
        ("1", True, None),
    ]
    fb.fuse(model, stem=True)
    assert [row.fused for row in fb.explain(model)] == [True, True]


def test_chains_inside_blocks_are_the_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(
                *unit(16, 4, kernel_size=1, padding=0), *unit(4, 4), *unit(4, 16, kernel_size=1)[:2]
            )
            self.branch[6].padding = (0, 0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.branch(x) + x)

    block = fb.fuse(Block(), stem=True, strict=True)
    assert type(block.branch) is nn.Sequential
    assert [row.name for row in fb.explain(block, stem=True)] == [""]


# It stays the Sequential that it was.


def test_a_sequential_in_every_respect() -> None:
    plain, fused = pair()
    x = input_of()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert len(fused) == len(plain)
    assert [type(m) for m in fused] == [type(m) for m in plain]
    assert fused[0] is next(iter(fused))
    assert type(fused[-1]) is nn.ReLU
    for cut in (slice(0, 3), slice(None, 5)):
        assert_equal_float64(run(fused[cut], x), run(plain[cut], x))
    assert [type(m) for m in fused[1:]] == [type(m) for m in plain[1:]]
    for chain in (plain, fused):
        torch.manual_seed(2)
        for module in in_doubles(nn.Sequential(*unit(8, 5))):
            chain.append(module)
        chain.insert(0, nn.Tanh())
        del chain[4]
        chain[0] = nn.Softsign()
    assert_equal_float64(run(fused, x), run(plain, x))
    more = nn.Sequential(nn.Tanh())
    assert_equal_float64(run(fused + more, x), run(plain + more, x))


def in_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("case", ["deep stem", "a class of its own"])
@pytest.mark.parametrize(
    "method", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), in_a_file]
)
def test_copies(method: Callable[[nn.Module], nn.Module], case: str) -> None:
    plain, fused = pair(case)
    other = method(fused)
    assert type(other) is type(fused)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in fused.parameters()}
    assert_equal_float64(run(other, input_of()), run(plain, input_of()))
    assert [type(m) for m in fb.unfuse(other).modules()] == [type(m) for m in plain.modules()]


def test_fusing_twice_changes_nothing() -> None:
    plain, fused = pair()
    kinds = [type(m) for m in fused.modules()]
    assert [type(m) for m in fb.fuse(fused, stem=True, strict=True).modules()] == kinds
    assert type(fb.unfuse(fused)) is type(plain)


def test_hooks_on_the_chain_itself() -> None:
    plain, fused = pair()
    for chain in (plain, fused):
        chain.register_forward_hook(lambda m, args, out: 2 * out)
    assert fused.why_not_fused(input_of()) is None
    assert_equal_float64(run(fused, input_of()), run(plain, input_of()))


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def doubled(chain: nn.Sequential) -> None:
    torch.manual_seed(4)
    chain[4] = Doubled(6, 8, 3, padding=1).double()


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "hook": (lambda c: c[5].register_forward_hook(lambda m, a, out: 2 * out), "5 has hooks"),
    "parametrization": (lambda c: parametrizations.weight_norm(c[4]), "4 is a Parametrized"),
    "padding": (lambda c: setattr(c[0], "padding_mode", "circular"), "0 pads with"),
    "a convolution of another class": (doubled, "4 is a Doubled"),
    "forward on the instance": (lambda c: setattr(c[2], "forward", torch.tanh), "2.forward"),
}


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_children(change: str, after: bool) -> None:
    """One unit that is none any more, and the chain runs composed; before fuse it is declined."""
    apply, words = CHANGES[change]
    plain = chain_of()
    chain = copy.deepcopy(plain)
    if after:
        fb.fuse(chain, stem=True)
    for each in (plain, chain):
        apply(each)
        each[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    (row,) = fb.explain(chain, stem=True)
    assert words in str(row.reason)
    assert row.fused == after
    if not after:
        with pytest.raises(ValueError, match=words):
            fb.fuse(chain, stem=True, strict=True)
    assert torch.equal(run(chain, input_of()).out, run(plain, input_of()).out)


def test_nothing_left_to_fuse() -> None:
    plain, fused = pair("one")
    for chain in (plain, fused):
        chain[2] = nn.SiLU()
    assert "no conv+BN+ReLU that pays is in 0 (Conv2d)" in str(fused.why_not_fused(input_of()))
    assert torch.equal(fused(input_of()), plain(input_of()))
    del fused[:]
    assert torch.equal(fused(input_of()), input_of())


class Twice(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Reversed(nn.Sequential):
    def __iter__(self) -> Any:
        return reversed(self._modules.values())


@pytest.mark.parametrize("kind", [Twice, Reversed])
def test_another_forward_is_no_chain(kind: type[nn.Sequential]) -> None:
    chain = kind(*unit(4, 4))
    with pytest.warns(UserWarning, match="nothing to fuse"):
        assert type(fb.fuse(chain, stem=True)) is kind
    own = nn.Sequential(*unit(4, 4))
    own.forward = torch.tanh  # type: ignore[method-assign]
    (row,) = fb.explain(own, stem=True)
    assert "forward was replaced" in str(row.reason)


def test_resnet_without_batch_norms_says_so() -> None:
    resnet = load("torchvision").models.resnet
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=lambda c: nn.GroupNorm(8, c))
    (row,) = fb.explain(model, stem=True)
    assert "bn1 (GroupNorm)" in str(row.reason)


# At every call.


def test_norms_read_at_every_call() -> None:
    plain, fused = pair()
    for chain in (plain, fused):
        chain[1].eval()
        chain[5].momentum = None
        chain[5].weight.requires_grad_(False)
    for seed in range(2):
        assert_equal_float64(run(fused, input_of(seed)), run(plain, input_of(seed)))


class WithGradient(nn.Module):
    """A tensor subclass in the middle, which must see what comes after."""

    def forward(self, x: Tensor) -> Tensor:
        return x.as_subclass(Seen)


class Seen(Tensor):
    names: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.names.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs)


def test_each_unit_is_asked_with_its_own_input(fused_units: list[Tensor]) -> None:
    chain = in_doubles(nn.Sequential(*unit(4, 6), WithGradient(), *unit(6, 8)))
    fused = fb.fuse(copy.deepcopy(chain), stem=True)
    Seen.names.clear()
    out = fused(input_of())
    assert len(fused_units) == 1
    assert Seen.names.count("conv2d") == 1
    torch.testing.assert_close(out.as_subclass(Tensor), chain(input_of()).as_subclass(Tensor))


BAD: dict[str, Callable[[], Any]] = {
    "one value per channel at the second unit": lambda: torch.randn(1, 4, 2, 2).double(),
    "too small for the pooling": lambda: torch.randn(2, 4, 1, 1).double(),
    "channels": lambda: torch.randn(2, 3, 8, 8).double(),
    "dtype": lambda: torch.randn(2, 4, 8, 8),
    "no batch": lambda: torch.randn(4, 8, 8).double(),
    "empty": lambda: torch.randn(0, 4, 8, 8).double(),
    "None": lambda: None,
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str) -> None:
    """nn's result or its message, and its statistics."""
    torch.manual_seed(0)
    x = BAD[bad]()
    chains, outcomes = pair(), []
    for chain in chains:
        try:
            outcomes.append(tuple(chain(x).shape))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[1] == outcomes[0]
    for got, want in zip(chains[1].buffers(), chains[0].buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_autocast() -> None:
    plain, fused = (module.float() for module in pair())
    with torch.autocast("cpu", torch.bfloat16):
        x = input_of().float()
        assert fused.why_not_fused(x) is None
        want, got = plain(x), fused(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = pair()
    monkeypatch.setenv("FUSED_BOTTLENECK_DISABLE", "1")
    assert torch.equal(fused(input_of()), plain(input_of()))


# Tracers and compilers see the plain chain.


def test_fx() -> None:
    plain, fused = (module.eval() for module in pair("deep stem"))
    graphs = [torch.fx.symbolic_trace(module) for module in (plain, fused)]
    nodes = [[(n.op, str(n.target)) for n in graph.graph.nodes] for graph in graphs]
    assert nodes[1] == nodes[0]
    torch.testing.assert_close(graphs[1](input_of()), plain(input_of()), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("case", ["deep stem", "a class of its own"])
@pytest.mark.parametrize("method", ["script", "trace"])
def test_jit(method: str, case: str) -> None:
    plain, fused = (module.eval() for module in pair(case))
    jit = torch.jit.script(fused) if method == "script" else torch.jit.trace(fused, input_of())
    assert "fused_bottleneck::" not in str(jit.inlined_graph)
    torch.testing.assert_close(jit(input_of()), plain(input_of()), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_compile_and_export() -> None:
    torch.compiler.reset()
    plain, fused = pair()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    want = run(plain, input_of())
    assert_equal_float64(
        run(compiled, input_of())._replace(grads=want.grads, buffers={}), want._replace(buffers={})
    )
    program = torch.export.export(fused.eval(), (input_of(),))
    assert "fused_bottleneck" not in str(program.graph)
    torch.compiler.reset()
