"""The folds of the CPU's products (csrc/cpu/fold.cpp) against the formulas of algebra.py.

The criterion is that of the products: an output's error against float64 may be that of the same
formulas in torch's float32 times EAGER_FACTOR, plus the floor.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_criterion, relative_error
from op_helpers import LEVELS, assert_fence, fenced, run_child, unwritten
from torch import Tensor

from fused_bottleneck import algebra, extension
from fused_bottleneck.cpu_products import CpuProductStages
from fused_bottleneck.operands import StridedInput

pytestmark = pytest.mark.skipif(
    not extension.has_products(), reason=extension.reason() or "no products for this CPU"
)
ops = torch.ops.fused_bottleneck

# Rows and channels of the weight: in the tails of every tiling and blocking, and one of each way.
SHAPES = [(1, 16), (7, 48), (64, 16), (65, 80), (256, 64), (100, 528), (1000, 144)]
COUNT = 700
EPS = 1e-5
FORWARD = ["folded", "mean", "var", "invstd", "offset", "shift"]
BACKWARD = ["s", "dgamma", "b", "shift"]
Arguments = dict[str, Tensor | None]


def forward_arguments(shape: tuple[int, int], seed: int = 0, affine: bool = True) -> Arguments:
    """Of an operand whose channels go together in part, in the schema's order."""
    rows, channels = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    d = (randn(COUNT, channels) @ (torch.eye(channels) + 0.3 * randn(channels, channels))).double()
    cov = (d - d.mean(0)).t() @ (d - d.mean(0)) / COUNT
    weight = randn(rows, channels) / channels**0.5
    optional = [randn(rows) if affine else None for _ in range(3)]
    return {
        "weight": weight,
        "weight_cov": (weight.double() @ cov).float(),
        "cov": cov.float(),
        **dict(zip(["gamma", "beta", "bias"], optional, strict=True)),
        "centre": randn(channels),
        "mean_d": d.mean(0).float(),
    }


def backward_arguments(shape: tuple[int, int], seed: int = 0, affine: bool = True) -> Arguments:
    """In the schema's order, but count and workspace."""
    args = forward_arguments(shape, seed, affine)
    rows, channels = shape
    generator = torch.Generator().manual_seed(seed + 1)
    invstd = torch.rand(rows, generator=generator) + 0.5
    scale = invstd if args["gamma"] is None else args["gamma"] * invstd
    return {
        "weight": args["weight"],
        "gamma": args["gamma"],
        "invstd": invstd,
        "offset": torch.randn(rows, generator=generator),
        "mean_d": args["mean_d"],
        "weight_cov": args["weight_cov"],
        "a": scale[:, None] * args["weight"],
        "s": COUNT**0.5 * torch.randn(rows, channels, generator=generator),
        "sum_g": COUNT**0.5 * torch.randn(rows, generator=generator),
    }


def fenced_all(args: Arguments) -> Arguments:
    return {name: None if t is None else fenced(t) for name, t in args.items()}


def call_forward(args: Arguments) -> dict[str, Tensor]:
    own = fenced_all(args)
    *results, cancellation = ops.fold_product(**own, eps=EPS)
    for name, t in own.items():
        torch.testing.assert_close(t, args[name], rtol=0, atol=0, equal_nan=True)
    return dict(zip(FORWARD, results, strict=True)) | {"cancellation": cancellation}


def call_backward(args: Arguments) -> dict[str, Tensor]:
    own = fenced_all(args)
    size = ops.product_workspace(*args["weight"].shape, args["weight"].shape[1])
    workspace = fenced(unwritten(torch.empty(size, dtype=torch.uint8)))
    results = ops.fold_backward_(**own, count=COUNT, workspace=workspace)
    assert_fence(workspace)
    for name, t in own.items():
        if t is not None:
            assert_fence(t)
            assert name == "s" or torch.equal(t, args[name]), name
    return dict(zip(BACKWARD, [own["s"], *results], strict=True))


