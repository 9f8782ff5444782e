"""Autograd: numerical gradients, second order, what is saved, and what may be edited in between."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from helpers import (
    CRITERION_SEEDS,
    Case,
    assert_criterion,
    assert_equal_float64,
    errors,
    grad_like,
    in_dtype,
    leaf,
    run,
    zero_gradients,
)
from tolerances import SAVED_MEMORY_RATIO, SAVED_VECTORS_PER_UNIT
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fused_bottleneck import BatchNorm, Conv, FusedBottleneck, bottleneck, conv_bn_relu, rules

pytestmark = pytest.mark.usefixtures("implementation")

IDENTITY = Case(size=(2, 5, 4))
DOWNSAMPLE = Case(channels=6, stride=2, downsample="conv", size=(2, 7, 6))
POOL = Case(channels=6, stride=2, downsample="pool", size=(2, 7, 6))
CASES = {"identity": IDENTITY, "downsample": DOWNSAMPLE, "pool": POOL}
over_cases = pytest.mark.parametrize("case", CASES)


# Numerical derivatives of the functional interface, with every tensor an input.


def unit_tensors(w: int, c: int, kernel: int, bias: bool = True) -> list[Tensor]:
    """weight, bias, gamma, beta, in float64 with gradient."""
    shapes = [(w, c, kernel, kernel), (w,), (w,), (w,)]
    tensors = [torch.randn(s, dtype=torch.float64).mul_(0.6) for s in shapes]
    tensors[2].add_(1)
    return [t.requires_grad_() for t in tensors]


def norm_of(gamma: Tensor, beta: Tensor, training: bool) -> BatchNorm:
    """Batch statistics, or fixed ones that are not trivial."""
    if training:
        return BatchNorm(gamma, beta)
    mean = torch.linspace(-0.5, 0.5, len(gamma), dtype=torch.float64)
    return BatchNorm(gamma, beta, mean, mean.exp(), training=False)


Function = tuple[Callable[..., Tensor], list[Tensor]]


def block_function(residual: str, frozen: str, groups: int = 1) -> Function:
    """bottleneck as a function of all its tensors; frozen: digits of units with fixed statistics,
    0 the downsample."""
    stride = 1 if residual == "identity" else 2
    c, m, w = (4, 2, 4) if residual == "identity" else (3, 2, 5)
    x = torch.randn(2, c, 3, 4, dtype=torch.float64, requires_grad=True)
    tensors = [
        x,
        *unit_tensors(m, c, 1),
        *unit_tensors(m, m // groups, 3),
        *unit_tensors(w, m, 1),
    ]
    if residual == "downsample":
        tensors += unit_tensors(w, c, 1)
    if residual == "shortcut":
        tensors.append(torch.randn(2, w, 2, 2, dtype=torch.float64, requires_grad=True))

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        u1, u2, u3, r = rest[:4], rest[4:8], rest[8:12], rest[12:]
        return bottleneck(
            x,
            Conv(u1[0], u1[1]),
            norm_of(u1[2], u1[3], "1" not in frozen),
            Conv(u2[0], u2[1], stride, 1, groups=groups),
            norm_of(u2[2], u2[3], "2" not in frozen),
            Conv(u3[0], u3[1]),
            norm_of(u3[2], u3[3], "3" not in frozen),
            downsample=(Conv(r[0], r[1], stride), norm_of(r[2], r[3], "0" not in frozen))
            if residual == "downsample"
            else None,
            shortcut=r[0] if residual == "shortcut" else None,
        )

    return function, tensors


def unit_function(kernel: int, stride: int, training: bool, groups: int = 1) -> Function:
    """conv_bn_relu as a function of all its tensors."""
    c, w = 4, 6
    x = torch.randn(2, c, 5, 4, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        conv = Conv(weight, bias, stride, kernel // 2, groups=groups)
        return conv_bn_relu(x, conv, norm_of(gamma, beta, training))

    return function, [x, *unit_tensors(w, c // groups, kernel)]


FUNCTIONS: dict[str, Callable[[], Function]] = {
    "identity": lambda: block_function("identity", ""),
    "identity, frozen": lambda: block_function("identity", "123"),
    "identity, bn3 frozen": lambda: block_function("identity", "3"),
    "identity, groups": lambda: block_function("identity", "", groups=2),
    "downsample": lambda: block_function("downsample", ""),
    "downsample, frozen": lambda: block_function("downsample", "0123"),
    "downsample, bn1, bn2 frozen": lambda: block_function("downsample", "12"),
    "downsample, its bn frozen": lambda: block_function("downsample", "0"),
    "shortcut": lambda: block_function("shortcut", ""),
    "shortcut, bn2 frozen": lambda: block_function("shortcut", "2"),
    "unit 1x1": lambda: unit_function(1, 1, True),
    "unit 3x3, stride 2": lambda: unit_function(3, 2, True),
    "unit 3x3, frozen": lambda: unit_function(3, 1, False),
    "unit 3x3, groups": lambda: unit_function(3, 1, True, groups=2),
}
over_functions = pytest.mark.parametrize("function", FUNCTIONS)


@over_functions
def test_gradcheck(function: str) -> None:
    f, tensors = FUNCTIONS[function]()
    assert gradcheck(f, tensors, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["identity", "downsample", "unit 3x3, stride 2"])
def test_gradcheck_every_element(function: str) -> None:
    f, tensors = FUNCTIONS[function]()
    assert gradcheck(f, tensors)


@pytest.mark.slow
@over_functions
@pytest.mark.parametrize("biases", [False, True], ids=["without conv biases", "with conv biases"])
def test_gradgradcheck(biases: bool, function: str) -> None:
    """nn passes with biases too: their zero gradients are part of the graph."""
    f, tensors = FUNCTIONS[function]()
    for i in range(2, len(tensors), 4):
        if tensors[i].dim() == 1:
            tensors[i].requires_grad_(biases)
    assert gradgradcheck(f, tensors, fast_mode=True)


@over_cases
def test_gradient_penalty(case: str) -> None:
    """create_graph: a loss on the gradient itself, against the plain block."""
    results = []
    for block in CASES[case].pair():
        x = leaf(CASES[case].input())
        out = block(x)
        (grad_x,) = torch.autograd.grad(out, x, grad_like(out), create_graph=True)
        tracked = int(block.bn1.num_batches_tracked)
        (grad_x.square().sum() + out.sum()).backward()
        assert int(block.bn1.num_batches_tracked) == tracked == 1
        grads = {n: p.grad for n, p in block.named_parameters()} | {"x": x.grad}
        results.append(grads | dict(block.named_buffers()))
    for name, want in results[0].items():
        torch.testing.assert_close(results[1][name], want, rtol=1e-9, atol=1e-9, msg=name)


# Which gradients are asked for.


@pytest.mark.parametrize("function", ["identity", "downsample", "shortcut, bn2 frozen", "unit 1x1"])
def test_each_gradient_alone(function: str) -> None:
    """needs_input_grad: one gradient without the others is the same gradient."""
    f, tensors = FUNCTIONS[function]()
    out = f(*tensors)
    grad = grad_like(out)
    everything = torch.autograd.grad(out, tensors, grad)
    for i, want in enumerate(everything):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        (got,) = torch.autograd.grad(f(*alone), alone[i], grad)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=f"input {i}")


@pytest.mark.parametrize("function", ["identity", "downsample", "unit 1x1"])
def test_each_gradient_left_out(function: str) -> None:
    f, tensors = FUNCTIONS[function]()
    out = f(*tensors)
    grad = grad_like(out)
    everything = torch.autograd.grad(out, tensors, grad)
    for i in range(len(tensors)):
        others = [t.detach().requires_grad_(i != j) for j, t in enumerate(tensors)]
        f(*others).backward(grad)
        assert others[i].grad is None
        for j, want in enumerate(everything):
            if i != j:
                torch.testing.assert_close(others[j].grad, want, rtol=1e-12, atol=1e-12)


# The layout of what comes in.

GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda g: g.contiguous(),
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "transposed": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda g: torch.stack([g, -g], -1)[..., 0],
    "channel slice": lambda g: torch.cat([g, -g], 1)[:, : g.shape[1]],
    "scalar expanded": lambda g: g.new_tensor(0.7).expand_as(g),
    "one pixel expanded": lambda g: g[:, :, :1, :1].expand_as(g),
    "one channel expanded": lambda g: g[:, :1].expand_as(g),
}


@over_cases
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("layout", GRADIENTS)
def test_layout_of_grad_out(layout: str, memory_format: torch.memory_format, case: str) -> None:
    reference, fused = CASES[case].pair()
    x = CASES[case].input().contiguous(memory_format=memory_format)
    grad = GRADIENTS[layout](grad_like(reference(x)))
    reference.load_state_dict(fused.state_dict())
    noise = {"identity_downsample.1.bias"} if case == "pool" else set()
    want = run(reference, x, grad)
    assert_equal_float64(run(fused, x, grad), want, zero_gradients(fused), noise)


@pytest.mark.parametrize("layout", GRADIENTS)
def test_layout_of_grad_out_of_the_unit(layout: str) -> None:
    f, tensors = FUNCTIONS["unit 3x3, stride 2"]()
    out = f(*tensors)
    grad = GRADIENTS[layout](grad_like(out))
    want = torch.autograd.grad(out, tensors, grad.clone(memory_format=torch.contiguous_format))
    got = torch.autograd.grad(f(*tensors), tensors, grad)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_grad_out_is_left_alone() -> None:
    """The incoming gradient belongs to the caller."""
    fused = DOWNSAMPLE.module(FusedBottleneck)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out = fused(leaf(DOWNSAMPLE.input().contiguous(memory_format=memory_format)))
        grad = grad_like(out).contiguous(memory_format=memory_format)
        before = grad.clone()
        out.backward(grad)
        assert torch.equal(grad, before)


# Edits between forward and backward.


@over_cases
@pytest.mark.parametrize("edited", ["x", "conv1", "conv2", "conv3", "bn1", "bn2", "bn3"])
def test_edit_before_backward_is_detected(edited: str, case: str) -> None:
    """The same error as nn's, for x and for every weight."""
    for block in CASES[case].pair():
        x = leaf(CASES[case].input()) * 1
        out = block(x)
        with torch.no_grad():
            (x if edited == "x" else block.get_submodule(edited).weight).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("edited", [0, 1])
