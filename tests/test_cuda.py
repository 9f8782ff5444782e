"""The fused block on a GPU: accuracy, every ResNet-50 shape, large tensors, and torch's features.

Skipped without a CUDA device that the kernels run on. `make sanitize` runs the stages of this file
under compute-sanitizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from pathlib import Path

import pytest
import test_stages
import torch
from helpers import (
    Case,
    Result,
    assert_criterion,
    channels_last,
    errors,
    grad_like,
    in_dtype,
    leaf,
    relative_error,
)
from test_stages import STAGES, Data, tensors_of
from tolerances import SAME_FORMULA
from torch import Tensor, nn

import fused_bottleneck
from benchmarks.shapes import RESNET50, BlockShape
from fused_bottleneck import (
    Bottleneck,
    ConvBNReLU,
    FusedBottleneck,
    FusedConvBNReLU,
    dispatch,
    rules,
)
from fused_bottleneck.kernels import config, tuned
from fused_bottleneck.operands import MaskedGrad, matrix
from fused_bottleneck.stages import Stages, pack_bits


def _why_skipped() -> str | None:
    """Why there is no GPU to test on."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return dispatch.why_no_kernels(torch.empty(0, device="cuda"), [])


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_why_skipped() is not None, reason=str(_why_skipped())),
]

# Precision: element type, what torch's convolutions do with float32, and the element type that has
# its digits, whose floor the errors get: tf32 has the ten bits of float16's mantissa.
PRECISIONS = {
    "ieee": (torch.float32, "ieee", torch.float32),
    "tf32": (torch.float32, "tf32", torch.float16),
    "float16": (torch.float16, "ieee", torch.float16),
    "bfloat16": (torch.bfloat16, "ieee", torch.bfloat16),
}
SAME = {"ieee": SAME_FORMULA[torch.float32], "tf32": SAME_FORMULA[torch.float16]} | {
    name: SAME_FORMULA[PRECISIONS[name][0]] for name in ("float16", "bfloat16")
}


@pytest.fixture(autouse=True)
def restored_settings() -> Iterator[None]:
    """Products in exact float32 unless a test says otherwise."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.empty_cache()


def set_precision(name: str) -> tuple[torch.dtype, torch.dtype]:
    """The element type of a precision, and the one whose floor counts."""
    dtype, torch.backends.cudnn.conv.fp32_precision, floor = PRECISIONS[name]
    return dtype, floor


def run(module: nn.Module, x: Tensor, grad_out: Tensor | None = None) -> Result:
    """Forward and backward on the GPU, as helpers.run."""
    module.zero_grad(set_to_none=True)
    x = leaf(x)
    out = module(x)
    out.backward(grad_like(out).to(out.device) if grad_out is None else grad_out)
    grads = {"x": x.grad} | {n: p.grad for n, p in module.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
    return Result(out.detach(), grads, buffers)


def assert_fused(module: FusedBottleneck | FusedConvBNReLU, x: Tensor) -> None:
    assert module.why_not_fused(x) is None


def assert_same_bits(first: Result, second: Result) -> None:
    ours, theirs = first.tensors(), second.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# Every stage.


class CudaData(Data):
    """The stage tests' data on the GPU."""

    def rectangle(self, channels: int, height: int, width: int) -> Tensor:
        return super().rectangle(channels, height, width).cuda()

    def vector(self, channels: int) -> Tensor:
        return super().vector(channels).cuda()

    def weight(self, *size: int) -> Tensor:
        return super().weight(*size).cuda()

    def masked(self) -> MaskedGrad:
        rows = test_stages.N * test_stages.OUT**2
        live = torch.rand(rows, test_stages.W, generator=self.generator) < 0.6
        return MaskedGrad(self.image(test_stages.W, test_stages.OUT), pack_bits(live).cuda())


class RoundedData(CudaData):
    """The same values, rounded to the dtype, in float64: for the oracle."""

    def rectangle(self, channels: int, height: int, width: int) -> Tensor:
        return super().rectangle(channels, height, width).double()

    def vector(self, channels: int) -> Tensor:
        return super().vector(channels).double()

    def weight(self, *size: int) -> Tensor:
        return super().weight(*size).double()

    @property
    def acc(self) -> torch.dtype:
        return torch.float64


