"""``FusedBottleneck`` against the plain block: outputs, gradients, running statistics."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

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
    grad_like,
    in_dtype,
    noise_gradients,
    norms_of,
    randomise,
    run,
    trial,
    zero_gradients,
)
from torch import Tensor, nn

from fused_bottleneck import Bottleneck, FusedBottleneck

pytestmark = pytest.mark.usefixtures("implementation")

CASES = {
    "identity": Case(),
    "no conv bias": Case(bias=False),
    "one image": Case(size=(1, 7, 4)),
    "one pixel per image": Case(size=(5, 1, 1)),
    "one row": Case(size=(2, 1, 9)),
    "one channel": Case(channels=4, width=1),
    "mask ends inside a byte": Case(channels=12, width=3),
    "wider than its pixels": Case(channels=40, width=10, size=(2, 2, 1)),
    "expansion 1": Case(channels=7, width=7, options={"expansion": 1}),
    "expansion 2": Case(channels=10, width=5, options={"expansion": 2}),
    "groups": Case(options={"groups": 2}),
    "depthwise": Case(options={"groups": 4}),
    "dilation": Case(options={"dilation": 2}),
    "dilation beyond the image": Case(options={"dilation": 7}),
    "eps and momentum": Case(options={"eps": 1e-2, "momentum": 0.7}),
    "large batch, small image": Case(size=(33, 2, 3)),
    "conv": Case(channels=6, downsample="conv"),
    "conv, no bias": Case(channels=6, downsample="conv", bias=False),
    "conv, stride 2": Case(channels=6, stride=2, downsample="conv", size=(3, 7, 6)),
    "conv, stride 3": Case(channels=6, stride=3, downsample="conv", size=(3, 8, 7)),
    "conv, stride 2 by 1": Case(channels=6, stride=(2, 1), downsample="conv", size=(2, 7, 6)),
    "conv, stride 1 by 3": Case(channels=6, stride=(1, 3), downsample="conv", size=(2, 7, 6)),
    "conv, stride beyond the image": Case(channels=6, stride=3, downsample="conv", size=(4, 2, 3)),
    "conv, odd channels": Case(channels=5, width=3, stride=2, downsample="conv"),
    "conv, groups, dilation, stride": Case(
        channels=9, width=6, stride=2, downsample="conv", options={"groups": 3, "dilation": 2}
    ),
    "conv, equal channels": Case(downsample="conv"),
    "pool": Case(channels=6, stride=2, downsample="pool", size=(3, 7, 6)),
    "conv3": Case(channels=6, stride=2, downsample="conv3", bias=False),
    "module": Case(downsample="module"),
    "nn.Identity": Case(downsample="nn.Identity"),
}


def frozen(*names: str) -> Callable[[Bottleneck], None]:
    """In training mode but for these normalisations."""

    def set_modes(block: Bottleneck) -> None:
        for name in names:
            if name in norms_of(block):
                block.get_submodule(name).eval()

    return set_modes


def without_grad(*prefixes: str) -> Callable[[Bottleneck], None]:
    """Parameters with these prefixes take no gradient."""

    def set_flags(block: Bottleneck) -> None:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(not name.startswith(prefixes))

    return set_flags


def with_norms(**options: object) -> Callable[[Bottleneck], None]:
    """All normalisations made anew with these options."""

    def replace(block: Bottleneck) -> None:
        torch.manual_seed(7)
        for name, norm in norms_of(block).items():
            settings = {"eps": norm.eps, "momentum": norm.momentum} | options
            block.set_submodule(name, nn.BatchNorm2d(norm.num_features, **settings).double())
        randomise(block)

    return replace


def untracked_eval(block: Bottleneck) -> None:
    """Without running statistics nn normalises with those of the batch in eval mode too."""
    with_norms(track_running_stats=False)(block)
    block.eval()


def mixed(block: Bottleneck) -> None:
    """Each normalisation of another kind."""
    block.bn1 = nn.BatchNorm2d(block.bn1.num_features, affine=False).double()
    block.bn2 = nn.BatchNorm2d(block.bn2.num_features, track_running_stats=False).double()
    block.bn2.eval()
    block.bn3.momentum = None


def strided(block: Bottleneck) -> None:
    """Vectors that are every second element of others."""
    vectors = [norm for norm in norms_of(block).values() if norm.affine]
    vectors += [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
    for module in vectors:
        for name in ("weight", "bias")[isinstance(module, nn.Conv2d) :]:
            both = torch.stack([getattr(module, name).detach()] * 2, 1)
            both[:, 1] = torch.nan
            setattr(module, name, nn.Parameter(both[:, 0]))


MODES: dict[str, Callable[[Bottleneck], object]] = {
    "strided vectors": strided,
    "train": lambda block: block.train(),
    "eval": lambda block: block.eval(),
    "bn1 frozen": frozen("bn1"),
    "bn2 frozen": frozen("bn2"),
    "bn3 frozen": frozen("bn3"),
    "bn1, bn3 frozen": frozen("bn1", "bn3"),
    "downsample frozen": frozen("identity_downsample.1"),
    "all but downsample frozen": frozen("bn1", "bn2", "bn3"),
    "affine=False": with_norms(affine=False),
    "momentum=None": with_norms(momentum=None),
    "momentum=0": with_norms(momentum=0.0),
    "momentum=1": with_norms(momentum=1.0),
    "track_running_stats=False": with_norms(track_running_stats=False),
    "track_running_stats=False, eval": untracked_eval,
    "mixed": mixed,
    "convolutions without grad": without_grad("conv", "identity_downsample.0"),
    "norms without grad": without_grad("bn", "identity_downsample.1"),
    "weights of conv3, bn2 without grad": without_grad("conv3", "bn2"),
    "nothing but x": without_grad(""),
}


def compare(reference: Bottleneck, fused: FusedBottleneck, x: Tensor) -> None:
    assert fused.why_not_fused(x) is None
    expected = run(reference, x)
    assert_equal_float64(run(fused, x), expected, zero_gradients(fused), noise_gradients(fused))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, mode: str) -> None:
    reference, fused = CASES[case].pair()
    for block in (reference, fused):
        MODES[mode](block)
    compare(reference, fused, CASES[case].input())


@pytest.mark.parametrize("case", ["identity", "conv, stride 2", "pool"])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_reference_in_every_mode(case: str, mode: str) -> None:
    reference, fused = CASES[case].pair()
    for block in (reference, fused):
        MODES[mode](block)
    compare(reference, fused, CASES[case].input())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_over_several_batches(momentum: float | None) -> None:
    """num_batches_tracked counts, and momentum None gives the plain average."""
    case = CASES["conv, stride 2"]
    reference, fused = case.pair()
    for block in (reference, fused):
        for norm in norms_of(block).values():
            norm.momentum = momentum
    for seed in range(4):
        compare(reference, fused, case.input(seed))
    assert int(fused.bn1.num_batches_tracked) == 4


def test_train_then_eval_uses_what_training_left() -> None:
    case = CASES["conv"]
    reference, fused = case.pair()
    compare(reference, fused, case.input())
    compare(reference.eval(), fused.eval(), case.input(5))
    compare(reference.train(), fused.train(), case.input(6))


def test_batch_norm_without_bias() -> None:
    """BatchNorm2d(bias=False) of torch 2.13."""
    case = CASES["conv"]
    reference, fused = case.pair()
    for block in (reference, fused):
        try:
            with_norms(bias=False)(block)
        except TypeError:
            pytest.skip("BatchNorm2d of this torch has no bias argument")
    compare(reference, fused, case.input())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_zero_gamma_of_bn3(mode: str) -> None:
    """The usual zero initialisation of a residual branch: out is relu(x), and it still learns."""
    case = CASES["identity"]
    reference, fused = case.pair()
    for block in (reference, fused):
        nn.init.zeros_(block.bn3.weight)
        nn.init.zeros_(block.bn3.bias)
        MODES[mode](block)
    x = case.input()
    compare(reference, fused, x)
    assert torch.equal(fused(x), x.relu())
    assert fused.bn3.weight.grad.any()


@pytest.mark.parametrize("mode", ["train", "all but downsample frozen"])
def test_only_x_without_grad(mode: str) -> None:
    """As the first block behind an input that needs no gradient."""
    case = CASES["conv, stride 2"]
    reference, fused = case.pair()
    x = case.input()
    results = []
    for block in (reference, fused):
        MODES[mode](block)
        out = block(x)
        out.backward(grad_like(out))
        results.append({n: p.grad for n, p in block.named_parameters()})
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-10, atol=1e-11)


def test_train_mode_under_no_grad_updates_statistics() -> None:
    case = CASES["conv, stride 2"]
    reference, fused = case.pair()
    x = case.input()
    with torch.no_grad():
        out, expected = fused(x), reference(x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for (name, buffer), want in zip(fused.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, want, rtol=1e-10, atol=1e-11, msg=name)


def test_stride_and_dilation_patched_after_construction() -> None:
    """Segmentation models change conv2 afterwards: geometry is read at every call."""
    case = Case(channels=6, stride=2, downsample="conv")
    reference, fused = case.pair()
    for block in (reference, fused):
        block.conv2.stride = (1, 1)
        block.conv2.dilation = block.conv2.padding = (2, 2)
        block.identity_downsample[0].stride = (1, 1)
    compare(reference, fused, case.input())


def test_hooks_inside_the_downsample_fire() -> None:
    """A shortcut that must be called as a module is; the rest is fused all the same."""
    case = replace(CASES["conv, stride 2"], bias=False)
    reference, fused = case.pair()
    seen: list[torch.Size] = []
    fused.identity_downsample[0].register_forward_hook(lambda m, a, out: seen.append(out.shape))
    compare(reference, fused, case.input())
    assert seen == [torch.Size([3, 16, 4, 3])]


# Memory formats.


def strided(x: Tensor) -> Tensor:
    """The values of x in memory where no dimension is dense."""
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": strided,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
    "channel slice": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("case", ["identity", "conv, stride 2", "pool"])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case: str, layout: str, weights: torch.memory_format) -> None:
    reference, fused = CASES[case].pair()
    for block in (reference, fused):
        block.to(memory_format=weights)
    x = LAYOUTS[layout](CASES[case].input())
    assert fused.why_not_fused(x) is None
    plain, ours = x.detach().requires_grad_(), x.detach().requires_grad_()
    expected, out = reference(plain), fused(ours)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    is_channels_last = torch.channels_last in (
        weights,
        torch.channels_last if layout == "channels_last" else torch.contiguous_format,
    )
    wanted = torch.channels_last if is_channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=wanted)
    for got, want in zip(
        torch.autograd.grad(out, [ours, *fused.parameters()], grad),
        torch.autograd.grad(expected, [plain, *reference.parameters()], grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_have_the_layout_of_their_leaf(layout: str, weights: torch.memory_format) -> None:
    case = CASES["conv, stride 2"]
    fused = case.module(FusedBottleneck).to(memory_format=weights)
    x = LAYOUTS[layout](case.input()).requires_grad_()
    fused(x).sum().backward()
    for name, tensor in [("x", x), *fused.named_parameters()]:
        assert tensor.grad.stride() == tensor.stride(), name


# Lower precision.

# Many channels, so that the errors of a tensor are many random numbers; few pixels, so that in
# float32 no ReLU flips on a rounding, which would swamp everything else.
PRECISION_CASES = {
    "identity": Case(channels=256, width=64, size=(4, 7, 6)),
    "conv, stride 2": Case(channels=64, width=64, stride=2, downsample="conv", size=(4, 13, 12)),
    "pool": Case(channels=64, width=64, stride=2, downsample="pool", size=(4, 13, 12)),
    "groups, dilation": Case(
        channels=256, width=64, size=(4, 7, 6), options={"groups": 4, "dilation": 2}
    ),
}
LOW_PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


# One after the other, so that `trials` computes what they are held against once for all of them.
over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)


@lru_cache(maxsize=1)
def trials(
    case: str, dtype: torch.dtype, mode: str, norm_dtype: torch.dtype | None = None
) -> list[Trial]:
    """Of several seeds; norm_dtype: the normalisations' where it is another."""
    found = []
    for seed in CRITERION_SEEDS[dtype]:
        pair = tuple(channels_last(in_dtype(b, dtype)) for b in PRECISION_CASES[case].pair(seed))
        for block in pair:
            MODES[mode](block)
            for norm in norms_of(block).values():
                norm.to(norm_dtype)
        x = PRECISION_CASES[case].input(seed + 100).to(dtype)
        found.append(trial(pair, channels_last(x)))
    return found