def test_edit_of_the_downsample_is_detected(edited: int) -> None:
    for block in DOWNSAMPLE.pair():
        out = block(leaf(DOWNSAMPLE.input()))
        with torch.no_grad():
            block.identity_downsample[edited].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("edited", ["conv1", "conv2", "conv3", "bn1", "bn2", "bn3"])
def test_edit_of_a_bias_is_never_silent(edited: str) -> None:
    """nn does not need biases in backward: either an error or the right gradient."""
    fused = IDENTITY.module(FusedBottleneck)
    x = IDENTITY.input()
    want = run(fused, x)
    fused.zero_grad()
    ours = leaf(x)
    out = fused(ours)
    with torch.no_grad():
        fused.get_submodule(edited).bias.add_(3)
    error = ""
    try:
        out.backward(grad_like(out))
    except RuntimeError as raised:
        error = str(raised)
    right = ours.grad is not None and torch.allclose(ours.grad, want.grads["x"], rtol=1e-12)
    assert right or "modified by an inplace operation" in error


@over_cases
def test_edit_of_the_output_is_allowed(case: str) -> None:
    """A mask is saved, not the output."""
    reference, fused = CASES[case].pair()
    expected_x, x = leaf(CASES[case].input()), leaf(CASES[case].input())
    expected = reference(expected_x) * 2 - 5
    out = fused(x)
    out.mul_(2).sub_(5)
    expected.backward(grad_like(expected))
    out.backward(grad_like(out))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=1e-10, atol=1e-10)
    for ours, plain in zip(fused.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["identity", "downsample"])
