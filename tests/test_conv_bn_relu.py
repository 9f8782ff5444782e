"""``FusedConvBNReLU`` and ``conv_bn_relu`` against the plain unit."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CRITERION_SEEDS,
    assert_criterion,
    assert_equal_float64,
    channels_last,
    errors,
    grad_like,
    in_dtype,
    randomise,
    run,
    zero_gradients,
)
from torch import Tensor, nn

from fused_bottleneck import BatchNorm, Conv, ConvBNReLU, FusedConvBNReLU, conv_bn_relu

pytestmark = pytest.mark.usefixtures("backend")

UNITS = {
    "1x1": (8, 6, {"kernel_size": 1}),
    "1x1, stride 2": (8, 6, {"kernel_size": 1, "stride": 2}),
    "1x1, padded": (8, 6, {"kernel_size": 1, "padding": 1}),
    "3x3": (8, 6, {"kernel_size": 3, "padding": 1}),
    "3x3, no padding, stride 3": (8, 6, {"kernel_size": 3, "stride": 3}),
    "3x3, no bias": (8, 6, {"kernel_size": 3, "padding": 1, "bias": False}),
    "3x3, strides 2 by 1": (8, 6, {"kernel_size": 3, "padding": 1, "stride": (2, 1)}),
    "stem": (3, 16, {"kernel_size": 7, "stride": 2, "padding": 3, "bias": False}),
    "1x5": (4, 6, {"kernel_size": (1, 5), "padding": (0, 2)}),
    "even kernel": (4, 6, {"kernel_size": (2, 4), "padding": 1}),
    "groups": (8, 12, {"kernel_size": 3, "padding": 1, "groups": 4}),
    "depthwise": (7, 7, {"kernel_size": 3, "padding": 1, "groups": 7}),
    "dilation": (8, 6, {"kernel_size": 3, "padding": 2, "dilation": 2}),
    "dilations 1 by 3": (8, 6, {"kernel_size": 3, "padding": (1, 3), "dilation": (1, 3)}),
    "one channel": (1, 1, {"kernel_size": 3}),
    "eps, momentum": (8, 6, {"kernel_size": 3, "eps": 1e-2, "momentum": 0.5}),
}
over_units = pytest.mark.parametrize("unit", UNITS)


def pair(unit: str, seed: int = 0) -> tuple[ConvBNReLU, FusedConvBNReLU]:
    c, w, options = UNITS[unit]
    torch.manual_seed(seed)
    plain = ConvBNReLU(c, w, **options).double()
    randomise(plain)
    fused = FusedConvBNReLU(c, w, **options).double()
    fused.load_state_dict(plain.state_dict(), strict=True)
    return plain, fused


def input_of(unit: str, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, UNITS[unit][0], 9, 8, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@over_units
def test_equals_the_plain_unit(unit: str, layout: torch.memory_format, training: bool) -> None:
    plain, fused = (m.train(training) for m in pair(unit))
    x = input_of(unit).contiguous(memory_format=layout)
    assert fused.why_not_fused(x) is None
    want, got = run(plain, x), run(fused, x)
    assert_equal_float64(got, want, zero_gradients(fused))
    if x.shape[1] > 1:
        assert got.out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_kinds_of_norm(options: dict[str, bool], momentum: float | None) -> None:
    plain, fused = pair("3x3")
    for module in (plain, fused):
        module.bn = nn.BatchNorm2d(6, momentum=momentum, **options).double()
    for seed in range(3):
        x = input_of("3x3", seed)
        assert fused.why_not_fused(x) is None
        assert_equal_float64(run(fused, x), run(plain, x), zero_gradients(fused))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("unit", ["1x1", "3x3", "stem", "groups"])
def test_error_is_not_above_eagers(unit: str, dtype: torch.dtype, training: bool) -> None:
    fused_errors, eager_errors = [], []
    for seed in CRITERION_SEEDS[dtype]:
        modules = [channels_last(in_dtype(m, dtype)).train(training) for m in pair(unit, seed)]
        x = channels_last(input_of(unit, seed + 9).to(dtype))
        want = run(in_dtype(modules[0], torch.float64), x.double())
        for module, rows in zip(modules, (eager_errors, fused_errors), strict=True):
            rows.append(errors(run(module, x), want, zero_gradients(module)))
    assert_criterion(fused_errors, eager_errors, dtype)


def test_memory_kept_for_backward() -> None:
    """The convolution's input and output, and vectors; not what the norm and the ReLU return."""
    _, fused = pair("3x3")
    x = input_of("3x3").requires_grad_()
    own = {p.untyped_storage().data_ptr() for p in fused.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused(x)
    y = 3 * 6 * 9 * 8
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert 8 * (x.numel() + y) <= total <= 8 * (x.numel() + y + 6 * 6)


def test_function_with_running_statistics() -> None:
    """As F.batch_norm: running statistics in place, ints or pairs for the geometry."""
    x, weight = input_of("3x3"), torch.randn(6, 8, 3, 3, dtype=torch.float64)
    ours = [torch.zeros(6).double(), torch.ones(6).double()]
    theirs = [t.clone() for t in ours]
    norm = BatchNorm(None, None, *ours, training=True, momentum=0.3, eps=1e-3)
    out = conv_bn_relu(x, Conv(weight, None, (2, 1), 1), norm)
    y = F.conv2d(x, weight, None, (2, 1), 1)
    want = F.batch_norm(y, *theirs, None, None, True, 0.3, 1e-3).relu()
    torch.testing.assert_close([out, *ours], [want, *theirs], rtol=1e-11, atol=1e-11)
    fixed = conv_bn_relu(x, Conv(weight, None, (2, 1), 1), norm._replace(training=False))
    want = F.batch_norm(y, *theirs, None, None, False, 0.3, 1e-3).relu()
    torch.testing.assert_close(fixed, want, rtol=1e-11, atol=1e-11)


def test_composed_where_children_changed() -> None:
    plain, fused = pair("3x3")
    seen: list[int] = []
    fused.bn.register_forward_hook(lambda *a: seen.append(1))
    x = input_of("3x3")
    assert "bn" in (fused.why_not_fused(x) or "")
    assert torch.equal(fused(x), plain(x))
    assert seen == [1]


def test_edit_before_backward_is_detected() -> None:
    _, fused = pair("3x3")
    for edited in (fused.conv.weight, fused.bn.weight):
        out = fused(input_of("3x3").requires_grad_())
        with torch.no_grad():
            edited.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_edit_of_the_output_is_allowed() -> None:
    plain, fused = pair("3x3")
    x, other = (input_of("3x3").requires_grad_() for _ in range(2))
    out, expected = fused(x), plain(other) * 3
    out.mul_(3)
    out.backward(grad_like(out))
    expected.backward(grad_like(expected))
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-10, atol=1e-10)