@pytest.mark.slow
@over_implementations
@pytest.mark.parametrize("mode", ["train", "eval", "bn2 frozen"])
@pytest.mark.parametrize("dtype", LOW_PRECISIONS, ids=str)
@pytest.mark.parametrize("case", PRECISION_CASES)
def test_error_is_not_above_eagers(case: str, dtype: torch.dtype, mode: str) -> None:
    assert_trials(trials(case, dtype, mode))


@pytest.mark.slow
@over_implementations
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_norms_with_half_convolutions(dtype: torch.dtype, mode: str) -> None:
    assert_trials(trials("conv, stride 2", dtype, mode, norm_dtype=torch.float32))


def test_fresh_network() -> None:
    """As constructed, without randomised parameters: what training starts from."""
    torch.manual_seed(0)
    reference = Bottleneck(8, 4, nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16)), 2)
    torch.manual_seed(0)
    fused = FusedBottleneck(8, 4, nn.Sequential(nn.Conv2d(8, 16, 1, 2), nn.BatchNorm2d(16)), 2)
    compare(reference.double(), fused.double(), torch.randn(4, 8, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("case", ["identity", "conv, stride 2"])
def test_with_two_threads(case: str, two_threads: None) -> None:
    shape = PRECISION_CASES[case]
    compare(*shape.pair(), shape.input())


@pytest.mark.slow
def test_float32_output_over_many_pixels() -> None:
    """Errors of sums over thousands of pixels: variances here are sums of products."""
    case = Case(channels=32, width=8, size=(8, 28, 27))
    fused_errors, eager_errors = [], []
    for seed in CRITERION_SEEDS[torch.float32]:
        pair = [channels_last(in_dtype(block, torch.float32)) for block in case.pair(seed)]
        x = channels_last(case.input(seed).float())
        want = run(in_dtype(pair[0], torch.float64), x.double())
        for block, rows in zip(pair, (eager_errors, fused_errors), strict=True):
            found = errors(run(block, x), want)
            # A ReLU that flips changes gradients by far more than roundings do; out it does not.
            rows.append({n: e for n, e in found.items() if not n.startswith("grad ")})
    assert_criterion(fused_errors, eager_errors, torch.float32, standard_errors=0)


def test_default_dtype_is_none_of_the_blocks_business() -> None:
    torch.set_default_dtype(torch.float64)
    block = FusedBottleneck(1024, 256, dtype=torch.float32)
    x = torch.randn(2, 1024, 2, 2, dtype=torch.float32, requires_grad=True)
    out = block(x)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == block.conv3.weight.grad.dtype == torch.float32
