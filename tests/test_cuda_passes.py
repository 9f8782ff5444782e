"""The CUDA passes and coefficient kernels (csrc/cuda) against the oracles of the CPU ones.

Every test runs twice: on a GPU where there is one, and everywhere on the CPU, with the kernels
compiled as C++ (cuda_emulation.py). A pass rounds after every operation, so that elementwise
results agree with torch's to the last bit here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_emulation
import pytest
import test_passes
import torch
from test_passes import CASES, DTYPES, ERRORS, WRITES, arguments, assert_right, call
from tolerances import SAME_FORMULA
from torch import Tensor

from fused_bottleneck import coefficients, extension
from fused_bottleneck.algebra import accumulation_dtype

HAS_GPU = torch.cuda.is_available() and not extension.why_no_cuda()


class OnGpu:
    """The ops of the library, on GPU copies of their arguments; what they write is copied back."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.fused_bottleneck, name)

        def on_gpu(*args: Any, **kwargs: Any) -> Any:
            copies: dict[int, tuple[Tensor, Tensor]] = {}

            def move(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                return copies.setdefault(id(value), (value, value.cuda()))[1]

            result = op(*map(move, args), **{key: move(v) for key, v in kwargs.items()})
            for value, copy in copies.values():
                value.copy_(copy)
            if isinstance(result, Tensor):
                return result.cpu()
            return None if result is None else tuple(t.cpu() for t in result)

        on_gpu.default = op.default  # type: ignore[attr-defined]
        return on_gpu


@pytest.fixture(
    params=[
        pytest.param("emulated", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU and passes")],
        ),
    ]
)
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The ops to test, in place of the CPU passes in test_passes."""
    if request.param == "cuda":
        found: Any = OnGpu()
    elif cuda_emulation.available():
        found = cuda_emulation.load()
    else:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(test_passes, "passes", found)
    return found


over_cases = pytest.mark.parametrize("case", CASES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Rows and channels: groups cut short, one and several blocks of channels, one and several parts.
SHAPES = [(1, 1), (2, 3), (5, 8), (17, 7), (33, 64), (130, 17), (300, 100), (700, 264), (300, 5)]


@over_dtypes
@over_cases
@pytest.mark.usefixtures("ops")
def test_pass_agrees_with_the_oracle(case: str, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        args = arguments(case, dtype, shape, seed)
        assert_right(case, args, call(case, args))


@over_dtypes
@over_cases
@pytest.mark.usefixtures("ops")
def test_misaligned_matrices(case: str, dtype: torch.dtype) -> None:
    """A matrix that begins in the middle of 16 bytes has the results of an aligned one."""
    args = arguments(case, dtype, (70, 40))
    expected = call(case, args)
    moved = {name: shifted(v) if is_matrix(v) else v for name, v in args.items()}
    op = CASES[case][0]
    result = getattr(test_passes.passes, op)(**moved)
    got = {name: moved[name] for name in WRITES[op]}
    returned = (result,) if isinstance(result, Tensor) else (result or ())
    got |= dict(zip(test_passes.RETURNS.get(op, []), returned, strict=True))
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def shifted(t: Tensor) -> Tensor:
    """A contiguous copy of t, one element behind the start of its memory."""
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return memory[1:].view(t.shape).copy_(t)


@over_dtypes
@over_cases
@pytest.mark.usefixtures("ops")
def test_output_may_be_an_input(case: str, dtype: torch.dtype) -> None:
    test_passes.test_output_may_be_an_input(case, dtype)


@over_dtypes
@pytest.mark.parametrize("case", [case for case in CASES if case != "channel_moments"])
@pytest.mark.usefixtures("ops")
def test_nan_and_inf_flow(case: str, dtype: torch.dtype) -> None:
    test_passes.test_nan_and_inf_flow(case, dtype)


@over_dtypes
@pytest.mark.usefixtures("ops")
def test_moments_of_nan_and_inf(dtype: torch.dtype) -> None:
    test_passes.test_moments_of_nan_and_inf(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [1e3, 1e4, -1e4])
@pytest.mark.usefixtures("ops")
def test_moments_of_a_large_mean(dtype: torch.dtype, offset: float) -> None:
    test_passes.test_moments_of_a_large_mean(dtype, offset)


@pytest.mark.usefixtures("ops")
def test_moments_of_constant_channels() -> None:
    test_passes.test_moments_of_constant_channels()


@pytest.mark.usefixtures("ops")
def test_forward_relu_and_backward_gate_are_the_same_bits() -> None:
    test_passes.test_forward_relu_and_backward_gate_are_the_same_bits()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("ops")
def test_every_value_of_a_16_bit_dtype(dtype: torch.dtype) -> None:
    test_passes.test_every_value_of_a_16_bit_dtype(dtype)


@pytest.mark.parametrize(("case", "name", "change", "message"), ERRORS)
def test_error_names_the_argument(
    case: str, name: str, change: test_passes.Change, message: str, ops: Any
) -> None:
    if isinstance(ops, OnGpu):
        message = message.replace("on the CPU", "on the GPU")
    test_passes.test_error_names_the_argument(case, name, change, message)


# The coefficient kernels against algebra.py in float64.

PARAMETERS = ["float32", "bfloat16", "float16", "float64", "none"]


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

    def arguments(self, name: str) -> tuple[Any, ...]:
        w, k, count = self.width, self.channels, 1000
        if name == "bn_coefficients":
            parameters = [self.parameter(w) for _ in range(3)]
            return (self.vector(w), self.positive(w), *parameters, 1e-3)
        if name == "bn_backward_coefficients":
            return (self.positive(w), self.vector(w), self.vector(w), count)
        if name == "fold_rows":
            weight, root = self.weight(), self.matrix(k, k)
            product = (weight.double() @ (root @ root.t())).to(self.acc)
            parameters = [self.parameter(w), self.parameter(w)]
            return (weight, product, *parameters, 1e-3, self.vector(k), self.vector(k))
        if name.startswith("fold_backward_rows"):
            gamma, invstd, offset = self.parameter(w), self.positive(w), self.vector(w)
            mean_d, product = self.vector(k), self.matrix(w, k).to(self.acc)
            batch = () if name.endswith("fixed") else (mean_d, product)
            s, sum_g = self.matrix(w, k).to(self.acc), self.vector(w)
            known = batch or (None, None)
            return (self.weight(), gamma, invstd, offset, self.vector(k), *known, s, sum_g, count)
        a, b = self.weight(), self.matrix(k, k).to(self.dtype)
        return (a, b, self.vector(w), self.vector(k), count)


JUNCTIONS = [*coefficients.KERNELS, "fold_backward_rows, fixed"]
SIZES = [(1, 1), (7, 3), (64, 16), (100, 133), (33, 300)]


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("parameter", PARAMETERS)
@over_dtypes
@pytest.mark.parametrize("name", JUNCTIONS)
def test_junction_agrees_with_the_algebra(
    name: str, dtype: torch.dtype, parameter: str, ops: Any
) -> None:
    """Against the same formulas in float64."""
    op = name.split(",")[0]
    for width, channels in SIZES:
        args = Junction(dtype, parameter, width, channels).arguments(name)
        got = tensors_of(getattr(ops, op)(*args))
        same = tensors_of(getattr(coefficients, op)(*args))
        want = tensors_of(getattr(coefficients, op)(*map(in_float64, args)))
        assert len(got) == len(want)
        if name == "fold_rows":  # the shift is that of the folded weight as it was rounded
            beta, mean_d = args[3], args[6].double()
            want[1][4] = (0 if beta is None else beta.double()) - got[0].double() @ mean_d
        for mine, composite, exact in zip(got, same, want, strict=True):
            assert (mine.dtype, mine.shape) == (composite.dtype, composite.shape)
            scale = float(exact.abs().max()) if exact.numel() else 1.0
            bound = SAME_FORMULA[mine.dtype] * scale
            torch.testing.assert_close(mine.double(), exact, rtol=0, atol=bound)


def test_fold_clamps_the_variance_and_lets_nan_through(ops: Any) -> None:
    weight, zeros = torch.ones(3, 4), torch.zeros(4)
    product = torch.tensor([[-1e-3], [float("nan")], [1.0]]).expand(3, 4).contiguous()
    _, vectors = ops.fold_rows(weight, product, None, None, 1e-2, zeros, zeros)
    expected = torch.tensor([0.0, float("nan"), 4.0])
    torch.testing.assert_close(vectors[1], expected, equal_nan=True)
    torch.testing.assert_close(vectors[2], (expected + 1e-2).rsqrt(), equal_nan=True)


def test_junction_errors_name_the_argument(ops: Any) -> None:
    args = list(Junction(torch.float32, "float32", 5, 4).arguments("fold_rows"))
    args[1] = args[1][:, :3].contiguous()
    with pytest.raises(RuntimeError, match=r"fold_rows: expected product to be float32 \[5, 4\]"):
        ops.fold_rows(*args)
    args = list(Junction(torch.float32, "float32", 5, 4).arguments("bn_coefficients"))
    args[2] = args[2].long()
    with pytest.raises(RuntimeError, match="bn_coefficients: expected gamma to be float32, float"):
        ops.bn_coefficients(*args)


@pytest.mark.parametrize("name", JUNCTIONS)
def test_opcheck_junction(name: str) -> None:
    args = Junction(torch.bfloat16, "bfloat16", 6, 4).arguments(name)
    op = getattr(torch.ops.fused_bottleneck, name.split(",")[0]).default
    torch.library.opcheck(op, args)


# Only on a GPU.

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU and passes")]


def gpu_arguments(case: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    args = arguments(case, dtype, shape)
    return {name: v.cuda() if isinstance(v, Tensor) else v for name, v in args.items()}


def gpu_call(case: str, args: dict[str, Any]) -> list[Tensor]:
    """What a pass writes and returns, on the GPU."""
    op = CASES[case][0]
    own = {k: v.clone() if k in WRITES[op] else v for k, v in args.items()}
    result = getattr(torch.ops.fused_bottleneck, op)(**own)
    return [*(own[name] for name in WRITES[op]), *tensors_of(() if result is None else result)]


@pytest.mark.parametrize("case", [pytest.param(case, marks=on_gpu) for case in CASES])
def test_runs_on_the_current_stream(case: str) -> None:
    args = gpu_arguments(case, (5000, 64), torch.float32)
    expected = gpu_call(case, args)
    name = next(n for n, v in args.items() if is_matrix(v) and n not in WRITES[CASES[case][0]])
    value = args[name].clone()
    args[name].zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # who does not wait for this stream reads the zeros
        args[name].copy_(value)
        got = gpu_call(case, args)
    stream.synchronize()
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("case", [pytest.param(case, marks=on_gpu) for case in CASES])
def test_graph_capture(case: str) -> None:
    args = gpu_arguments(case, (5000, 64), torch.bfloat16)
    expected = gpu_call(case, args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gpu_call(case, args)
    for _ in range(2):
        graph.replay()
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("op", [pytest.param("channel_moments", marks=on_gpu)])
def test_more_than_two_to_the_31_elements(op: str) -> None:
    """Rows repeated k times have the mean of one of them; and the last row is written."""
    if torch.cuda.mem_get_info()[0] < 15e9:
        pytest.skip("needs 15 GB of GPU memory")
    rows, channels = 2**23 + 2**20, 256
    block = torch.randn(2**10, channels, device="cuda", dtype=torch.bfloat16)
    y = block.repeat(rows // 2**10, 1)
    assert y.numel() > 2**31
    mean, m2 = getattr(torch.ops.fused_bottleneck, op)(y)
    expected = block.double()
    torch.testing.assert_close(mean.double(), expected.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(m2.double() / rows, expected.var(0, correction=0), rtol=1e-5, atol=0)
    zeros = torch.zeros(channels, device="cuda")
    torch.ops.fused_bottleneck.bn_apply_(y, zeros, zeros + 2, None, None, False, y)
    assert torch.equal(y[-(2**10) :], 2 * block)