def forward_formula(args: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
    a = {name: None if t is None else t.to(dtype) for name, t in args.items() if name != "cov"}
    folded, *rest = algebra.fold_product(
        a["weight"],
        a["weight_cov"],
        *(a[name] for name in ("gamma", "beta", "bias")),
        EPS,
        a["centre"],
        a["mean_d"],
        dtype,
    )
    mean, var, invstd, offset, _ = rest
    values = [folded.weight, mean, var, invstd, offset, folded.shift]
    return dict(zip(FORWARD, values, strict=True))


def backward_formula(args: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
    a = {name: None if t is None else t.to(dtype) for name, t in args.items()}
    centre = torch.zeros_like(a["mean_d"])
    names = "mean_d", "weight_cov", "a", "s", "sum_g"
    state = a["gamma"], a["invstd"], a["offset"], centre, *(a[name] for name in names)
    dweight, dgamma, dbias, (_, b, shift) = algebra.fold_backward(a["weight"], *state, COUNT)
    assert not dbias.any()
    return dict(zip(BACKWARD, [dweight, dgamma, b, shift], strict=True))


Formula = Callable[[Arguments, torch.dtype], dict[str, Tensor]]
WAYS: dict[str, tuple[Callable[..., Arguments], Callable[..., dict[str, Tensor]], Formula]] = {
    "forward": (forward_arguments, call_forward, forward_formula),
    "backward": (backward_arguments, call_backward, backward_formula),
}
both_ways = pytest.mark.parametrize("way", WAYS)


@both_ways
@pytest.mark.parametrize("affine", [True, False])
def test_error_is_that_of_the_formulas(way: str, affine: bool) -> None:
    arguments, call, formula = WAYS[way]
    for shape in SHAPES:
        found: list[list[dict[str, float]]] = [[], []]
        for seed in range(3):
            args = arguments(shape, seed, affine)
            expected = formula(args, torch.float64)
            for rows, outputs in zip(
                found, (call(args), formula(args, torch.float32)), strict=True
            ):
                rows.append({n: relative_error(outputs[n], expected[n]) for n in expected})
        assert_criterion(*found, torch.float32)


@both_ways
def test_one_and_two_threads_agree(way: str) -> None:
    arguments, call, _ = WAYS[way]
    expected = call(arguments((1000, 144)))
    torch.set_num_threads(2)
    outputs = call(arguments((1000, 144)))
    torch.set_num_threads(1)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)


def test_variance_is_no_less_than_zero() -> None:
    """What rounding makes of a constant output; its cancellation is infinite. A NaN stays one."""
    args = forward_arguments((3, 16))
    args["weight_cov"][0] = -1e-9 * args["weight"][0]
    args["weight_cov"][2, 3] = float("nan")
    outputs = call_forward(args)
    assert outputs["var"][0] == 0
    assert outputs["invstd"][0].item() == pytest.approx(EPS**-0.5)
    assert outputs["var"][2].isnan()
    assert outputs["cancellation"] == float("inf")


def test_cancellation() -> None:
    """Of two outputs with the sum and the difference of channels that go together."""
    args = forward_arguments((2, 16))
    weight, cov = torch.zeros(2, 16), torch.eye(16)
    cov[0, 1] = cov[1, 0] = 0.75
    weight[:, 0], weight[:, 1] = 1, torch.tensor([1.0, -1.0])
    args |= {"weight": weight, "cov": cov, "weight_cov": weight @ cov}
    outputs = call_forward(args)
    assert outputs["var"].tolist() == [3.5, 0.5]
    assert outputs["cancellation"].item() == 4
    args["weight"] = weight[:1]
    first = {
        n: t if t is None or n in ("cov", "centre", "mean_d") else t[:1] for n, t in args.items()
    }
    assert call_forward(first)["cancellation"].item() == 2 / 3.5


@both_ways
def test_opcheck(way: str) -> None:
    arguments, _, _ = WAYS[way]
    args = [*arguments((5, 16)).values()]
    if way == "forward":
        args = [*args[:6], EPS, *args[6:]]
    else:
        args += [COUNT, torch.empty(ops.product_workspace(5, 16, 16), dtype=torch.uint8)]
    op = ops.fold_product if way == "forward" else ops.fold_backward_
    torch.library.opcheck(op.default, tuple(args))


ERRORS: list[tuple[str, str, Callable[[Tensor], Tensor], str]] = [
    ("forward", "weight", lambda t: t.double(), r"weight to be float32 \[7, C\].*got float64"),
    ("forward", "weight", lambda t: t[:, :24].clone(), "weight to be .*multiple of 16"),
    ("forward", "weight", lambda t: t[0], "weight to be float32"),
    ("forward", "weight_cov", lambda t: t[1:], r"weight_cov to be float32 \[7, 48\].*\[6, 48\]"),
    ("forward", "cov", lambda t: t.double(), r"cov to be float32 \[48, 48\].*got float64"),
    ("forward", "gamma", lambda t: t.double(), r"gamma to be float32 \[7\].*got float64"),
    ("forward", "bias", lambda t: t[1:], r"bias to be float32 \[7\].*got float32 \[6\]"),
    ("forward", "centre", lambda t: t[::2], r"centre to be float32 \[48\].*\[24\]"),
    ("forward", "mean_d", lambda t: t.double(), r"mean_d to be float32 \[48\].*got float64"),
    ("backward", "a", lambda t: t[1:], r"a to be float32 \[7, 48\].*got float32 \[6, 48\]"),
    ("backward", "s", lambda t: t.mT.contiguous().mT, "s to be .*not contiguous"),
    ("backward", "sum_g", lambda t: t[1:], r"sum_g to be float32 \[7\].*got float32 \[6\]"),
    ("backward", "offset", lambda t: t.half(), r"offset to be float32 \[7\].*got float16"),
]


@pytest.mark.parametrize(("way", "name", "change", "message"), ERRORS)
def test_error_names_the_argument(
    way: str, name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    args: dict[str, object] = {**WAYS[way][0]((7, 48))}
    args[name] = change(args[name])
    if way == "forward":
        args["eps"] = EPS
    else:
        size = ops.product_workspace(7, 48, 48)
        args |= {"count": COUNT, "workspace": torch.empty(size, dtype=torch.uint8)}
    op = ops.fold_product if way == "forward" else ops.fold_backward_
    with pytest.raises(RuntimeError, match=f"fold_(product|backward_): expected {message}"):
        op(**args)


def test_backward_refuses_what_it_would_overwrite() -> None:
    args = backward_arguments((7, 48))
    workspace = torch.empty(ops.product_workspace(7, 48, 48), dtype=torch.uint8)
    for name in ("weight", "a", "weight_cov"):
        with pytest.raises(RuntimeError, match=f"expected s to be separate from {name}"):
            ops.fold_backward_(**args | {"s": args[name]}, count=COUNT, workspace=workspace)
    with pytest.raises(RuntimeError, match="workspace to have at least"):
        ops.fold_backward_(**args, count=COUNT, workspace=workspace[1:])
    with pytest.raises(RuntimeError, match="expected count to be positive, got 0"):
        ops.fold_backward_(**args, count=0, workspace=workspace)


def all_outputs() -> dict[str, Tensor]:
    """By way and name, and which instruction set made them."""
    outputs = {
        f"{way} {name}": t
        for way, (arguments, call, _) in WAYS.items()
        for name, t in call(arguments((65, 80))).items()
    }
    return outputs | {"capability": torch.tensor(LEVELS.index(ops.cpu_capability()))}


def test_instruction_sets_agree(tmp_path: Path) -> None:
    code = "import sys, torch, test_fold; torch.save(test_fold.all_outputs(), sys.argv[1])"
    child = run_child(code, str(tmp_path / "avx2"), FUSED_BOTTLENECK_CPU_CAPABILITY="avx2")
    assert child.returncode == 0, child.stderr
    found, expected = torch.load(tmp_path / "avx2"), all_outputs()
    assert found.pop("capability") == LEVELS.index("avx2")
    expected.pop("capability")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    not extension.has_products(torch.bfloat16), reason="no bfloat16 products for this CPU"
)
def test_shifts_are_of_the_rounded_weights() -> None:
    """In bfloat16: the output's mean is then beta, and the operand's gradient sums to zero."""
    width, channels, count = 96, 32, 3000
    weight = torch.randn(width, channels, 1, 1).bfloat16()
    gamma, beta, sum_g = torch.rand(3, width) + 0.5
    s, d = torch.randn(width, channels), torch.randn(1, channels, count, 1).bfloat16()
    d = d.contiguous(memory_format=torch.channels_last)
    centre = torch.rand(channels)
    with CpuProductStages() as stages:
        mean_d, cov = stages.gram(StridedInput(d, (1, 1), centre))
        forward = stages.fold(weight, gamma, beta, None, 1e-5, centre, mean_d, cov)
        folded, shift = forward.folded
        mean_d = mean_d.float()
        expected = beta - folded.float() @ mean_d
        torch.testing.assert_close(shift, expected, rtol=1e-5, atol=1e-5)
        assert folded.dtype == torch.bfloat16
        state = forward.invstd, forward.offset, centre, mean_d, forward.weight_cov
        grads = stages.fold_backward(weight, gamma, *state, folded, s, sum_g, count)
    a, b, shift = grads.coefficients
    assert b.dtype == torch.bfloat16
    expected = algebra.operand_shift(a, b, sum_g, mean_d, count)
    torch.testing.assert_close(shift, expected, rtol=1e-5, atol=1e-6)
