"""conv+BN+ReLU with the max pooling behind it as one unit: passes, stages, function and chain."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import one_image_at_a_time
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
from test_ops import KERNELS, check, recorded
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fused_bottleneck as fb
from fused_bottleneck import extension, functional
from fused_bottleneck.algebra import accumulation_dtype
from fused_bottleneck.cpu import CpuStages
from fused_bottleneck.dispatch import pools
from fused_bottleneck.modules import pool_arguments
from fused_bottleneck.operands import NO_TAP, Activation, ConvGrad, PooledGrad
from fused_bottleneck.stages import Stages

pytestmark = pytest.mark.skipif(not extension.load(), reason=extension.reason())
passes = torch.ops.fused_bottleneck

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
POOLS: dict[str, tuple[Any, ...]] = {
    "3x3, stride 2, padding 1": (3, 2, 1),
    "2x2": (2,),
    "2x2, ceil": (2, 2, 0, 1, False, True),
    "overlapping, ceil": (3, 2, 1, 1, False, True),
    "2x3, strides 3 by 1": ((2, 3), (3, 1), (0, 1)),
    "dilated": (3, (1, 2), 1, (2, 3)),
    "gaps": (2, 3),
    "15x17": ((15, 17), (9, 8), (7, 8)),
}
over_pools = pytest.mark.parametrize("pool", POOLS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def pool_of(name: str) -> Any:
    arguments = pool_arguments(nn.MaxPool2d(*POOLS[name]))
    assert arguments is not None
    return arguments


# Passes, against the plain stages.


class Sample(NamedTuple):
    """An activation, the gradient of its pooling, and the coefficients of dy."""

    act: Activation
    invstd: Tensor
    k: Tensor

    def conv_grad(self, grad: PooledGrad, batch: bool) -> ConvGrad:
        k0, k1 = self.k if batch else (None, None)
        return ConvGrad(grad, self.act.y, self.act.mean, self.act.scale, k0, k1)


def sample(dtype: torch.dtype, channels: int = 37, size: tuple[int, int] = (15, 17)) -> Sample:
    """y of whole numbers, so that windows have ties."""
    shape = (3, channels, *size)
    y = channels_last(torch.randint(-6, 6, shape).to(dtype))
    mean, invstd, beta, *k = torch.randn(5, channels).to(accumulation_dtype(dtype))
    scale = torch.randn_like(mean).sign() / 2
    return Sample(Activation(y, mean.round(), scale, beta.round()), invstd, torch.stack(k))


def in_stages(stages: Stages, pool: str, given: Sample, batch: bool) -> list[Tensor]:
    """Output, taps, both sums, and dy of a pooling."""
    windows = pool_of(pool)
    with stages:
        out, taps = stages.pooled(given.act, windows, True)
        torch.manual_seed(3)
        grad = PooledGrad(channels_last(torch.randint_like(out, -4, 4)), taps, windows)
        sums = stages.pooled_reduce(grad, given.act.y, given.act.mean, given.invstd)
        conv_grad = given.conv_grad(grad, batch)
        if isinstance(stages, CpuStages):
            dy = torch.empty_like(given.act.y)
            stages._unpooled_conv_grad(conv_grad, dy)
        else:
            dy = stages._conv_grad(conv_grad)
        return [t.clone() for t in (out, taps, *sums, dy)]


@over_dtypes
@over_pools
def test_passes_agree_with_the_stages(pool: str, dtype: torch.dtype) -> None:
    """Ties, padding, what rounding makes equal: bits, but for the order of sums."""
    for channels, batch in ((37, True), (3, False)):
        given = sample(dtype, channels)
        got, want = (in_stages(s, pool, given, batch) for s in (CpuStages(), Stages()))
        for ours, theirs in zip(got[:2], want[:2], strict=True):
            assert torch.equal(ours, theirs)
        tolerance = 64 * torch.finfo(accumulation_dtype(dtype)).eps
        for ours, theirs in zip(got[2:4], want[2:4], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=100 * tolerance)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got[4], want[4], rtol=eps, atol=10 * tolerance)


@over_dtypes
def test_output_is_that_of_the_modules(dtype: torch.dtype) -> None:
    """Bits of bn_apply_, then torch's pooling; NaN and infinities as there."""
    given = sample(dtype)
    y = given.act.y
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0]).to(dtype)
    y.permute(0, 2, 3, 1).view(-1)[::7] = special.repeat(y.numel())[: -(-y.numel() // 7)]
    act = torch.empty_like(y)
    passes.bn_apply_(*given.act, True, act)
    for name in POOLS:
        pool = pool_of(name)
        want, places = F.max_pool2d(act, *pool, return_indices=True)
        for stages in (CpuStages(), Stages()):
            with stages:
                out, taps = stages.pooled(given.act, pool, True)
                torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(taps == NO_TAP, want == 0)
        g = torch.zeros_like(y)
        ones, zeros = torch.ones_like(given.invstd), torch.zeros_like(given.invstd)
        windows = [*pool.kernel, *pool.stride, *pool.padding, *pool.dilation]
        passes.pool_bn_backward_(
            channels_last(torch.ones_like(out)), taps, windows, y, zeros, ones, None, None, g
        )
        live = torch.where(want == 0, 0, torch.ones_like(want)).flatten(2)
        expected = torch.zeros_like(y).flatten(2).scatter_add_(2, places.flatten(2), live)
        assert torch.equal(g.flatten(2), expected)


def outputs() -> dict[str, Tensor]:
    """All that the passes compute, on fixed inputs, by name."""
    found = {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        for name in ("3x3, stride 2, padding 1", "dilated"):
            values = in_stages(CpuStages(), name, sample(dtype), True)
            found |= {f"{name} {dtype} {i}": value for i, value in enumerate(values)}
    return found


def test_same_bits_for_any_number_of_threads() -> None:
    given = sample(torch.float32, 67, (61, 50))
    want = in_stages(CpuStages(), "3x3, stride 2, padding 1", given, True)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        got = in_stages(CpuStages(), "3x3, stride 2, padding 1", given, True)
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs)


def pass_arguments() -> dict[str, dict[str, Any]]:
    given = sample(torch.bfloat16, 4, (5, 6))
    y, mean, scale, beta, _ = given.act
    out = channels_last(torch.zeros(3, 4, 3, 3, dtype=torch.bfloat16))
    index = torch.zeros_like(out, dtype=torch.uint8)
    pool = [3, 3, 2, 2, 1, 1, 1, 1]
    pooled = {"grad_out": out, "index": index, "pool": pool, "y": y, "mean": mean}
    forward = {"y": y, "mean": mean, "scale": scale, "beta": beta, "pool": pool, "out": out}
    dy = {"scale": scale, "k0": None, "k1": None, "out": torch.empty_like(y)}
    return {
        "bn_relu_pool_": forward | {"index": index},
        "pool_bn_backward_reduce": pooled | {"invstd": scale},
        "pool_bn_backward_": pooled | dy,
    }


@pytest.mark.parametrize("name", pass_arguments())
def test_opcheck_of_a_pass(name: str) -> None:
    arguments = tuple(pass_arguments()[name].values())
    torch.library.opcheck(getattr(passes, name).default, arguments)


ERRORS: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("bn_relu_pool_", "pool", lambda p: p[1:], "pool to be 8 integers, got 7"),
    ("bn_relu_pool_", "pool", lambda p: [16, 16, *p[2:]], r"at most 255 elements.*\[16, 16, 2"),
    (
        "bn_relu_pool_",
        "pool",
        lambda p: [2, 3, 2, 2, 1, 1, 6, 1],
        r"one at least in \[3, 4, 5, 6\]",
    ),
    ("bn_relu_pool_", "pool", lambda p: [*p[:2], 0, *p[3:]], r"one at least in \[3, 4, 5, 6\]"),
    ("bn_relu_pool_", "pool", lambda p: [*p[:2], 5, *p[3:]], r"one at least in \[3, 4, 5, 6\]"),
    ("bn_relu_pool_", "index", lambda t: t[:, :, 1:], r"index to be uint8 \[27, 4\]"),
    ("bn_relu_pool_", "out", lambda t: t[1:], r"as many images \[N, C, H, W\], got \[3, 4, 5, 6\]"),
    ("bn_relu_pool_", "out", lambda t: t.float(), r"out to be bfloat16 \[27, 4\].*got float32"),
    ("pool_bn_backward_reduce", "grad_out", lambda t: t.contiguous(), "grad_out to be a matrix"),
    ("pool_bn_backward_reduce", "invstd", lambda t: t[1:], r"invstd to be float32 \[4\]"),
    ("pool_bn_backward_", "index", lambda t: t.bool(), r"index to be uint8 \[27, 4\].*got Bool"),
    ("pool_bn_backward_", "k0", lambda t: torch.zeros(4), "k0 and k1 to be given together"),
    ("pool_bn_backward_", "out", lambda t: t[:2], r"out to be bfloat16 \[90, 4\]"),
]


@pytest.mark.parametrize(("op", "name", "change", "message"), ERRORS)
def test_error_names_the_argument(
    op: str, name: str, change: Callable[[Any], Any], message: str
) -> None:
    arguments = pass_arguments()[op]
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=f"{op}: expected .*{message}"):
        getattr(passes, op)(**arguments)


