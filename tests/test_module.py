"""``FusedBottleneck`` as a drop-in module: what must stay as it is on the plain block."""

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import Case, assert_equal_float64, grad_like, leaf, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from fused_bottleneck import Bottleneck, FusedBottleneck

pytestmark = pytest.mark.usefixtures("backend")

IDENTITY = Case(size=(2, 5, 4))
DOWNSAMPLE = Case(channels=6, stride=2, downsample="conv", size=(2, 7, 6))
CASES = {"identity": IDENTITY, "downsample": DOWNSAMPLE}
BRANCH = ["conv1", "bn1", "conv2", "bn2", "conv3", "bn3"]
over_cases = pytest.mark.parametrize("case", CASES)


# State, copies.


@over_cases
def test_state_dict(case: str) -> None:
    """Same keys, order and metadata; strict loads both ways."""
    reference, fused = CASES[case].pair()
    assert list(fused.state_dict()) == list(reference.state_dict())
    assert fused.state_dict()._metadata == reference.state_dict()._metadata
    assert [n for n, _ in fused.named_children()] == [n for n, _ in reference.named_children()]
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in reference.named_parameters()]
    for a, b in ((reference, fused), (fused, reference)):
        other = CASES[case].module(type(b), seed=9)
        other.load_state_dict(a.state_dict(), strict=True)
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, a.state_dict()[name]), name


def test_children_are_of_nn() -> None:
    fused = DOWNSAMPLE.module(FusedBottleneck)
    kinds = {n: type(m) for n, m in fused.named_children()}
    assert list(kinds) == [*BRANCH, "relu", "identity_downsample"]
    assert {kinds[f"conv{i}"] for i in (1, 2, 3)} == {nn.Conv2d}
    assert {kinds[f"bn{i}"] for i in (1, 2, 3)} == {nn.BatchNorm2d}
    assert isinstance(fused, Bottleneck)
    assert fused.expansion == FusedBottleneck.expansion == 4


def test_device_and_dtype_of_the_parameters() -> None:
    fused = FusedBottleneck(16, 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in fused.parameters()} == {("meta", torch.bfloat16)}
    assert {b.device.type for b in fused.buffers()} == {"meta"}


def test_use_adds_nothing_to_the_state() -> None:
    reference, fused = DOWNSAMPLE.pair()
    run(fused, DOWNSAMPLE.input())
    assert list(fused.state_dict()) == list(reference.state_dict())
    assert [n for n, _ in fused.named_buffers()] == [n for n, _ in reference.named_buffers()]
    assert vars(fused).keys() == vars(reference).keys()


