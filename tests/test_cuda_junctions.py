"""The coefficient kernels and the junctions of the tail (csrc/cuda) against algebra.py in float64.

As the passes in test_cuda_passes.py: on a GPU where there is one, everywhere as C++ on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_ops import IMPLEMENTATIONS, ON_GPU, OnGpu, implementation, shifted, tensors_of
from tolerances import FLOAT32_PRODUCT, SAME_FORMULA
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_bottleneck import algebra, coefficients, extension, tail, units
from fused_bottleneck.algebra import accumulation_dtype
from fused_bottleneck.junctions import JunctionStages
from fused_bottleneck.operands import POINTWISE, StridedInput
from fused_bottleneck.stages import GradSums, Moments, Operand, Stages

pytestmark = pytest.mark.skipif(not extension.load(), reason=extension.reason())

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PARAMETERS = ["float32", "bfloat16", "float16", "float64", "none"]
EPS, COUNT = 1e-3, 100


@pytest.fixture(params=IMPLEMENTATIONS)
def ops(request: pytest.FixtureRequest) -> Any:
    return implementation(request.param)


class Junction:
    """Random arguments of the coefficient ops."""

    def __init__(self, dtype: torch.dtype, parameter: str, width: int, channels: int) -> None:
        self.dtype, self.acc = dtype, accumulation_dtype(dtype)
        self.parameter_dtype = None if parameter == "none" else getattr(torch, parameter)
        self.width, self.channels = width, channels
        self.generator = torch.Generator().manual_seed(width)

    def vector(self, size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64).to(self.acc)

    def positive(self, size: int) -> Tensor:
        return self.vector(size).abs() + 0.1

    def matrix(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def parameter(self, size: int) -> Tensor | None:
        found = self.vector(size)
        return None if self.parameter_dtype is None else found.to(self.parameter_dtype)

    def weight(self) -> Tensor:
        return self.matrix(self.width, self.channels).to(self.dtype)

    def cov(self, dtype: torch.dtype) -> Tensor:
        root = self.matrix(self.channels, self.channels)
        return (root @ root.t() / self.channels).to(dtype)

    def arguments(self, name: str) -> tuple[Any, ...]:
        w, k = self.width, self.channels
        if name == "bn_coefficients":
            parameters = [self.parameter(w) for _ in range(3)]
            return (self.vector(w), self.positive(w), *parameters, EPS)
        if name == "bn_backward_coefficients":
            return (self.positive(w), self.vector(w), self.vector(w), COUNT)
        if name == "folded_weight":
            return (self.weight(), self.parameter(w), self.positive(w))
        if name.startswith("fold_backward"):
            gamma, invstd, offset = self.parameter(w), self.positive(w), self.vector(w)
            batch = (self.vector(k), self.matrix(w, k).to(self.acc))
            known = (None, None) if name.endswith("fixed") else batch
            a, s, sum_g = self.weight(), self.matrix(w, k).to(self.acc), self.vector(w)
            vectors = (gamma, invstd, offset, self.vector(k))
            return (self.weight(), *vectors, *known, a, s, sum_g, COUNT)
        cov = self.cov(torch.float64 if name.endswith("float64") else self.acc)
        parameters = [self.parameter(w) for _ in range(3)]
        return (self.weight(), cov, *parameters, EPS, self.vector(k), self.vector(k))


JUNCTIONS = [*coefficients.KERNELS, "fold, float64", "fold_backward, fixed"]
# Width and channels: one and several tiles, cut short, whole, parts of a sum over the width.
SIZES = [(1, 1), (7, 3), (64, 16), (100, 133), (33, 300), (300, 48), (130, 80)]


def op_of(name: str) -> str:
    return name.split(",")[0]


def in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def expected(name: str, args: tuple[Any, ...], got: list[Tensor]) -> list[Tensor]:
    """The formulas in float64; those of a rounded matrix with the matrix as it was rounded."""
    wide = tuple(map(in_float64, args))
    want = tensors_of(getattr(coefficients, op_of(name))(*wide))
    if op_of(name) == "fold":
        beta, mean_d = wide[3], wide[7]
        want[3][2] = (0 if beta is None else beta) - got[0].double() @ mean_d
    elif name == "fold_backward":
        *_, mean_d, _, a, _, sum_g, count = wide
        want[3] = algebra.operand_shift(a, got[2].double(), sum_g, mean_d, count)
    return want


@pytest.mark.parametrize("parameter", PARAMETERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", JUNCTIONS)
def test_junction_agrees_with_the_algebra(
    name: str, dtype: torch.dtype, parameter: str, ops: Any
) -> None:
    for width, channels in SIZES if parameter == "float32" else SIZES[:3]:
        args = Junction(dtype, parameter, width, channels).arguments(name)
        got = tensors_of(getattr(ops, op_of(name))(*args))
        twin = tensors_of(getattr(coefficients, op_of(name))(*args))
        for mine, cpu, exact in zip(got, twin, expected(name, args, got), strict=True):
            assert (mine.dtype, mine.shape) == (cpu.dtype, cpu.shape)
            scale = float(exact.abs().max()) if exact.numel() else 1.0
            bound = SAME_FORMULA[mine.dtype] * scale
            torch.testing.assert_close(mine.double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:], ids=str)
def test_products_have_the_accuracy_of_float32(dtype: torch.dtype, ops: Any) -> None:
    """Of whichever dtype the weight is, for one covariance for all of them."""
    junction = Junction(torch.float32, "none", 70, 90)
    args = junction.arguments("fold")
    weight, cov = args[0].to(dtype), args[1]
    product = ops.fold(weight, *args[1:])[1]
    exact = weight.double() @ cov.double()
    bound = FLOAT32_PRODUCT * (weight.double().abs() @ cov.double().abs())
    assert ((product - exact).abs() <= bound).all()
    args = junction.arguments("fold_backward")
    b, shift = ops.fold_backward(*args)[2:]
    k = algebra.folded_factor(args[2], args[2], tensors_of(ops.fold_backward(*args))[1][0], COUNT)
    wide = args[0].double()
    exact = -wide.t() @ (k.double()[:, None] * wide)
    bound = FLOAT32_PRODUCT * (wide.abs().t() @ (k.double().abs()[:, None] * wide.abs()))
    assert ((b - exact).abs() <= bound).all()
    assert torch.equal(b, b.t())
    assert shift.isfinite().all()


def test_common_mode(ops: Any) -> None:
    """Channels that go together, which no row of the weight sees: in float64, and then rounded."""
    width, channels = 40, 64
    junction = Junction(torch.float32, "none", width, channels)
    args = list(junction.arguments("fold, float64"))
    args[0] = args[0] - args[0].mean(1, keepdim=True)
    args[1] = args[1] + 1e4
    got = ops.fold(*args)
    want = coefficients.fold(*map(in_float64, args))
    torch.testing.assert_close(got[2][1].double(), want[2][1], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=1e-5)


def test_fold_clamps_the_variance_and_lets_nan_through(ops: Any) -> None:
    weight, zeros = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2)
    cov = torch.diag(torch.tensor([-1e-3, 4.0]))
    _, _, (_, var), (invstd, _, _) = ops.fold(weight, cov, None, None, None, 1e-2, zeros, zeros)
    torch.testing.assert_close(var, torch.tensor([0.0, 4.0]))
    torch.testing.assert_close(invstd, (var + 1e-2).rsqrt())
    cov[0, 0] = float("nan")
    _, _, (_, var), (invstd, _, _) = ops.fold(weight, cov, None, None, None, 1e-2, zeros, zeros)
    assert var[0].isnan()
    assert invstd[0].isnan()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_gradients_stay_so(value: float, ops: Any) -> None:
    args = list(Junction(torch.float32, "float32", 70, 20).arguments("fold_backward"))
    args[8][3, 5] = value
    dweight, grads, b, shift = ops.fold_backward(*args)
    assert not dweight[3].isfinite().any()
    assert not grads[0, 3].isfinite()
    assert not b.isfinite().any()
    assert not shift.isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", JUNCTIONS)
def test_misaligned_matrices(name: str, dtype: torch.dtype, ops: Any) -> None:
    args = Junction(dtype, "none", 30, 40).arguments(name)
    moved = [shifted(v) if isinstance(v, Tensor) else v for v in args]
    call = getattr(ops, op_of(name))
    for mine, theirs in zip(tensors_of(call(*moved)), tensors_of(call(*args)), strict=True):
        assert torch.equal(mine, theirs)


WRONG: dict[str, tuple[str, int, Callable[[Tensor], Tensor], str]] = {
    "size": ("fold", 1, lambda t: t[:, :3].contiguous(), r"cov to be float32 \[4, 4\]"),
    "dtype": ("fold", 1, lambda t: t.half(), r"cov to be float32 \[4, 4\]"),
    "parameter": ("bn_coefficients", 2, lambda t: t.long(), "gamma to be float32, float64, bf"),
    "a": ("fold_backward", 7, lambda t: t.double(), r"a to be float32 \[5, 4\]"),
    "together": ("fold_backward", 5, lambda t: None, "mean_d and weight_cov to be given together"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_error_names_the_argument(wrong: str, ops: Any) -> None:
    name, place, change, message = WRONG[wrong]
    args = list(Junction(torch.float32, "float32", 5, 4).arguments(name))
    args[place] = change(args[place])
    with pytest.raises(RuntimeError, match=f"{name}: expected {message}"):
        getattr(ops, name)(*args)


@pytest.mark.parametrize("name", JUNCTIONS)
def test_opcheck_junction(name: str) -> None:
    args = Junction(torch.bfloat16, "bfloat16", 6, 4).arguments(name)
    torch.library.opcheck(getattr(torch.ops.fused_bottleneck, op_of(name)).default, args)


# A call of an op is a launch on CUDA: what a junction of a program calls is counted on the CPU.


class Calls(TorchDispatchMode):
    """The names of the operations in it that do work; views do none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.name().removeprefix("fused_bottleneck::"))
        return func(*args, **(kwargs or {}))