# The unit in a chain, against the plain modules.


def chain_of(pool: str = "3x3, stride 2, padding 1", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 16, 3, padding=1)
    chain = nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(*POOLS[pool])).double()
    randomise(chain)
    return chain


def pair(pool: str = "3x3, stride 2, padding 1", seed: int = 0) -> tuple[nn.Module, nn.Module]:
    plain = chain_of(pool, seed)
    return plain, fb.fuse(copy.deepcopy(plain), stem=True, strict=True)


def input_of(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, 15, 17, dtype=torch.float64, generator=generator)


@pytest.fixture
def pooled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of all units that ran fused, whether their pooling was one with them."""
    seen: list[bool] = []
    run_unit = functional.run_conv_bn_relu

    def noted(x: Tensor, unit: Any, pool: Any) -> Tensor:
        seen.append(pool is not None)
        return run_unit(x, unit, pool)

    monkeypatch.setattr(functional, "run_conv_bn_relu", noted)
    return seen


@pytest.mark.parametrize("training", [True, False])
@over_pools
def test_equals_the_plain_chain(
    pool: str, training: bool, pooled: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both layouts, an image at a time, and with frozen parameters."""
    one_image_at_a_time(monkeypatch)
    plain, fused = (module.train(training) for module in pair(pool))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = input_of().contiguous(memory_format=layout)
        want, got = run(plain, x), run(fused, x)
        assert_equal_float64(got, want, {"0.bias"} if training else ())
        assert got.out.stride() == want.out.stride()
    for module in (plain, fused):
        module[0].weight.requires_grad_(False)
        module[1].bias.requires_grad_(False)
    assert_equal_float64(run(fused, x), run(plain, x), {"0.bias"} if training else ())
    assert pooled == [True] * 3