CHANNELS = {"C": 48, "M": 80, "W": 96}
WIDER = {"C": 160, "M": 144, "W": 288, "N": 5}
PRODUCT_WAY = {"F4, two residuals", "B1, product", "normalise"}


@pytest.mark.parametrize("sizes", [CHANNELS, WIDER], ids=["narrow", "wide"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [name for name in STAGES if name not in PRODUCT_WAY])
def test_stage(
    stage: str, precision: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage's kernel against the plain stage in float64 on the same, rounded operands.

    The mask of F4 against its own output: which elements next to zero are live, rounding decides.
    """
    from fused_bottleneck.triton_stages import TritonStages

    for name, value in sizes.items():
        monkeypatch.setattr(test_stages, name, value)
    dtype, _ = set_precision(precision)
    with Stages() as plain:
        want = tensors_of(STAGES[stage](plain, RoundedData(dtype)))
    with TritonStages(torch.empty(0, dtype=dtype, device="cuda")) as stages:
        got = tensors_of(STAGES[stage](stages, CudaData(dtype)))
    assert len(got) == len(want) > 0
    if stage.startswith("F4"):
        want[1] = (matrix(got[0]) > 0).double()
    for ours, theirs in zip(got, want, strict=True):
        atol = SAME[precision] * float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", ["F2", "B3", "B3, fixed", "B4", "B5", "B6, downsample"])
def test_operands_computed_on_load(
    stage: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that the rules do not take for these stages."""
    monkeypatch.setattr(rules, "LEAST_READS_TO_WRITE", 99)
    test_stage(stage, precision, WIDER, monkeypatch)


# The block.

BLOCKS = {
    "identity": Case(256, 64, size=(4, 14, 13)),
    "downsample": Case(64, 64, downsample="conv", bias=False, size=(3, 15, 11)),
    "stride 2": Case(48, 16, 2, "conv", size=(5, 9, 12)),
    "stride 3": Case(80, 48, 3, "conv", size=(4, 16, 17)),
    "stride 2, 1": Case(64, 32, (2, 1), "conv", size=(4, 10, 9)),
    "dilation 2": Case(128, 32, options={"dilation": 2}, size=(4, 11, 9)),
    "shortcut": Case(64, 32, 2, "pool", size=(4, 12, 12)),
    "expansion 2": Case(96, 48, options={"expansion": 2}, size=(3, 9, 9)),
    "one pixel": Case(64, 16, size=(33, 1, 1)),
    "few pixels": Case(512, 128, size=(1, 5, 3)),
}
FROZEN = {"none": (), "bn1": ("bn1",), "bn2, bn3": ("bn2", "bn3"), "all": ("bn1", "bn2", "bn3")}


def pair(case: Case, seed: int, frozen: Sequence[str] = ()) -> tuple[Bottleneck, FusedBottleneck]:
    """The plain and the fused block in float64 on the GPU."""
    modules = case.pair(seed)
    for module in modules:
        module.cuda()
        for name in frozen:
            getattr(module, name).eval()
    return modules


Errors = dict[str, float]


def _error_row(reference: nn.Module, module: nn.Module, x: Tensor, dtype: torch.dtype) -> Errors:
    """Errors of a module in dtype against the reference in float64 on the same rounded values."""
    low, eager = x.to(dtype), in_dtype(reference, dtype)
    oracle = run(copy.deepcopy(eager).double(), low.double())
    skip = {n for n in oracle.grads if n.startswith("conv") and n.endswith("bias")}
    skip |= {"identity_downsample.0.bias", "identity_downsample.1.bias"}
    return errors(run(in_dtype(module, dtype), low), oracle, skip)


def error_rows(
    reference: nn.Module, fused: nn.Module, x: Tensor, precision: str
) -> tuple[Errors, Errors]:
    """Errors of the fused and of the plain module, each against the plain one in float64.

    Eager's tf32 is as exact as the algorithm that cuDNN happens to choose (some are in float32);
    its error is that of float16 where that is more: the same digits, whatever the algorithm.
    """
    dtype, floor = set_precision(precision)
    assert_fused(in_dtype(fused, dtype), x.to(dtype))
    mine, eager = (_error_row(reference, module, x, dtype) for module in (fused, reference))
    if floor != dtype:
        half = _error_row(reference, reference, x, floor)
        eager = {n: max(e, half[n]) if isfinite(half[n]) else e for n, e in eager.items()}
    return mine, eager


def assert_accurate(rows: Sequence[tuple[Errors, Errors]], precision: str) -> None:
    """The criterion, with the floor of the precision."""
    floor = PRECISIONS[precision][2]
    assert_criterion([mine for mine, _ in rows], [eager for _, eager in rows], floor)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("case", "frozen"),
    [(case, "none") for case in BLOCKS]
    + [
        (case, frozen) for case in ("identity", "stride 2") for frozen in FROZEN if frozen != "none"
    ],
)
def test_block_is_as_accurate_as_the_plain_one(case: str, frozen: str, precision: str) -> None:
    rows = []
    for seed in range(6):
        reference, fused = pair(BLOCKS[case], seed, FROZEN[frozen])
        x = channels_last(BLOCKS[case].input(seed + 50).cuda())
        rows.append(error_rows(reference, fused, x, precision))
    assert_accurate(rows, precision)


def resnet_case(shape: BlockShape, batch: int) -> Case:
    downsample = "conv" if shape.downsample else "identity"
    size = (batch, shape.size, shape.size)
    return Case(shape.in_channels, shape.width, shape.stride, downsample, False, size)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", RESNET50, ids=lambda shape: shape.name)
def test_resnet50_shapes(shape: BlockShape, precision: str) -> None:
    rows = []
    for seed in range(2):
        case = resnet_case(shape, 32)
        reference, fused = pair(case, seed)
        x = channels_last(case.input(seed + 50).cuda())
        rows.append(error_rows(reference, fused, x, precision))
    assert_accurate(rows, precision)


@pytest.mark.parametrize("offset", [50.0, -50.0])
def test_large_shift_of_bn2(offset: float) -> None:
    """The centred operand: what is small against beta2 keeps its digits."""
    case = BLOCKS["identity"]
    rows = []
    for seed in range(4):
        reference, fused = pair(case, seed)
        for module in (reference, fused):
            nn.init.constant_(module.bn2.bias, offset)
            nn.init.constant_(module.bn2.weight, 0.05)
        x = channels_last(case.input(seed).cuda())
        rows.append(error_rows(reference, fused, x, "float16"))
    assert_accurate(rows, "float16")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (5, 3)])