def saved_and_loaded(block: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda block: pickle.loads(pickle.dumps(block)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("method", COPIES)
@over_cases
def test_copies(case: str, method: str) -> None:
    """After use too: a copy computes the same and shares nothing."""
    fused = CASES[case].module(FusedBottleneck)
    x = CASES[case].input()
    run(fused, x)
    other = COPIES[method](fused)
    assert type(other) is FusedBottleneck
    assert other.why_not_fused(x) is None
    want = run(fused, x)
    assert_equal_float64(run(other, x), want)
    with torch.no_grad():
        other.conv1.weight.zero_()
    assert fused.conv1.weight.any()


def test_edits_through_data_take_effect() -> None:
    """As an exponential moving average makes them: nothing derived from a weight is kept."""
    reference, fused = DOWNSAMPLE.pair()
    x = DOWNSAMPLE.input()
    for mode in (True, False):
        for block in (reference, fused):
            block.train(mode)
            block(x)
            for parameter in block.parameters():
                parameter.data.mul_(0.9).add_(0.05)
        torch.testing.assert_close(fused(x), reference(x), rtol=1e-10, atol=1e-10)


# What runs composed: the reason is one sentence, and results are those of the plain block.


def assert_composed(reference: nn.Module, fused: FusedBottleneck, x: Tensor, *words: str) -> None:
    reason = fused.why_not_fused(x)
    assert reason is not None
    assert all(word in reason for word in words), reason
    want, got = run(reference, x), run(fused, x)
    assert torch.equal(got.out, want.out)
    for name, tensor in want.tensors().items():
        assert torch.equal(got.tensors()[name], tensor), name


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *a: seen.append(1)),
    "forward pre": lambda m, seen: m.register_forward_pre_hook(lambda *a: seen.append(1)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *a: seen.append(1)),
    "backward pre": lambda m, seen: m.register_full_backward_pre_hook(lambda *a: seen.append(1)),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("child", ["conv1", "bn2", "conv3", "relu"])
def test_hooks_on_children_fire(child: str, hook: str) -> None:
    reference, fused = IDENTITY.pair()
    counts: list[int] = []
    expected: list[int] = []
    handle = HOOKS[hook](fused.get_submodule(child), counts)
    HOOKS[hook](reference.get_submodule(child), expected)
    assert_composed(reference, fused, IDENTITY.input(), child)
    assert counts == expected != []
    handle.remove()
    assert fused.why_not_fused(IDENTITY.input()) is None


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_the_block_itself(hook: str) -> None:
    """These need no unfused children."""
    _, fused = IDENTITY.pair()
    seen: list[int] = []
    HOOKS[hook](fused, seen)
    assert fused.why_not_fused(IDENTITY.input()) is None
    run(fused, IDENTITY.input())
    assert seen == [1]


def test_global_hooks() -> None:
    reference, fused = IDENTITY.pair()
    seen: list[str] = []
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda module, args, out: seen.append(type(module).__name__))
    try:
        assert_composed(reference, fused, IDENTITY.input(), "hook")
        assert seen.count("Conv2d") == 6
    finally:
        handle.remove()
    assert fused.why_not_fused(IDENTITY.input()) is None


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class OtherConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def replaced(name: str, make: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        torch.manual_seed(11)
        block.set_submodule(name, make().double())

    return change


CHANGES: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    "parametrization": (
        "conv2",
        lambda b: parametrize.register_parametrization(b.conv2, "weight", Doubled()),
    ),
    "weight_norm": ("conv1", lambda b: parametrizations.weight_norm(b.conv1)),
    "weight_norm pre-hook": ("conv1", lambda b: nn.utils.weight_norm(b.conv1)),
    "orthogonal": ("conv3", lambda b: parametrizations.orthogonal(b.conv3)),
    "relu replaced": ("relu", replaced("relu", lambda: nn.GELU())),
    "norm replaced": ("bn2", replaced("bn2", lambda: nn.GroupNorm(2, 4))),
    "norm is the identity": ("bn1", replaced("bn1", lambda: nn.Identity())),
    "conv subclass": ("conv2", replaced("conv2", lambda: OtherConv(4, 4, 3, padding=1))),
    "conv with forward of its own": (
        "conv1",
        lambda b: setattr(b.conv1, "forward", lambda x: torch.tanh(x[:, :4])),
    ),
    "padding mode": (
        "conv2",
        replaced("conv2", lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    ),
    "padding same": ("conv2", replaced("conv2", lambda: nn.Conv2d(4, 4, 3, padding="same"))),
    "conv1 of another kernel": ("conv1", replaced("conv1", lambda: nn.Conv2d(16, 4, 3, padding=1))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_children(change: str) -> None:
    child, apply = CHANGES[change]
    reference, fused = IDENTITY.pair()
    for block in (reference, fused):
        torch.manual_seed(5)
        apply(block)
    if change == "padding same" and fused.why_not_fused(IDENTITY.input()) is None:
        assert_equal_float64(
            run(fused, IDENTITY.input()), run(reference, IDENTITY.input()), {"conv1.bias"}
        )
        return
    assert_composed(reference, fused, IDENTITY.input(), child)


def test_spectral_norm_keeps_its_state() -> None:
    reference, fused = IDENTITY.pair()
    for block in (reference, fused):
        torch.manual_seed(5)
        parametrizations.spectral_norm(block.conv2)
    assert_composed(reference, fused, IDENTITY.input(), "conv2")


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, fused = IDENTITY.pair()
    monkeypatch.setenv("FUSED_BOTTLENECK_DISABLE", "1")
    assert_composed(reference, fused, IDENTITY.input(), "FUSED_BOTTLENECK_DISABLE")
    monkeypatch.setenv("FUSED_BOTTLENECK_DISABLE", "0")
    assert fused.why_not_fused(IDENTITY.input()) is None


class Wrapped(Tensor):
    """A tensor subclass that counts the functions it sees."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs)


def test_tensor_subclass_sees_every_operation() -> None:
    _, fused = IDENTITY.pair()
    x = IDENTITY.input().as_subclass(Wrapped)
    assert fused.why_not_fused(x) is not None
    Wrapped.seen.clear()
    assert type(fused(x)) is Wrapped
    assert Wrapped.seen.count("conv2d") == 3
    assert fused.why_not_fused(nn.Parameter(IDENTITY.input())) is None


# torch.func and forward-mode AD.


def test_func_grad() -> None:
    reference, fused = (b.eval() for b in IDENTITY.pair())
    x = IDENTITY.input()
    want, got = (torch.func.grad(lambda t, b=b: b(t).sin().sum())(x) for b in (reference, fused))
    assert torch.equal(got, want)


def test_func_vmap() -> None:
    reference, fused = (b.eval() for b in IDENTITY.pair())
    x = torch.stack([IDENTITY.input(seed) for seed in range(3)])
    want, got = (torch.func.vmap(b)(x) for b in (reference, fused))
    assert torch.equal(got, want)


def test_func_jvp_and_functional_call() -> None:
    reference, fused = (b.eval() for b in IDENTITY.pair())
    x, tangent = IDENTITY.input(), IDENTITY.input(8)
    want, got = (torch.func.jvp(b, (x,), (tangent,)) for b in (reference, fused))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    other = {n: p * 1.1 for n, p in fused.named_parameters()}
    calls = [torch.func.functional_call(b, other, (x,)) for b in (reference, fused)]
    torch.testing.assert_close(calls[1], calls[0], rtol=1e-10, atol=1e-10)


def test_forward_mode() -> None:
    """Never silent zeros."""
    reference, fused = (b.eval() for b in IDENTITY.pair())
    tangents = []
    for block in (reference, fused):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(IDENTITY.input(), IDENTITY.input(8))
            tangents.append(torch.autograd.forward_ad.unpack_dual(block(dual)).tangent)
    assert tangents[0].any()
    assert torch.equal(tangents[1], tangents[0])


# Bad input: the outcome of the plain block, and nothing half updated.


def outcome(block: nn.Module, x: object) -> str | Tensor:
    """The result, or the error's type and message."""
    try:
        return block(x)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


BAD: dict[str, Callable[[], object]] = {
    "wrong channels": lambda: torch.randn(2, 5, 6, 6, dtype=torch.float64),
    "one channel": lambda: torch.randn(2, 1, 6, 6, dtype=torch.float64),
    "dtype": lambda: torch.randn(2, 6, 6, 6),
    "integers": lambda: torch.ones(2, 6, 6, 6, dtype=torch.int64),
    "two dimensions": lambda: torch.randn(6, 6, dtype=torch.float64),
    "five dimensions": lambda: torch.randn(2, 6, 6, 6, 6, dtype=torch.float64),
    "three dimensions": lambda: torch.randn(6, 6, 6, dtype=torch.float64),
    "empty batch": lambda: torch.randn(0, 6, 6, 6, dtype=torch.float64),
    "no pixels": lambda: torch.randn(2, 6, 0, 6, dtype=torch.float64),
    "one value per channel": lambda: torch.randn(1, 6, 1, 1, dtype=torch.float64),
    "one value behind the stride": lambda: torch.randn(1, 6, 2, 2, dtype=torch.float64),
    "a list": lambda: [1.0, 2.0],
    "None": lambda: None,
    "meta": lambda: torch.randn(2, 6, 6, 6, dtype=torch.float64, device="meta"),
    "sparse": lambda: torch.randn(2, 6, 6, 6, dtype=torch.float64).to_sparse(),
    "complex": lambda: torch.randn(2, 6, 6, 6, dtype=torch.complex128),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str, training: bool) -> None:
    """Same result or same message; buffers as the plain block leaves them."""
    reference, fused = (b.train(training) for b in DOWNSAMPLE.pair())
    torch.manual_seed(1)
    x = BAD[bad]()
    want, got = outcome(reference, x), outcome(fused, x)
    assert type(got) is type(want)
    if isinstance(want, Tensor) and isinstance(got, Tensor):
        assert got.shape == want.shape
        assert got.device == want.device
        if not got.is_meta:
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    else:
        assert got == want
    for (name, buffer), other in zip(fused.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)


def test_one_value_per_channel_has_nns_message() -> None:
    fused = IDENTITY.module(FusedBottleneck)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused(torch.randn(1, 16, 1, 1, dtype=torch.float64))
    assert int(fused.eval()(torch.randn(1, 16, 1, 1, dtype=torch.float64)).numel()) == 16


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch_backward(training: bool) -> None:
    reference, fused = (b.train(training) for b in IDENTITY.pair())
    outcomes = []
    for block in (reference, fused):
        x = torch.zeros(0, 16, 4, 4, dtype=torch.float64, requires_grad=True)
        out = outcome(block, x)
        if isinstance(out, Tensor):
            out.sum().backward()
            outcomes.append((out.shape, x.grad.shape))
        else:
            outcomes.append(out)
    assert outcomes[1] == outcomes[0]


@pytest.mark.parametrize("size", [(2, 3, 5, 4), (2, 16, 9, 4), (1, 16, 5, 4), (2, 1, 5, 4)])
def test_shortcut_of_another_shape(size: tuple[int, ...]) -> None:
    """Broadcasting or nn's error, as the plain block: the shortcut is only known at call time."""

    class Given(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linspace(-1, 1, 16 * 45).double()[: torch.Size(size).numel()].view(size)

    reference, fused = IDENTITY.pair()
    for block in (reference, fused):
        block.identity_downsample = Given()
    x = IDENTITY.input()
    want, got = outcome(reference, x), outcome(fused, x)
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    else:
        assert got == want


def test_geometry_in_numpy_integers() -> None:
    """As a configuration that was computed gives it."""
    reference, fused = DOWNSAMPLE.pair()
    for block in (reference, fused):
        block.conv2.stride = (np.int64(2), np.int64(2))
    x = DOWNSAMPLE.input()
    assert fused.why_not_fused(x) is None
    assert_equal_float64(run(fused, x), run(reference, x))


@pytest.mark.parametrize("stride", [2, 3])
def test_identity_with_a_stride(stride: int) -> None:
    reference, fused = IDENTITY.pair()
    for block in (reference, fused):
        block.conv2.stride = (stride, stride)
    x = IDENTITY.input()
    assert outcome(fused, x) == outcome(reference, x)
    for buffer, other in zip(fused.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-10, atol=1e-10)


def test_failing_shortcut_leaves_statistics_as_nn_does() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("shortcut failed")

    reference, fused = IDENTITY.pair()
    before = {n: b.clone() for n, b in fused.named_buffers()}
    for block in (reference, fused):
        block.identity_downsample = Failing()
        with pytest.raises(RuntimeError, match="shortcut failed"):
            block(IDENTITY.input())
    as_nn = all(
        torch.allclose(a, b, rtol=1e-10)
        for a, b in zip(fused.buffers(), reference.buffers(), strict=True)
    )
    untouched = all(torch.equal(b, before[n]) for n, b in fused.named_buffers())
    assert as_nn or untouched


def test_float32_input_to_a_float64_shortcut_result() -> None:
    """A shortcut of another dtype promotes, or fails, as the plain block does."""

    class Promoting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    reference, fused = IDENTITY.pair()
    outs = []
    for block in (reference, fused):
        block.float().identity_downsample = Promoting()
        outs.append(outcome(block, IDENTITY.input().float()))
    assert outs[0].dtype == outs[1].dtype == torch.float32
    torch.testing.assert_close(outs[1], outs[0])


def test_repr_and_train_flags() -> None:
    fused = DOWNSAMPLE.module(FusedBottleneck)
    assert repr(fused).startswith("FusedBottleneck(")
    assert not fused.eval().bn1.training
    assert fused.train().identity_downsample[1].training


def test_half_and_back() -> None:
    """.to(dtype) of a used module."""
    fused = IDENTITY.module(FusedBottleneck)
    x = leaf(IDENTITY.input())
    out = fused(x)
    out.backward(grad_like(out))
    assert fused.to(torch.bfloat16)(IDENTITY.input().bfloat16()).dtype == torch.bfloat16
    assert fused.double()(IDENTITY.input()).dtype == torch.float64
