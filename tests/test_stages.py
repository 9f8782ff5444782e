"""Each stage of the CPU and vendor implementations against the plain PyTorch one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import one_image_at_a_time
from helpers import channels_last
from tolerances import SAME_FORMULA
from torch import Tensor

from fused_bottleneck import extension
from fused_bottleneck.algebra import Folded, OperandGrad, accumulation_dtype
from fused_bottleneck.cpu import CpuStages
from fused_bottleneck.operands import (
    POINTWISE,
    Activation,
    ConvGrad,
    Geometry,
    MaskedGrad,
    Normalised,
    StridedInput,
)
from fused_bottleneck.stages import (
    ConvTerm,
    FoldedTerm,
    InputTerm,
    Operand,
    Stages,
    pack_bits,
    unpack_bits,
)
from fused_bottleneck.vendor import VendorStages

pytestmark = pytest.mark.skipif(not extension.load(), reason=extension.reason())

N, C, M, W, H = 3, 6, 5, 19, 7
OUT = 4  # (H - 1) // 2 + 1
CONV2 = Geometry((2, 2), (1, 1))
STRIDED = Geometry((2, 2))


class Data:
    """Random operands of a strided block; each call of a method makes the same ones anew."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(4)

    def image(self, channels: int, size: int) -> Tensor:
        return self.rectangle(channels, size, size)

    def rectangle(self, channels: int, height: int, width: int) -> Tensor:
        shape = (N, channels, height, width)
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return channels_last(t.to(self.dtype))

    def vector(self, channels: int) -> Tensor:
        t = torch.randn(channels, generator=self.generator, dtype=torch.float64)
        return t.to(accumulation_dtype(self.dtype))

    def weight(self, *size: int) -> Tensor:
        t = torch.randn(size, generator=self.generator, dtype=torch.float64)
        return t.to(self.dtype)

    def activation(self, channels: int, size: int, centred: bool = False) -> Activation:
        scale = self.vector(channels).abs() + 0.5
        beta = self.vector(channels)
        centre = torch.relu(beta) if centred else None
        return Activation(self.image(channels, size), self.vector(channels), scale, beta, centre)

    def strided(self) -> StridedInput:
        return StridedInput(self.image(C, H), (2, 2), self.vector(C).to(self.dtype).to(self.acc))

    @property
    def acc(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)

    def masked(self) -> MaskedGrad:
        live = torch.rand(N * OUT * OUT, W, generator=self.generator) < 0.6
        return MaskedGrad(self.image(W, OUT), pack_bits(live))

    def conv_grad(self, channels: int, size: int, batch: bool = True) -> ConvGrad:
        g, y = self.image(channels, size), self.image(channels, size)
        mean, scale = self.vector(channels), self.vector(channels)
        k = (self.vector(channels), self.vector(channels)) if batch else (None, None)
        return ConvGrad(g, y, mean, scale, *k)

    def operand_grad(self, operand_channels: int, batch: bool = True) -> OperandGrad:
        a = self.weight(W, operand_channels)
        if not batch:
            return OperandGrad(a, None, None)
        square = self.weight(operand_channels, operand_channels)
        return OperandGrad(a, square, self.vector(operand_channels))


def tail_forward(
    terms: int, residuals: int, layout: bool, normalised: int = 0
) -> Callable[[Stages, Data], Any]:
    """normalised: how many of the products' outputs there are; the first has no beta."""

    def stage(stages: Stages, data: Data) -> Any:
        operands = [data.activation(M, OUT, centred=True), data.strided()][:terms]
        sizes = [M, C]
        folded = [
            FoldedTerm(operand, Folded(data.weight(W, k), data.vector(W)))
            for operand, k in zip(operands, sizes, strict=False)
        ]
        extra: list[Tensor | Normalised] = [data.image(W, OUT) for _ in range(residuals)]
        for i in range(normalised):
            beta = data.vector(W) if i else None
            extra.append(Normalised(data.image(W, OUT), data.vector(W), data.vector(W), beta))
        out, mask = stages.tail_forward(folded, extra, layout)
        return out, unpack_bits(mask, W).double()

    return stage