def test_standalone_unit(kernel: int, stride: int, precision: str) -> None:
    rows = []
    for seed in range(4):
        torch.manual_seed(seed)
        arguments = (48, 80, kernel, stride, kernel // 2)
        reference = ConvBNReLU(*arguments).double().cuda()
        fused = FusedConvBNReLU(*arguments).double().cuda()
        fused.load_state_dict(reference.state_dict())
        x = channels_last(torch.randn(3, 48, 11, 10, dtype=torch.float64).cuda())
        rows.append(error_rows(reference, fused, x, precision))
    assert_accurate(rows, precision)


@pytest.mark.large
def test_more_than_two_to_the_31_elements() -> None:
    """A batch repeated k times has the statistics, outputs and input gradients of one of them."""
    shape = RESNET50[1]
    images, repeats = 8, 351
    assert images * repeats * shape.size**2 * shape.in_channels > 2**31
    if torch.cuda.mem_get_info()[0] < 45e9:
        pytest.skip("needs 45 GB of GPU memory")
    case = resnet_case(shape, images)
    _, fused = pair(case, 0)
    fused = in_dtype(fused, torch.bfloat16)
    base = channels_last(case.input().to("cuda", torch.bfloat16))
    grad = channels_last(grad_like(base).cuda())
    small = run(fused, base, grad)
    x = channels_last(base.repeat(repeats, 1, 1, 1)).requires_grad_()
    fused.zero_grad(set_to_none=True)
    out = fused(x)
    out.backward(channels_last(grad.repeat(repeats, 1, 1, 1)))
    assert x.grad is not None
    for part in (slice(0, images), slice(-images, None)):
        assert relative_error(out[part], small.out) < 1e-2
        assert relative_error(x.grad[part], small.grads["x"]) < 2e-2
    for name, parameter in fused.named_parameters():
        if name.endswith("weight"):
            expected = small.grads[name].double() * repeats
            assert relative_error(parameter.grad, expected) < 2e-2, name


# What torch does around it.


def small_block(dtype: torch.dtype = torch.bfloat16) -> tuple[FusedBottleneck, Tensor]:
    """A strided block with a fused downsample, and its input."""
    case = Case(64, 32, 2, "conv", size=(4, 13, 14))
    _, fused = pair(case, 0)
    fused = in_dtype(fused, dtype)
    x = channels_last(case.input().to("cuda", dtype))
    assert_fused(fused, x)
    return fused, x


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bfloat16"])
@pytest.mark.parametrize("shape", RESNET50[:3], ids=lambda shape: shape.name)
def test_same_bits_from_run_to_run(shape: BlockShape, precision: str) -> None:
    """Over many runs that fill the GPU: what races with an asynchronous product differs in some."""
    dtype, _ = set_precision(precision)
    case = resnet_case(shape, 32)
    fused = in_dtype(pair(case, 0)[1], dtype)
    x = channels_last(case.input().to("cuda", dtype))
    grad = channels_last(grad_like(fused(x)).cuda())
    state = copy.deepcopy(fused.state_dict())
    first = run(fused, x, grad)
    for _ in range(200):
        fused.load_state_dict(state)
        assert_same_bits(first, run(fused, x, grad))


def test_no_host_synchronisation() -> None:
    fused, x = small_block()
    grad = torch.randn_like(fused(x))
    torch.cuda.set_sync_debug_mode("error")
    run(fused, x, grad)


def test_cuda_graph() -> None:
    """A captured training step gives the bits of an ordinary one, on new inputs too."""
    fused, x = small_block()
    other = copy.deepcopy(fused)
    grad = torch.randn_like(fused(x))
    fused.load_state_dict(other.state_dict())
    static = x.clone(memory_format=torch.preserve_format).requires_grad_()

    def step() -> Tensor:
        out = fused(static)
        out.backward(grad)
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    fused.zero_grad(set_to_none=True)
    static.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fused.load_state_dict(other.state_dict())
    for seed in range(2):
        fresh = torch.randn_like(x) if seed else x
        with torch.no_grad():
            static.copy_(fresh)
        for tensor in (static, *fused.parameters()):
            tensor.grad.zero_()
        graph.replay()
        grads = {"x": static.grad} | {n: p.grad for n, p in fused.named_parameters()}
        buffers = dict(fused.named_buffers())
        expected = run(other, fresh, grad)
        assert_same_bits(Result(captured.detach(), grads, buffers), expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_torch_compile(mode: str) -> None:
    fused, x = small_block()
    fused.train(mode == "train")
    other = copy.deepcopy(fused)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True)
    grad = torch.randn_like(other(x).detach())
    other.load_state_dict(fused.state_dict())
    got, want = run(compiled, x, grad), run(other, x, grad)
    strip = {n.removeprefix("_orig_mod."): t for n, t in got.grads.items()}
    for name, expected in want.grads.items():
        assert relative_error(strip[name], expected, least=1e-3) < 1e-2, name
    assert relative_error(got.out, want.out) < 1e-2


def test_on_a_stream_of_its_own() -> None:
    fused, x = small_block()
    other = copy.deepcopy(fused)
    expected = run(other, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # whoever does not wait for this stream reads too early
        late = x.clone(memory_format=torch.preserve_format)
        got = run(fused, late)
    stream.synchronize()
    assert_same_bits(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device() -> None:
    """With the first device current: the launches go where the tensors are."""
    fused, x = small_block()
    expected = run(copy.deepcopy(fused), x)
    got = run(fused.to("cuda:1"), x.to("cuda:1"))
    moved = Result(
        got.out.to("cuda:0"),
        {n: None if g is None else g.to("cuda:0") for n, g in got.grads.items()},
        {n: b.to("cuda:0") for n, b in got.buffers.items()},
    )
    assert_same_bits(moved, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """float32 parameters, 16-bit products: as accurate as nn under autocast."""
    case = BLOCKS["stride 2"]
    rows = []
    for seed in range(6):
        reference, fused = (in_dtype(m, torch.float32) for m in pair(case, seed))
        x = channels_last(case.input(seed).float().cuda())
        oracle = run(copy.deepcopy(reference).double(), x.double())
        skip = {n for n in oracle.grads if n.endswith("bias")}
        results = []
        for module in (fused, reference):
            with torch.autocast("cuda", dtype):
                results.append(errors(run(module, x), oracle, skip))
        with torch.autocast("cuda", dtype):
            assert_fused(fused, x)
            assert fused(x).dtype == dtype
        rows.append(results)
    assert_criterion([row[0] for row in rows], [row[1] for row in rows], dtype)


def test_layouts() -> None:
    """Contiguous in, contiguous out; any strides of x and of the incoming gradient."""
    fused, x = small_block(torch.float32)
    expected = run(fused, x)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous": lambda t: t.contiguous(),
        "sliced": lambda t: t.repeat_interleave(2, 3)[..., ::2],
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, view in views.items():
        got = run(fused, view(x))
        assert got.out.is_contiguous() or name != "contiguous"
        assert relative_error(got.out, expected.out) < 1e-6, name
        assert relative_error(got.grads["x"], expected.grads["x"]) < 1e-5, name
    for name, view in views.items():
        got = run(fused, x, view(grad_like(expected.out).cuda()))
        assert relative_error(got.grads["x"], expected.grads["x"]) < 1e-5, name
    expanded = torch.ones((), device="cuda").expand(expected.out.shape)
    assert torch.isfinite(run(fused, x, expanded).grads["x"]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float) -> None:
    """It spreads through batch statistics, as in nn; GradScaler depends on it."""
    fused, x = small_block(torch.float16)
    x[1, 3, 2, 2] = value
    result = run(fused, x)
    assert not torch.isfinite(result.out).all()
    assert not torch.isfinite(result.grads["conv1.weight"]).all()


def test_reasons() -> None:
    """What the kernels do not take runs composed, with the reason, and right."""
    plain = {"size": (2, 6, 6)}
    cases = {
        "float64": (Case(64, 16, **plain), torch.float64),
        "multiples of 16": (Case(40, 10, **plain), torch.float32),
        "grouped": (Case(64, 16, options={"groups": 2}, **plain), torch.float32),
    }
    for text, (case, dtype) in cases.items():
        reference, fused = (in_dtype(m, dtype) for m in pair(case, 0))
        x = case.input().to("cuda", dtype)
        reason = fused.why_not_fused(x)
        assert reason is not None
        assert text in reason
        assert relative_error(run(fused, x).out, run(reference, x).out) < 1e-5


def test_peak_memory_of_a_step() -> None:
    """At most 0.55 of the plain block's, without what both need: x, grad_out, the parameters, and
    the results out and x.grad, each of x's size."""
    case = resnet_case(RESNET50[1], 64)
    peaks = []
    for module in pair(case, 0):
        module = in_dtype(module, torch.bfloat16)
        x = channels_last(case.input().to("cuda", torch.bfloat16)).requires_grad_()
        grad = torch.randn_like(x)
        module(x).backward(grad)
        x.grad = None
        module.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        module(x).backward(grad)
        results = 2 * x.numel() * x.element_size()
        peaks.append(torch.cuda.max_memory_allocated() - before - results)
    assert peaks[1] <= 0.55 * peaks[0]


def test_tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What tune finds is used at once, kept on disk, and not measured again."""
    monkeypatch.setenv(tuned.CACHE_VARIABLE, str(tmp_path))
    tuned.table.cache_clear()
    tried = config.candidates
    monkeypatch.setattr(config, "candidates", lambda *a: tried(*a)[:2])
    fused, x = small_block()
    state = copy.deepcopy(fused.state_dict())
    count = fused_bottleneck.tune(fused, x, progress=False)
    assert count >= 8
    for name, tensor in fused.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert len(tuned.table(x.device)) == count
    assert fused_bottleneck.tune(fused, x, progress=False) == 0
    run(fused, x)
    tuned.table.cache_clear()