def test_eval_forward_train_forward_backward(case: str) -> None:
    """The eval graph holds what the statistics were then, not the buffers."""
    fused = CASES[case].module(FusedBottleneck)
    x = CASES[case].input()
    want = run(fused.eval(), x)
    fused.zero_grad()
    ours = leaf(x)
    out = fused(ours)
    fused.train()(CASES[case].input(9))
    out.backward(grad_like(out))
    assert torch.equal(ours.grad, want.grads["x"])
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter.grad, want.grads[name], rtol=1e-12, atol=1e-12)


# Several passes through one graph or one module.


@over_cases
def test_two_backward_passes(case: str) -> None:
    fused = CASES[case].module(FusedBottleneck)
    x = leaf(CASES[case].input())
    out = fused(x)
    inputs = [x, *fused.parameters()]
    first = torch.autograd.grad(out, inputs, grad_like(out), retain_graph=True)
    other = torch.autograd.grad(out, inputs, grad_like(out, 5), retain_graph=True)
    again = torch.autograd.grad(out, inputs, grad_like(out))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], other[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs, grad_like(out))


def test_one_module_used_twice() -> None:
    results = []
    for block in IDENTITY.pair():
        x = leaf(IDENTITY.input())
        out = block(block(x) - 0.3)
        out.backward(grad_like(out))
        results.append([out, x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_graphs_that_overlap() -> None:
    """Backward passes in another order than the forward passes."""
    fused = DOWNSAMPLE.module(FusedBottleneck)
    inputs = [leaf(DOWNSAMPLE.input(seed)) for seed in range(3)]
    want = [run(fused, x).grads["x"] for x in inputs]
    outs = [fused(x) for x in inputs]
    for i in (1, 0, 2):
        outs[i].backward(grad_like(outs[i]))
        assert torch.equal(inputs[i].grad, want[i])


@over_cases
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(case: str, reentrant: bool) -> None:
    """Gradients as without it; statistics updated twice, as nn's are."""
    results = []
    for block in CASES[case].pair():
        x = leaf(CASES[case].input())
        out = checkpoint(block, x, use_reentrant=reentrant)
        out.backward(grad_like(out))
        assert int(block.bn1.num_batches_tracked) == 2
        results.append([out, x.grad, *(p.grad for p in block.parameters()), *block.buffers()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


# Modes.


@over_cases
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode: type, training: bool, case: str) -> None:
    fused = CASES[case].module(FusedBottleneck).train(training)
    other = CASES[case].module(FusedBottleneck).train(training)
    x = CASES[case].input()
    want = fused(x)
    with mode():
        out = other(x)
    assert not out.requires_grad
    assert torch.equal(out, want)
    for ours, theirs in zip(other.buffers(), fused.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["identity", "downsample", "pool"])
def test_autocast(case: str, training: bool) -> None:
    """Convolutions in bfloat16, parameters and their gradients in float32."""
    fused_errors, eager_errors = [], []
    shape = Case(channels=256, width=64, size=(4, 7, 6))
    if case != "identity":
        shape = Case(64, 64, 2, {"downsample": "conv"}.get(case, case), size=(4, 13, 12))
    for seed in CRITERION_SEEDS[torch.bfloat16]:
        pair = [in_dtype(block, torch.float32).train(training) for block in shape.pair(seed)]
        x = shape.input(seed + 50).float()
        want = run(in_dtype(pair[0], torch.float64), x.double())
        outs = []
        for block, rows in zip(pair, (eager_errors, fused_errors), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                if block is pair[1]:
                    assert block.why_not_fused(x) is None
                got = run(block, x)
            assert {g.dtype for g in got.grads.values()} == {torch.float32}
            outs.append(got.out.dtype)
            noise = {"identity_downsample.1.bias"} if case == "pool" else set()
            rows.append(errors(got, want, zero_gradients(block) | noise))
        assert outs[0] == outs[1]
    assert_criterion(fused_errors, eager_errors, torch.bfloat16)


def test_autocast_disabled_inside() -> None:
    fused = in_dtype(IDENTITY.module(FusedBottleneck), torch.float32)
    other = in_dtype(IDENTITY.module(FusedBottleneck), torch.float32)
    x = IDENTITY.input().float()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        out = other(x)
    assert torch.equal(out, fused(x))


# Memory kept for backward.


def saved_bytes(block: torch.nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that a forward saves, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        keep.append(t)  # a storage freed and used again would not be a distinct one
        return t

    keep: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return sum(saved.values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["identity", "downsample", "stride 2"])
def test_memory_kept_for_backward(
    case: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    training: bool,
    implementation: str,
) -> None:
    """x + y1 + y2 + one bit per output element + small statistics, and in the product way images of
    an output; at most 0.55 of the plain's."""
    n, h, w, m = 6, 28, 26, 16  # pixels enough for the gram way
    stride = 2 if case == "stride 2" else 1
    c = 32 if case == "stride 2" else 64 if case == "identity" else 16
    shape = Case(c, m, stride, "identity" if case == "identity" else "conv", size=(n, h, w))
    reference, fused = (in_dtype(b, dtype).train(training) for b in shape.pair())
    x = leaf(shape.input().to(dtype).contiguous(memory_format=memory_format))
    item, p, q = x.element_size(), n * h * w, n * (h // stride) * (w // stride)
    tensors = (p * c + p * m + q * m) * item + q * 4 * m // 8
    widths = [m, m, 4 * m] + ([] if case == "identity" else [4 * m])
    vectors = 4 * SAVED_VECTORS_PER_UNIT * sum(widths)
    operands = [m] if case == "identity" else [m, c]
    matrices = sum(4 * k * k + 4 * 4 * m * k for k in operands)
    kept = saved_bytes(fused, x)
    assert tensors <= kept
    if implementation != "product" or not training:
        assert kept <= tensors + vectors + matrices
    assert kept <= SAVED_MEMORY_RATIO * saved_bytes(reference, x)


@pytest.mark.parametrize("case", ["identity", "downsample"])
def test_kept_images_make_no_difference(
    case: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, those that there is room for, and all: what is kept is what would be computed again."""
    if implementation != "product":
        pytest.skip("keeps no images")
    shape = Case(16, 16, 2, "conv") if case == "downsample" else Case(64, 16)
    fused, x = shape.module(FusedBottleneck).float(), shape.input().float()
    found = []
    for percent in (0, 55, 1000):
        monkeypatch.setattr(rules, "_MOST_KEPT_PERCENT", percent)
        fused.zero_grad()
        source = leaf(x)
        for _ in range(2):  # the kept images are there for another backward
            out = fused(source)
            out.square().sum().backward(retain_graph=True)
            out.square().sum().backward()
        found.append([source.grad, *(p.grad for p in fused.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, contextlib.nullcontext])
def test_nothing_is_kept_where_nothing_needs_a_gradient(mode: type) -> None:
    fused = DOWNSAMPLE.module(FusedBottleneck).requires_grad_(mode is torch.no_grad)
    with mode():
        assert saved_bytes(fused, DOWNSAMPLE.input()) == 0