def wide_backward(stages: Stages, data: Data) -> Any:
    """B1 then B2, as a program runs them."""
    grad, act, x_s = data.masked(), data.activation(M, OUT, centred=True), data.strided()
    coefficients = [data.operand_grad(M), data.operand_grad(C)]
    sums = stages.tail_wgrad(grad, [act, x_s], [k.a for k in coefficients])
    return sums, stages.tail_dgrad(grad, act, coefficients[0], data.vector(M).abs())


def product_backward(stages: Stages, data: Data) -> Any:
    """The convolutions that take the gradient of an output that was computed again."""
    grad = data.conv_grad(W, OUT)._replace(g=data.masked())
    act, weight = data.activation(M, OUT), data.weight(W, M, 1, 1)
    dweight = stages.conv_wgrad(grad, act, weight, POINTWISE)
    return dweight, stages.conv_dgrad(grad, weight, POINTWISE, act, data.vector(M))


def input_backward(downsample: bool, batch: bool, layout: bool) -> Callable[[Stages, Data], Any]:
    """B1 then B6."""

    def stage(stages: Stages, data: Data) -> Any:
        term = ConvTerm(data.conv_grad(M, H, batch), data.weight(M, C, 1, 1), POINTWISE)
        grad, x_s = data.masked(), data.strided()
        coefficients = data.operand_grad(C, batch)
        stages.tail_wgrad(grad, [x_s], [coefficients.a])
        last = InputTerm(x_s, coefficients, grad) if downsample else None
        return stages.input_dgrad(term, x_s.x, None, last, layout)

    return stage


def identity_backward(layout: bool) -> Callable[[Stages, Data], Any]:
    def stage(stages: Stages, data: Data) -> Any:
        term = ConvTerm(data.conv_grad(M, OUT), data.weight(M, W, 1, 1), POINTWISE)
        return stages.input_dgrad(term, data.image(W, OUT), data.masked(), None, layout)

    return stage


def gram(stages: Stages, operand: Operand) -> list[Tensor]:
    """F3 in the accumulation dtype, in which the Triton kernels have it."""
    source = operand.x if isinstance(operand, StridedInput) else operand.y
    return [t.to(accumulation_dtype(source.dtype)) for t in stages.gram(operand)]


def folding(affine: bool) -> Callable[[Stages, Data], Any]:
    """What lies between the tail's stages, on coefficients of the right kind."""

    def stage(stages: Stages, data: Data) -> Any:
        weight, s = data.weight(W, M, 1, 1), data.weight(W, M).to(data.acc)
        gamma, beta = (data.vector(W), data.vector(W)) if affine else (None, None)
        mean_d, centre, sum_g = data.vector(M), data.vector(M), data.vector(W)
        root = data.weight(M, M).to(data.acc)
        cov = root @ root.t() / M
        bias = data.vector(W) if affine else None
        forward = stages.fold(weight, gamma, beta, bias, 1e-3, centre, mean_d, cov)
        folded, _, _, invstd, offset, weight_cov = forward
        a = stages.folded_weight(weight, gamma, invstd)
        assert torch.equal(a, folded.weight)
        backward = stages.fold_backward(
            weight, gamma, invstd, offset, centre, mean_d, weight_cov, a, s, sum_g, 100
        )
        return [*forward, *backward._replace(dweight=backward.dweight.to(weight.dtype))]

    return stage


