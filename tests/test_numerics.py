"""Hard numerics: large means, constant channels, NaN and Inf, and the same bits every time."""

from collections.abc import Callable
from functools import cache, lru_cache

import pytest
import torch
from helpers import (
    CRITERION_SEEDS,
    IMPLEMENTATIONS,
    Case,
    Trial,
    assert_criterion,
    assert_equal_float64,
    assert_trials,
    channels_last,
    errors,
    in_dtype,
    norms_of,
    randomise,
    relative_error,
    run,
    trial,
    zero_gradients,
)
from tolerances import FLOAT64_DEGENERATE, float64_offset
from torch import Tensor, nn

from fused_bottleneck import Bottleneck, ConvBNReLU, FusedBottleneck, FusedConvBNReLU, extension
from fused_bottleneck.cpu_block import CpuBlockStages
from fused_bottleneck.cpu_products import CpuProductStages

Gram = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

pytestmark = pytest.mark.usefixtures("implementation")

CASES = {
    "identity": Case(channels=32, width=8, size=(6, 8, 7)),
    "conv, stride 2": Case(channels=12, width=8, stride=2, downsample="conv", size=(6, 11, 10)),
}
WIDE = {  # as in test_bottleneck: enough channels for the criterion
    "identity": Case(channels=256, width=64, size=(4, 7, 6)),
    "conv, stride 2": Case(channels=64, width=64, stride=2, downsample="conv", size=(4, 13, 12)),
    # Enough pixels for the gram way on CPU (rules.uses_gram).
    "identity, 1024 pixels": Case(channels=256, width=64, size=(4, 16, 16)),
    "conv, stride 2, 1024 pixels": Case(64, 64, 2, "conv", size=(4, 31, 32)),
}
over_cases = pytest.mark.parametrize("case", CASES)


def compare_float64(
    reference: Bottleneck, fused: FusedBottleneck, x: Tensor, tolerance: float
) -> None:
    assert fused.why_not_fused(x) is None
    expected = run(reference, x)
    assert_equal_float64(run(fused, x), expected, zero_gradients(fused), tolerance=tolerance)


# One after the other, so that `trials` computes what they are held against once for all of them.
over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)


def unchanged(x: Tensor) -> Tensor:
    return x


@lru_cache(maxsize=1)
def trials(
    case: str,
    dtype: torch.dtype,
    prepare: Callable[[Bottleneck], None],
    change: Callable[[Tensor], Tensor] = unchanged,
    but: frozenset[str] = frozenset(),
) -> list[Trial]:
    """Of several seeds. change: of the input; but: parameters whose gradients are left out."""
    found = []
    for seed in CRITERION_SEEDS[dtype]:
        pair = WIDE[case].pair(seed)
        for block in pair:
            prepare(block)
        pair = tuple(channels_last(in_dtype(block, dtype)) for block in pair)
        for block in pair:
            for norm in norms_of(block).values():
                norm.float()
        x = change(WIDE[case].input(seed + 30)).to(dtype)
        found.append(trial(pair, channels_last(x), but))
    return found


# Inputs whose mean is large against their deviation.


def without_flips(block: Bottleneck) -> None:
    """ReLUs far from zero, open or closed: a rounding changes no mask."""
    for norm in norms_of(block).values():
        sign = torch.where(torch.arange(norm.num_features) % 4 == 0, -1.0, 1.0)
        with torch.no_grad():
            norm.bias.copy_(8 * sign)
            norm.weight.fill_(1)


