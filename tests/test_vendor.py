"""The vendor implementation of the whole block: aten's convolutions, this library's passes and
coefficient kernels. On the CPU with the CPU's twins of the ops and with the CUDA kernels compiled
as C++ (cuda_emulation.py), on a GPU with the real ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import cuda_emulation
import pytest
import torch
from helpers import (
    Case,
    Result,
    assert_criterion,
    assert_equal_float64,
    channels_last,
    errors,
    grad_like,
    in_dtype,
    leaf,
    zero_gradients,
)
from torch import Tensor, nn

from fused_bottleneck import (
    ConvBNReLU,
    FusedConvBNReLU,
    dispatch,
    extension,
    junctions,
    pass_stages,
    tail_plan,
    vendor,
)
from fused_bottleneck.operands import StridedInput
from fused_bottleneck.vendor import VendorStages

HAS_GPU = torch.cuda.is_available() and not extension.why_no_cuda()

pytestmark = pytest.mark.skipif(not extension.load(), reason=extension.reason())


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("emulated", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU and passes")],
        ),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device on which every fused block runs the vendor stages."""
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "vendor")
    if request.param == "cuda":
        return torch.device("cuda")
    monkeypatch.setattr(dispatch, "CpuStages", VendorStages)
    monkeypatch.setattr(tail_plan, "uses_gram", lambda *sizes: True)  # as on a GPU
    if request.param == "emulated":
        if not cuda_emulation.available():
            pytest.skip("no C++ compiler")
        for module in (junctions, pass_stages, vendor):
            monkeypatch.setattr(module, "_passes", cuda_emulation.load())
    return torch.device("cpu")


def run(module: nn.Module, x: Tensor, device: torch.device) -> Result:
    """Forward and backward on a device, as helpers.run; the results on the CPU."""
    module = copy.deepcopy(module).to(device)
    x = leaf(x.to(device))
    out = module(x)
    out.backward(grad_like(out.cpu()).to(device))
    grads = {"x": x.grad} | {n: p.grad for n, p in module.named_parameters()}
    on_cpu = {n: None if g is None else g.cpu() for n, g in grads.items()}
    buffers = {n: b.detach().cpu() for n, b in module.named_buffers()}
    return Result(out.detach().cpu(), on_cpu, buffers)


BLOCKS = {
    "identity": Case(size=(3, 6, 5)),
    "identity, no bias": Case(bias=False),
    "odd channels": Case(channels=12, width=3),
    "downsample, stride 2": Case(channels=6, stride=2, downsample="conv"),
    "stride 2, 1": Case(channels=6, stride=(2, 1), downsample="conv"),
    "shortcut": Case(channels=6, stride=2, downsample="pool"),
    "groups, dilation": Case(options={"groups": 2, "dilation": 2}),
    "depthwise": Case(options={"groups": 4}),
    "one pixel": Case(size=(9, 1, 1)),
    "more than one sum": Case(size=(3, 40, 40)),
}
FROZEN = {"none": (), "bn1": ("bn1",), "bn2": ("bn2",), "bn2, bn3": ("bn2", "bn3")}


def freeze(modules: Sequence[nn.Module], names: Sequence[str]) -> None:
    for module in modules:
        for name in names:
            getattr(module, name).eval()


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("block", BLOCKS)
def test_block_in_float64(
    block: str, frozen: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vendor, "_SUM_ROWS", 1000)
    reference, fused = BLOCKS[block].pair()
    freeze((reference, fused), FROZEN[frozen])
    x = BLOCKS[block].input()
    assert fused.why_not_fused(x) is None
    expected, got = run(reference, x, torch.device("cpu")), run(fused, x, device)
    noise = {"identity_downsample.1.bias"} if block == "shortcut" else set()
    assert_equal_float64(got, expected, zero_gradients(fused), noise)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_unit_in_float64(mode: str, device: torch.device) -> None:
    arguments = (6, 10, 3, 2, 1)
    reference, fused = ConvBNReLU(*arguments).double(), FusedConvBNReLU(*arguments).double()
    fused.load_state_dict(reference.state_dict())
    for module in (reference, fused):
        module.train(mode == "train")
    x = torch.randn(3, 6, 9, 8, dtype=torch.float64)
    expected, got = run(reference, x, torch.device("cpu")), run(fused, x, device)
    assert_equal_float64(got, expected, {"conv.bias"} if mode == "train" else ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", ["identity", "downsample, stride 2", "groups, dilation"])
def test_block_is_as_accurate_as_the_plain_one(
    block: str, dtype: torch.dtype, device: torch.device
) -> None:
    rows = []
    case = BLOCKS[block]
    for seed in range(8):
        reference, fused = case.pair(seed)
        x = channels_last(case.input(seed + 50).to(dtype))
        eager, mine = in_dtype(reference, dtype), in_dtype(fused, dtype)
        oracle = run(copy.deepcopy(eager).double(), x.double(), torch.device("cpu"))
        skip = {n for n in oracle.grads if n.endswith("bias") and "conv" in n}
        skip |= {"identity_downsample.0.bias", "identity_downsample.1.bias"}
        results = [errors(run(m, x, device), oracle, skip) for m in (mine, eager)]
        rows.append(results)
    assert_criterion([row[0] for row in rows], [row[1] for row in rows], dtype)


def test_layouts(device: torch.device) -> None:
    reference, fused = BLOCKS["downsample, stride 2"].pair()
    x = BLOCKS["downsample, stride 2"].input()
    expected = run(reference, x, torch.device("cpu"))
    for view in (x, channels_last(x), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_equal_float64(run(fused, view, device), expected, zero_gradients(fused))


def test_nothing_of_the_caller_is_written(device: torch.device) -> None:
    """Passes work in place on the stages' own tensors only."""
    for block in ("identity", "shortcut", "downsample, stride 2"):
        case = BLOCKS[block]
        fused = case.module(case.pair()[1].__class__).to(device)
        x = channels_last(case.input().to(device)).requires_grad_()
        before = x.detach().clone()
        out = fused(x)
        grad = torch.randn_like(out)
        kept, weights = grad.clone(), [p.detach().clone() for p in fused.parameters()]
        out.backward(grad)
        assert torch.equal(x, before)
        assert torch.equal(grad, kept)
        for parameter, weight in zip(fused.parameters(), weights, strict=True):
            assert torch.equal(parameter, weight)


@pytest.mark.parametrize("rows", [16, 21, 63, 64])
def test_second_moment_over_blocks_of_rows(
    rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 63 rows: whole blocks and a rest, whole blocks only, one, a rest only."""
    monkeypatch.setattr(vendor, "_SUM_ROWS", rows)
    x = channels_last(torch.randn(3, 5, 7, 3, device=device) + 3).half()  # those that take blocks
    operand = StridedInput(x, (1, 1), torch.zeros(5, device=device))
    with VendorStages() as stages:
        mean, cov = stages.gram(operand)
    pixels = x.double().permute(0, 2, 3, 1).reshape(-1, 5)
    torch.testing.assert_close(mean.double(), pixels.mean(0), rtol=1e-6, atol=0)
    expected = torch.cov(pixels.t(), correction=0)
    torch.testing.assert_close(cov.double(), expected, rtol=0, atol=1e-5)