STAGES: dict[str, Callable[[Stages, Data], Any]] = {
    "F1": lambda s, d: s.conv_forward(d.image(C, H), d.weight(M, C, 1, 1), POINTWISE),
    "F2": lambda s, d: s.conv_forward(d.activation(M, H), d.weight(M, M, 3, 3), CONV2),
    "F3": lambda s, d: gram(s, d.activation(M, H, centred=True)),
    "F3, strided input": lambda s, d: gram(s, d.strided()),
    "folding": folding(True),
    "folding, not affine": folding(False),
    "F4, identity": tail_forward(1, 1, True),
    "F4, downsample": tail_forward(2, 0, True),
    "F4, two residuals": tail_forward(0, 2, True),
    "F4, identity, product": tail_forward(0, 1, True, normalised=1),
    "F4, downsample, product": tail_forward(0, 0, True, normalised=2),
    "F4, downsample, one product": tail_forward(1, 0, True, normalised=1),
    "F4, contiguous product": tail_forward(0, 1, False, normalised=1),
    "F4, contiguous": tail_forward(1, 1, False),
    "B1, B2": wide_backward,
    "B1, product": lambda s, d: s.masked_reduce(
        d.masked(), d.image(W, OUT), d.vector(W), d.vector(W)
    ),
    "B2, product": product_backward,
    "B3": lambda s, d: s.conv_dgrad(
        d.conv_grad(M, OUT), d.weight(M, M, 3, 3), CONV2, d.activation(M, H), d.vector(M)
    ),
    "B3, fixed": lambda s, d: s.conv_dgrad(
        d.conv_grad(M, OUT, False), d.weight(M, M, 3, 3), CONV2, d.activation(M, H), d.vector(M)
    ),
    "B4": lambda s, d: s.conv_wgrad(
        d.conv_grad(M, OUT), d.activation(M, H), d.weight(M, M, 3, 3), CONV2
    ),
    "B5": lambda s, d: s.conv_wgrad(
        d.conv_grad(M, H), d.image(C, H), d.weight(M, C, 1, 1), POINTWISE
    ),
    "B6, downsample": input_backward(True, True, True),
    "B6, fixed downsample": input_backward(True, False, True),
    "B6, contiguous downsample": input_backward(True, True, False),
    "B6, no residual": input_backward(False, True, True),
    "B6, identity": identity_backward(True),
    "B6, contiguous identity": identity_backward(False),
    "activation": lambda s, d: s.activation(d.activation(M, H, centred=True), True),
    "activation, contiguous": lambda s, d: s.activation(d.activation(M, H), False),
    "relu backward": lambda s, d: s.relu_backward(d.image(M, H), d.activation(M, H), d.vector(M)),
    "masked grad": lambda s, d: s.masked_grad(d.masked()),
}


def tensors_of(result: Any) -> list[Tensor]:
    """All tensors of a nested result."""
    if isinstance(result, Tensor):
        return [result.clone()]
    return [t for part in result for t in tensors_of(part)]


IMPLEMENTATIONS: dict[str, type[Stages]] = {
    "cpu, all at once": CpuStages,
    "cpu, one image at a time": CpuStages,
    "vendor": VendorStages,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_stage(
    stage: str, dtype: torch.dtype, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation.endswith("one image at a time"):
        one_image_at_a_time(monkeypatch)
    with Stages() as plain:
        want = tensors_of(STAGES[stage](plain, Data(dtype)))
    with IMPLEMENTATIONS[implementation]() as stages:
        got = tensors_of(STAGES[stage](stages, Data(dtype)))
    tolerance = SAME_FORMULA[dtype]
    assert len(got) == len(want) > 0
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


def test_bits_above_the_last_channel() -> None:
    """They are ignored, whatever they are."""
    data = Data(torch.float64)
    grad = data.masked()
    dirty = grad._replace(mask=grad.mask.clone())
    dirty.mask[:, -1] |= 0xF8  # W = 19: three bits of the last byte are channels
    with CpuStages() as stages:
        want = stages.masked_grad(grad).clone()
        assert torch.equal(stages.masked_grad(dirty), want)


def test_pack_bits() -> None:
    live = torch.rand(9, 21) < 0.5
    mask = pack_bits(live)
    assert mask.dtype == torch.uint8
    assert mask.shape == (9, 3)
    for q in range(9):
        for w in range(21):
            assert bool((int(mask[q, w // 8]) >> (w % 8)) & 1) == bool(live[q, w])
    assert torch.equal(unpack_bits(mask, 21), live)