def offset_errors(
    case: Case, dtype: torch.dtype, offset: float, seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors (fused, eager) for x + offset against float64 without the offset.

    Batch statistics remove a constant that is added to x: all but the running means is equal,
    which gives an oracle that has not lost a digit.
    """
    pair = case.pair(seed)
    for block in pair:
        without_flips(block)
    x = channels_last((case.input(seed + 30) + offset).to(dtype))
    want = run(in_dtype(pair[0], dtype).double(), x.double() - offset)
    skip = zero_gradients(pair[1])
    rows = []
    for block in (channels_last(in_dtype(b, dtype)) for b in pair[::-1]):
        found = errors(run(block, x), want, skip)
        rows.append({n: e for n, e in found.items() if not n.endswith("running_mean")})
    return rows[0], rows[1]


@pytest.mark.parametrize("offset", [1e3, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_offset_input(dtype: torch.dtype, offset: float) -> None:
    """A one-pass variance has no correct digit here in float32, and half of them in float64."""
    rows = [offset_errors(WIDE["conv, stride 2"], dtype, offset, seed) for seed in range(4)]
    assert_criterion([row[0] for row in rows], [row[1] for row in rows], dtype)


@over_cases
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_offset_input_equals_the_reference(offset: float, case: str) -> None:
    reference, fused = CASES[case].pair()
    x = CASES[case].input() + offset
    compare_float64(reference, fused, x, float64_offset(offset))


@pytest.mark.parametrize("offset", [1e3, 1e4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_offset_input_of_the_unit(kernel: int, offset: float) -> None:
    """The mean of y is 1e3 and 1e4 deviations: the statistics must come from differences."""
    torch.manual_seed(0)
    plain = ConvBNReLU(8, 16, kernel)
    randomise(plain)
    fused = FusedConvBNReLU(8, 16, kernel)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(6, 8, 9, 8) + offset
    want = run(in_dtype(plain, torch.float64), x.double())
    skip = zero_gradients(fused)
    x, plain, fused = channels_last(x), channels_last(plain), channels_last(fused)
    theirs, ours = errors(run(plain, x), want, skip), errors(run(fused, x), want, skip)
    assert_criterion([ours], [theirs], torch.float32)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_variance_of_an_offset_output(offset: float) -> None:
    """Running variance of conv outputs (weights one, so y = sum of x) to float32 precision."""
    fused = FusedConvBNReLU(4, 3, 1, momentum=1.0)
    nn.init.ones_(fused.conv.weight)
    x = torch.randn(8, 4, 10, 10) + offset
    y = x.double().sum(1) + fused.conv.bias.double()[:, None, None, None]  # [3, N, H, W]
    fused(x)
    # The stored y is rounded to r = 4 offset u; over 800 pixels that adds r^2 to the variance,
    # and a mixed term of 2 r deviations / sqrt(800), where the variance is 4.
    r = 4 * offset * 2.0**-24
    assert relative_error(fused.bn.running_var, y.flatten(1).var(1)) < r**2 + r / 10 + 1e-6
    assert relative_error(fused.bn.running_mean, y.flatten(1).mean(1)) < 2 * 2.0**-24


# The centre of the operand: beta2 far from zero against gamma2.


@cache  # equal arguments give one function, by which `trials` finds what it has
def far_beta(beta: float, gamma: float) -> Callable[[Bottleneck], None]:
    def prepare(block: Bottleneck) -> None:
        torch.manual_seed(3)
        with torch.no_grad():
            block.bn2.bias.copy_(beta * (1 + 0.1 * torch.randn_like(block.bn2.bias)))
            block.bn2.weight.copy_(gamma * (1 + 0.1 * torch.randn_like(block.bn2.weight)))

    return prepare


FAR = [(8.0, 0.5), (50.0, 0.05), (-8.0, 4.0)]


@over_cases
@pytest.mark.parametrize(("beta", "gamma"), FAR)
def test_far_beta_float64(beta: float, gamma: float, case: str) -> None:
    reference, fused = CASES[case].pair()
    for block in (reference, fused):
        far_beta(beta, gamma)(block)
    compare_float64(reference, fused, CASES[case].input(), float64_offset(abs(beta) / gamma))


@pytest.mark.slow
@over_implementations
@over_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("beta", "gamma"), FAR)
def test_far_beta_by_the_criterion(
    beta: float, gamma: float, dtype: torch.dtype, case: str
) -> None:
    assert_trials(trials(case, dtype, far_beta(beta, gamma)))


def frozen_far_from_its_input(block: Bottleneck) -> None:
    """bn2 in eval mode with statistics of another data set: a2 has a mean of 300 deviations."""
    block.bn2.eval()
    with torch.no_grad():
        block.bn2.running_mean.copy_(-300 * torch.ones_like(block.bn2.running_mean))
        block.bn2.running_var.fill_(1)
        block.bn2.weight.abs_()


@pytest.mark.slow
@over_implementations
@over_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_norm_far_from_its_input(dtype: torch.dtype, case: str) -> None:
    """Then bn2.bias is no centre of the operand, but the covariance still feeds a variance."""
    assert_trials(trials(case, dtype, frozen_far_from_its_input))


def test_far_beta_is_better_than_eager() -> None:
    """What the centred operand is for: DESIGN's simulation found 0.69 against 4e-3."""
    case = CASES["identity"]
    reference, fused = case.pair()
    for block in (reference, fused):
        far_beta(50.0, 0.05)(block)
    pair = [in_dtype(block, torch.bfloat16) for block in (reference, fused)]
    for block in pair:
        for norm in norms_of(block).values():
            norm.float()
    x = case.input().bfloat16()
    want = run(in_dtype(pair[0], torch.float64), x.double())
    eager, ours = (errors(run(block, x), want)["out"] for block in pair)
    assert ours < 0.02
    assert eager > 5 * ours


# Channels that go together: the variances of the tail's outputs are small against the covariance
# that they come of.


def correlated(block: Bottleneck) -> None:
    """conv3 and the downsample see what is left of nearly equal channels without their mean."""
    without_flips(block)
    with torch.no_grad():
        filters = block.conv2.weight
        filters.copy_(filters[:1] + 1e-2 * filters)
        for conv in [block.conv3, *list(block.identity_downsample or [])[:1]]:
            conv.weight.mul_(30)  # far above eps
            conv.weight.sub_(conv.weight.mean(1, keepdim=True))


def like_the_first(x: Tensor) -> Tensor:
    """Channels that are nearly equal."""
    return x[:, :1] + 1e-2 * x


@over_implementations
@over_cases
def test_correlated_channels(case: str) -> None:
    """But for the tail's dgamma: it comes of S W, with S in float32, whose rounding no sum over
    pixels averages as it does xhat's in the plain block; 1.7 times its error here, of 1e-5."""
    tail = frozenset({"bn3.weight", "identity_downsample.1.weight"})
    many = f"{case}, 1024 pixels"
    assert_trials(trials(many, torch.float32, correlated, like_the_first, tail))


@pytest.mark.skipif(not extension.has_products(), reason="no fused products for this CPU")
def test_covariance_is_taken_in_double_where_its_terms_cancel(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation != "gram":
        pytest.skip("does not always take a covariance, or takes it in double")
    taken: list[str] = []
    covariance = CpuProductStages._covariance

    def watched(stages: CpuProductStages, d: Tensor, gram: Gram) -> tuple[Tensor, Tensor]:
        taken.append(str(gram).split(".")[1])
        return covariance(stages, d, gram)

    monkeypatch.setattr(CpuProductStages, "_covariance", watched)
    monkeypatch.setattr(CpuBlockStages, "whole_forward", lambda *arguments: None)
    block = WIDE["identity"].module(FusedBottleneck).float()
    x = WIDE["identity"].input().float()
    block(x)
    correlated(block)
    block(like_the_first(x))
    assert taken == ["gram", "gram", "gram_in_double"]


def letterboxed(x: Tensor) -> Tensor:
    x = 1000 + 0.1 * x
    x[0, :, :8, :8] = 0
    return x


@over_implementations
def test_input_whose_corner_is_another_world() -> None:
    """As behind a letterboxed first image: no few pixels may stand for the mean of all."""
    assert_trials(trials("conv, stride 2", torch.float32, without_flips, letterboxed))


# Degenerate channels.


def zero_gamma2(block: Bottleneck) -> None:
    """Half the channels of bn2, some with a positive and some with a negative shift."""
    with torch.no_grad():
        block.bn2.weight[::2] = 0
        block.bn2.bias.copy_(torch.linspace(-1, 1.1, len(block.bn2.bias)))


def all_zero_gamma2(block: Bottleneck) -> None:
    """D is zero everywhere, so that var3 is zero and eps rules."""
    with torch.no_grad():
        block.bn2.weight.zero_()
        block.bn2.bias.copy_(torch.linspace(-1, 1.1, len(block.bn2.bias)))


def dead_channels(block: Bottleneck) -> None:
    """Channels whose ReLU is closed for every pixel."""
    with torch.no_grad():
        block.bn1.bias[:3] = -30
        block.bn2.bias[1:4] = -30


def constant_conv(block: Bottleneck) -> None:
    """Channels of every convolution that are constant (zero weights)."""
    with torch.no_grad():
        for conv in (block.conv1, block.conv2, block.conv3):
            conv.weight[:2] = 0


def equal_rows(block: Bottleneck) -> None:
    """A covariance of rank one."""
    with torch.no_grad():
        block.conv2.weight.copy_(block.conv2.weight[:1].expand_as(block.conv2.weight))


DEGENERATE = [zero_gamma2, all_zero_gamma2, dead_channels, constant_conv, equal_rows]


@over_cases
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("prepare", DEGENERATE)
def test_degenerate_channels(
    prepare: Callable[[Bottleneck], None], training: bool, case: str
) -> None:
    reference, fused = CASES[case].pair()
    for block in (reference, fused):
        prepare(block.train(training))
    compare_float64(reference, fused, CASES[case].input(), FLOAT64_DEGENERATE)


@over_cases
@pytest.mark.parametrize("prepare", DEGENERATE)
def test_degenerate_channels_float32_are_finite(
    prepare: Callable[[Bottleneck], None], case: str
) -> None:
    """A variance that rounds to below zero would give NaN."""
    fused = CASES[case].module(FusedBottleneck).float()
    prepare(fused)
    for seed in range(5):
        result = run(fused, CASES[case].input(seed).float())
        assert all(t.isfinite().all() for t in result.tensors().values())
    for norm in norms_of(fused).values():
        assert (norm.running_var >= 0).all()


@pytest.mark.parametrize("constant", [0.0, 1.0, -3.7])
def test_constant_input(constant: float) -> None:
    case = CASES["conv, stride 2"]
    reference, fused = case.pair()
    x = torch.full_like(case.input(), constant)
    want, got = run(reference, x), run(fused, x)
    # Every xhat of bn1 and the downsample is nn's rounding noise times 316: outputs agree anyway.
    torch.testing.assert_close(got.out, want.out, rtol=1e-9, atol=1e-9)
    assert all(t.isfinite().all() for t in got.tensors().values())


@pytest.mark.parametrize("size", [(2, 1, 1), (1, 1, 3), (3, 2, 1)])
def test_fewer_pixels_than_channels(size: tuple[int, int, int]) -> None:
    """The covariance has not full rank."""
    case = Case(channels=64, width=16, size=size)
    reference, fused = case.pair()
    # Two pixels: xhat is +-1 whatever y is, so gradients of y are differences of equal terms.
    compare_float64(reference, fused, case.input(), FLOAT64_DEGENERATE)


# NaN and Inf.


def with_value(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[0, 1, 2, 3] = value
    return x


VALUES = [float("nan"), float("inf"), -float("inf")]


@over_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("value", VALUES)
def test_non_finite_input_eval(value: float, dtype: torch.dtype, case: str) -> None:
    """With fixed statistics the same elements of the output are NaN and Inf as in nn."""
    reference, fused = (in_dtype(b, dtype).eval() for b in CASES[case].pair())
    x = with_value(CASES[case].input(), value).to(dtype)
    assert fused.why_not_fused(x) is None
    with torch.no_grad():
        want, got = reference(x), fused(x)
    assert not want.isfinite().all()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got[1:].isfinite(), torch.ones_like(got[1:], dtype=torch.bool))


@over_cases
@pytest.mark.parametrize("value", VALUES)
def test_non_finite_input_eval_gradients(value: float, case: str) -> None:
    reference, fused = CASES[case].pair()
    x = with_value(CASES[case].input(), value)
    want, got = run(reference.eval(), x), run(fused.eval(), x)
    for name, tensor in want.tensors().items():
        assert torch.equal(got.tensors()[name].isfinite(), tensor.isfinite()), name


@over_cases
@pytest.mark.parametrize("value", VALUES)
def test_non_finite_input_train(value: float, case: str) -> None:
    """One value spoils the statistics of its channel, and everything behind them is NaN."""
    reference, fused = CASES[case].pair()
    x = with_value(CASES[case].input(), value)
    want, got = run(reference, x), run(fused, x)
    assert want.out.isnan().any()
    zero = zero_gradients(fused)
    for name, tensor in want.tensors().items():
        if name.removeprefix("grad ") not in zero:
            assert torch.equal(got.tensors()[name].isfinite(), tensor.isfinite()), name


@over_cases
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("training", [True, False])
def test_non_finite_gradient(training: bool, value: float, case: str) -> None:
    """GradScaler depends on an Inf in grad_out being seen in the gradients."""
    reference, fused = (b.train(training) for b in CASES[case].pair())
    x = CASES[case].input()
    with torch.no_grad():
        live = reference.eval()(x)
        grad = torch.ones_like(live)
        reference.load_state_dict(fused.state_dict())
        reference.train(training)
        first = (run(reference, x).out > 0).nonzero()[0]
        reference.load_state_dict(fused.state_dict())
    grad[tuple(first)] = value
    want, got = run(reference, x, grad), run(fused, x, grad)
    zero = zero_gradients(fused)
    for name, tensor in want.tensors().items():
        if name.removeprefix("grad ") not in zero:
            assert torch.equal(got.tensors()[name].isfinite(), tensor.isfinite()), name
    assert not got.grads["x"].isfinite().all()
    assert not got.grads["conv3.weight"].isfinite().all()


@over_cases
def test_non_finite_gradient_of_closed_elements(case: str) -> None:
    """nn's ReLU drops the gradient of a closed element, whatever it is."""
    reference, fused = CASES[case].pair()
    x = CASES[case].input()
    out = run(reference, x).out
    reference.load_state_dict(fused.state_dict())
    grad = torch.where(out > 0, 1.0, float("nan"))
    assert grad.isnan().any()
    want, got = run(reference, x, grad), run(fused, x, grad)
    assert all(t.isfinite().all() for t in want.tensors().values())
    assert_equal_float64(got, want, zero_gradients(fused))


@pytest.mark.parametrize("parameter", ["conv1.weight", "bn1.weight", "bn2.bias", "conv3.weight"])
@pytest.mark.parametrize("training", [True, False])
def test_non_finite_parameter(training: bool, parameter: str) -> None:
    reference, fused = (b.train(training) for b in CASES["identity"].pair())
    for block in (reference, fused):
        with torch.no_grad():
            block.get_parameter(parameter).view(-1)[3] = float("nan")
    x = CASES["identity"].input()
    want, got = run(reference, x), run(fused, x)
    assert not want.out.isfinite().all()
    assert torch.equal(got.out.isnan(), want.out.isnan())
    assert torch.equal(got.grads["x"].isnan(), want.grads["x"].isnan())


# Determinism.


@over_cases
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_same_bits_twice(dtype: torch.dtype, case: str, two_threads: None) -> None:
    results = []
    for _ in range(3):
        fused = in_dtype(CASES[case].module(FusedBottleneck), dtype)
        for norm in norms_of(fused).values():
            norm.to(torch.promote_types(dtype, torch.float32))
        results.append(run(fused, CASES[case].input().to(dtype)))
    for again in results[1:]:
        for name, tensor in results[0].tensors().items():
            assert torch.equal(again.tensors()[name], tensor), name


@over_cases
def test_layout_does_not_change_the_values(case: str) -> None:
    """Contiguous and channels_last inputs take the same program."""
    fused = CASES[case].module(FusedBottleneck)
    other = CASES[case].module(FusedBottleneck)
    x = CASES[case].input()
    a = run(fused, x)
    b = run(other, x.contiguous(memory_format=torch.channels_last))
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(b.tensors()[name], tensor, rtol=1e-11, atol=1e-11, msg=name)