def test_equals_the_plain_chain_in_plain_torch() -> None:
    """The stages' own formulas, which the passes are tested against."""
    for name in POOLS:
        plain = chain_of(name)
        conv, norm = plain[0], plain[1]
        x = input_of()
        want = run(plain, x)
        bn = functional.BatchNorm(norm.weight, norm.bias)
        unit = functional.Conv(conv.weight, conv.bias, 1, 1), bn
        got = run(Called(plain, unit, pool_of(name)), x)
        got = got._replace(
            grads={n.removeprefix("chain."): g for n, g in got.grads.items()}, buffers=want.buffers
        )
        assert_equal_float64(got, want, {"0.bias"})


class Called(nn.Module):
    """The function with the parameters of a chain, in plain torch."""

    def __init__(self, chain: nn.Module, unit: Any, pool: Any) -> None:
        super().__init__()
        self.chain, self.unit, self.pool = chain, unit, pool

    def forward(self, x: Tensor) -> Tensor:
        return functional.run_conv_bn_relu(x, self.unit, self.pool, "torch")


@pytest.mark.parametrize("kernel", [1, 3])
def test_winograd_and_products_below_a_pooling(
    kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution that this library has itself goes its own way, an image at a time too."""
    one_image_at_a_time(monkeypatch)
    torch.manual_seed(0)
    weight = torch.randn(16, 16, kernel, kernel, requires_grad=True)
    x = channels_last(torch.randn(4, 16, 13, 12)).requires_grad_()
    unit = functional.Conv(weight, None, 2, kernel // 2), functional.BatchNorm()
    grads = []
    for dtype in (torch.float32, torch.float64):
        if dtype == torch.float64:
            unit = unit[0]._replace(weight=weight.double()), functional.BatchNorm()
        pool = pool_of("3x3, stride 2, padding 1")
        out = functional.run_conv_bn_relu(x.to(dtype), unit, pool)
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(out, (x, weight), torch.randn(out.shape).to(dtype)))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_not_above_eagers(
    dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_image_at_a_time(monkeypatch)
    fused_errors, eager_errors = [], []
    for seed in CRITERION_SEEDS[dtype]:
        modules = [channels_last(in_dtype(m, dtype)).train(training) for m in pair(seed=seed)]
        x = channels_last(input_of(seed + 9).to(dtype))
        want = run(in_dtype(modules[0], torch.float64), x.double())
        skip = {"0.bias"} if training else set()
        for module, rows in zip(modules, (eager_errors, fused_errors), strict=True):
            rows.append(errors(run(module, x), want, skip))
    assert_criterion(fused_errors, eager_errors, dtype)


def test_nan_and_ties_as_in_the_plain_chain(pooled: list[bool]) -> None:
    """Fixed statistics keep a NaN where it is; a constant channel makes every window a tie."""
    plain, fused = (module.eval() for module in pair())
    x = input_of().round()
    x[1, :, 4, 4] = float("nan")
    x[0] = 0
    want, got = run(plain, x), run(fused, x)
    torch.testing.assert_close(got.out, want.out, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(
        got.grads["x"], want.grads["x"], rtol=1e-10, atol=1e-10, equal_nan=True
    )
    assert pooled == [True]


def test_double_backward() -> None:
    plain, fused = pair("2x3, strides 3 by 1")
    x = input_of()[:2, :, :6, :5].clone().requires_grad_()
    weight = fused[0].weight.detach().clone().requires_grad_()
    pool = pool_of("2x3, strides 3 by 1")
    norm = functional.BatchNorm(fused[1].weight.detach().requires_grad_(), fused[1].bias.detach())

    def unit(x: Tensor, weight: Tensor) -> Tensor:
        return functional.run_conv_bn_relu(x, (functional.Conv(weight, None, 1, 1), norm), pool)

    assert gradcheck(unit, (x, weight), fast_mode=True)
    assert gradgradcheck(unit, (x, weight), fast_mode=True)
    grads = []
    for module in (plain, fused):
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), [x, *module.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)


def test_memory_kept_for_backward() -> None:
    """The convolution's input and output, a byte per pooled element, and vectors."""
    _, fused = pair()
    x = input_of()
    own = {p.untyped_storage().data_ptr() for p in fused.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fused(x)
    y = 5 * 16 * 15 * 17
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    least = 8 * (x.numel() + y) + out.numel()
    assert least <= total <= least + 8 * 6 * 16


def test_autocast(pooled: list[bool]) -> None:
    plain, fused = (module.float() for module in pair())
    with torch.autocast("cpu", torch.bfloat16):
        want, got = plain(input_of().float()), fused(input_of().float())
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    assert pooled == [True]


@pytest.mark.parametrize("training", [True, False])
def test_opcheck_of_the_ops(training: bool) -> None:
    calls = recorded(pair()[1].train(training), input_of())
    names = ["conv_bn_relu_forward", "conv_bn_relu_backward"]
    check(calls, names, (*KERNELS, "test_aot_dispatch_dynamic"))


def test_copies_and_the_way_back() -> None:
    plain, fused = pair()
    want = run(plain, input_of())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert list(other.state_dict()) == list(plain.state_dict())
        assert_equal_float64(run(other, input_of()), want, {"0.bias"})
    assert [type(m) for m in fb.unfuse(fused).modules()] == [type(m) for m in plain.modules()]


# Poolings that are called.


class Own(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class First(nn.Module):
    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return both[0]


def hooked() -> nn.Module:
    pool = nn.MaxPool2d(2)
    pool.register_forward_hook(lambda m, a, out: 2 * out)
    return pool


CALLED: dict[str, Callable[[], list[nn.Module]]] = {
    "hook": lambda: [hooked()],
    "a class of its own": lambda: [Own(2)],
    "indices": lambda: [nn.MaxPool2d(2, return_indices=True), First()],
    "more than a byte": lambda: [nn.MaxPool2d(16, 1, 8)],
    "one number for both": lambda: [nn.MaxPool2d((2,))],
    "average": lambda: [nn.AvgPool2d(2)],
}


@pytest.mark.parametrize("case", CALLED)
def test_other_poolings_are_called(case: str, pooled: list[bool]) -> None:
    plain = nn.Sequential(*chain_of()[:3], *CALLED[case]())
    fused = fb.fuse(copy.deepcopy(plain), stem=True, strict=True)
    assert_equal_float64(run(fused, input_of()), run(plain, input_of()), {"0.bias"})
    assert pooled == [False]


def test_a_pooling_that_does_not_fit_has_nns_message(pooled: list[bool]) -> None:
    chains = pair()
    messages = []
    for chain in chains:
        chain[3] = nn.MaxPool2d(18)
        with pytest.raises(RuntimeError) as caught:
            chain(input_of())
        messages.append(str(caught.value))
    assert messages[1] == messages[0]
    assert pooled == [False]


def test_where_poolings_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1)
    assert pools(x)
    assert not pools(x.to("meta"))
    monkeypatch.setenv("FUSED_BOTTLENECK_BACKEND", "torch")
    assert not pools(x)
    monkeypatch.delenv("FUSED_BOTTLENECK_BACKEND")
    monkeypatch.setattr(extension, "loaded", lambda: False)
    assert not pools(x)


def test_output_size_is_that_of_the_modules() -> None:
    for name in POOLS:
        for size in ((15, 17), (16, 18), (20, 19)):
            want = nn.MaxPool2d(*POOLS[name])(torch.zeros(1, 1, *size)).shape[2:]
            assert pool_of(name).output_size(*size) == tuple(want)
    # Steps over an input that is smaller than the dilation: torch's output is -inf there.
    assert not pool_of("dilated").fits(2, 9)
