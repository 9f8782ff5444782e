"""The CUDA passes (csrc/cuda) against the oracles of the CPU ones.

Every test runs twice: on a GPU where there is one, and everywhere on the CPU, with the kernels
compiled as C++ (cuda_emulation.py). A pass rounds after every operation, so that elementwise
results agree with torch's to the last bit here too.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_passes
import torch
from cuda_ops import IMPLEMENTATIONS, ON_GPU, OnGpu, implementation, shifted, tensors_of
from test_passes import CPU_ONLY, DTYPES, WRITES, arguments, assert_right, call
from torch import Tensor


@pytest.fixture(params=IMPLEMENTATIONS)
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The ops to test, in place of the CPU passes in test_passes."""
    found = implementation(request.param)
    monkeypatch.setattr(test_passes, "passes", found)
    return found


CASES = {name: case for name, case in test_passes.CASES.items() if name not in CPU_ONLY}
ERRORS = [error for error in test_passes.ERRORS if error[0] not in CPU_ONLY]
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


@over_dtypes
@over_cases
@pytest.mark.usefixtures("ops")
def test_output_may_be_an_input(case: str, dtype: torch.dtype) -> None:
    test_passes.test_output_may_be_an_input(case, dtype)


@over_cases
@pytest.mark.usefixtures("ops")
def test_a_matrix_may_be_the_pixels_of_images(case: str) -> None:
    test_passes.test_a_matrix_may_be_the_pixels_of_images(case)


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


# Only on a GPU.


def gpu_arguments(case: str, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    args = arguments(case, dtype, shape)
    return {name: v.cuda() if isinstance(v, Tensor) else v for name, v in args.items()}


def gpu_call(case: str, args: dict[str, Any]) -> list[Tensor]:
    """What a pass writes and returns, on the GPU."""
    op = CASES[case][0]
    own = {k: v.clone() if k in WRITES[op] else v for k, v in args.items()}
    result = getattr(torch.ops.fused_bottleneck, op)(**own)
    return [*(own[name] for name in WRITES[op]), *tensors_of(() if result is None else result)]


@pytest.mark.parametrize("case", [pytest.param(case, marks=ON_GPU) for case in CASES])
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


@pytest.mark.parametrize("case", [pytest.param(case, marks=ON_GPU) for case in CASES])
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


@pytest.mark.parametrize("op", [pytest.param("channel_moments", marks=ON_GPU)])
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