class Given(JunctionStages):
    """Stages with a gram that was taken elsewhere."""

    def __init__(self, mean_d: Tensor, cov: Tensor) -> None:
        self.given = mean_d, cov

    def gram(self, operand: Operand) -> tuple[Tensor, Tensor]:
        return self.given


def tail_unit(junction: Junction, bias: bool, batch: bool) -> units.Unit:
    w, k = junction.width, junction.channels
    gamma, beta = junction.parameter(w), junction.parameter(w)
    weight = junction.weight().view(w, k, 1, 1)
    given = junction.parameter(w) if bias else None
    return units.Unit(weight, gamma, beta, POINTWISE, batch, given, eps=EPS)


UNBIASED = ["aten::mul.Tensor"]  # the variance that the running statistics see


@pytest.mark.parametrize("cov_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_junction_forward_is_one_launch(bias: bool, cov_dtype: torch.dtype) -> None:
    junction = Junction(torch.bfloat16, "float32", 12, 8)
    unit = tail_unit(junction, bias, True)
    stages = Given(junction.vector(8), junction.cov(cov_dtype))
    operand = StridedInput(torch.empty(1, 8, 1, 1).bfloat16(), (1, 1), junction.vector(8))
    with Calls() as calls:
        result = tail._folded_forward(unit, stages, operand, pixels=2)
    assert calls.names == ["fold", *UNBIASED]
    assert len(result.reported) == 2


@pytest.mark.parametrize("batch", [False, True])
def test_a_junction_backward_is_one_launch(batch: bool) -> None:
    junction = Junction(torch.bfloat16, "float32", 12, 8)
    unit = tail_unit(junction, True, batch)
    _, _, *state, a, s, sum_g, count = junction.arguments("fold_backward")
    invstd, offset, centre, mean_d, weight_cov = state
    known = tail.TailState(invstd, offset, centre, *((mean_d, weight_cov) if batch else ()))
    stages = JunctionStages()
    with Calls() as calls:
        tail.operand_weight(unit, stages, known)
        tail.folded_backward(unit, stages, known, a, s, sum_g, count)
    assert calls.names == ["folded_weight", "fold_backward"]


def test_narrow_junctions_are_one_launch() -> None:
    junction = Junction(torch.bfloat16, "float32", 12, 8)
    unit = tail_unit(junction, True, True)
    stages, vectors = JunctionStages(), [junction.positive(12) for _ in range(4)]
    y = torch.empty(2, 12, 3, 3)
    with Calls() as calls:
        act, state, _ = units.batch_activation(stages, y, unit, Moments(*vectors[:2]), None)
        units.conv_grad(stages, unit, y, state, y, GradSums(*vectors[2:]), act.scale)
    assert calls.names == ["bn_coefficients", *UNBIASED, "bn_backward_coefficients"]


def test_without_the_library_the_stages_are_plain() -> None:
    """Of a class whose kernels are elsewhere, on a device that has no ops."""

    class Plain(JunctionStages):
        has_junctions = False

    weight, cov, *others = Junction(torch.float32, "float32", 12, 8).arguments("fold")
    with Calls() as calls:
        got = Plain().fold(weight, *others, cov)
    assert "fold" not in calls.names
    for mine, plain in zip(got[1:], Stages().fold(weight, *others, cov)[1:], strict=True):
        assert torch.equal(mine, plain)


# Only on a GPU.

TAIL = ["fold", "fold, float64", "fold_backward", "fold_backward, fixed"]
on_gpu_over_tail = pytest.mark.parametrize("name", [pytest.param(n, marks=ON_GPU) for n in TAIL])
# Of the four stages of ResNet-50, and its largest downsample.
STAGES = [(256, 64), (512, 128), (1024, 256), (2048, 512), (2048, 1024)]


def gpu_arguments(name: str, width: int, channels: int) -> list[Any]:
    args = Junction(torch.bfloat16, "float32", width, channels).arguments(name)
    return [v.cuda() if isinstance(v, Tensor) else v for v in args]


def gpu_call(name: str, args: list[Any]) -> list[Tensor]:
    return tensors_of(getattr(torch.ops.fused_bottleneck, op_of(name))(*args))


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("size", STAGES, ids=str)
@on_gpu_over_tail
def test_sizes_of_resnet50(name: str, size: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = Junction(dtype, "float32", *size).arguments(name)
        got = tensors_of(getattr(OnGpu(), op_of(name))(*args))
        for mine, exact in zip(got, expected(name, args, got), strict=True):
            bound = SAME_FORMULA[mine.dtype] * (float(exact.abs().max()) if exact.numel() else 1)
            torch.testing.assert_close(mine.double(), exact, rtol=0, atol=bound)


@on_gpu_over_tail
def test_one_kernel(name: str) -> None:
    args = gpu_arguments(name, 512, 128)
    gpu_call(name, args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gpu_call(name, args)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert [f"{op_of(name)}_kernel" in e.name for e in kernels] == [True], kernels


@on_gpu_over_tail
def test_graph_capture(name: str) -> None:
    args = gpu_arguments(name, 512, 128)
    expected = gpu_call(name, args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gpu_call(name, args)
    for _ in range(2):
        for t in got:
            t.zero_()
        graph.replay()
        assert_same(got, expected)


@on_gpu_over_tail
def test_streams_at_once(name: str) -> None:
    """Several launches under way do not meet in each other's barriers."""
    args = [gpu_arguments(name, 512 + 64 * i, 128) for i in range(4)]
    expected = [gpu_call(name, a) for a in args]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in args]
    for _ in range(20):
        got = []
        for stream, a in zip(streams, args, strict=True):
            with torch.cuda.stream(stream):
                got.append(gpu_call(name, a))
        torch.cuda.synchronize()
        for mine, theirs in zip(got, expected, strict=True):
            assert_same(mine, theirs)


@on_gpu_over_tail
def test_runs_on_the_current_stream(name: str) -> None:
    args = gpu_arguments(name, 512, 128)
    expected = gpu_call(name, args)
    weight = args[0].clone()
    args[0].zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # who does not wait for this stream reads the zeros
        args[0].copy_(weight)
        got = gpu_call(name, args)
    stream.synchronize()
    assert_same(got, expected)
