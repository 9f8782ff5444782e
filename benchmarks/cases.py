"""The variants of a block that are timed side by side, their agreement and their memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.shapes import BlockShape
from fused_bottleneck import Bottleneck, FusedBottleneck

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BASELINE = "reference contiguous"
BLOCKS: dict[str, type[Bottleneck]] = {"reference": Bottleneck, "fused": FusedBottleneck}

# Largest relative error of a variant against the baseline, in the Euclidean norm over the whole
# tensor: (output, gradients). The output differs by rounding only. A ReLU whose input is within
# rounding of zero may open in one variant and close in the other; if a fraction f of elements
# flips, a gradient moves by about sqrt(f): f ~ 1e-6 in float32, ~ 1e-2 in bfloat16. Seen over
# ResNet-50's shapes: 1e-6 and 4e-4 in float32, 8e-4 and 3e-2 in float16, 7e-3 and 1e-1 in bfloat16.
NORM_BOUNDS = {
    torch.float64: (1e-12, 1e-9),
    torch.float32: (5e-6, 5e-3),
    torch.float16: (3e-3, 1e-1),
    torch.bfloat16: (2e-2, 2.5e-1),
}


def norm_bounds(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """`NORM_BOUNDS` of what convolutions compute in: tf32 has float16's mantissa."""
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    if dtype == torch.float32 and device.type == "cuda" and precision == "tf32":
        return NORM_BOUNDS[torch.float16]
    return NORM_BOUNDS[dtype]


class Case(ABC):
    """One variant of a block with its input and output gradient, ready to run."""

    @abstractmethod
    def forward(self) -> object:
        """One forward pass that keeps what its backward needs."""

    @abstractmethod
    def step(self) -> object:
        """Forward and backward: gradients of the input and of every parameter."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """One step's "output", "grad_x" and "grad of NAME" for the reference's parameters."""

    def saved_bytes(self) -> int | None:
        """Bytes that one forward keeps for backward; None where that cannot be seen."""
        return None

    def peak_bytes(self) -> int | None:
        """Most device memory of a step beyond what was there; None where that cannot be seen."""
        return None


@dataclass(frozen=True)
class TorchCase(Case):
    """A block of modules. call: what runs it, if not the block itself (its compiled form)."""

    block: nn.Module
    x: Tensor
    grad_out: Tensor
    call: Callable[[Tensor], Tensor] | None = None

    def forward(self) -> Tensor:
        return (self.call or self.block)(self.x)

    def step(self) -> tuple[Tensor, ...]:
        inputs = [self.x, *self.block.parameters()]
        return torch.autograd.grad(self.forward(), inputs, self.grad_out)

    def results(self) -> dict[str, Tensor]:
        out = self.forward()
        parameters = dict(self.block.named_parameters())
        grads = torch.autograd.grad(out, [self.x, *parameters.values()], self.grad_out)
        names = ["grad_x", *(f"grad of {name}" for name in parameters)]
        return {"output": out.detach(), **dict(zip(names, grads, strict=True))}

    def saved_bytes(self) -> int:
        return memory.saved_bytes(self.forward, self.block.state_dict().values())

    def peak_bytes(self) -> int | None:
        return memory.peak_bytes(self.step, self.x.device)


class Inputs(NamedTuple):
    """What every variant of a block starts from: parameters, input, output gradient.

    master: the reference in float32 on the CPU; its batch norms' affine parameters are random, so
    that none of them multiplies by one. x, grad_out: contiguous, in the run's dtype and device.
    """

    shape: BlockShape
    bias: bool
    master: Bottleneck
    x: Tensor
    grad_out: Tensor

    def block(self, kind: type[Bottleneck], layout: str) -> Bottleneck:
        """A block of that class with the master's parameters."""
        block = new_block(kind, self.shape, self.bias).to(self.x.device, self.x.dtype)
        block.load_state_dict(self.master.state_dict())
        # torch's annotations of Module.to leave memory_format out.
        return block.to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]

    def case(self, kind: type[Bottleneck], layout: str) -> TorchCase:
        """The block with its input and output gradient in that layout."""
        memory_format = MEMORY_FORMATS[layout]
        x = self.x.detach().contiguous(memory_format=memory_format).requires_grad_()
        grad_out = self.grad_out.contiguous(memory_format=memory_format)
        return TorchCase(self.block(kind, layout), x, grad_out)


def build_inputs(
    shape: BlockShape,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool = True,
    seed: int = 0,
) -> Inputs:
    """Inputs of `batch` images, the same for the same seed on the same device.

    bias: of the convolutions. The plain block has biases by default, networks have none.
    """
    torch.manual_seed(seed)
    master = new_block(Bottleneck, shape, bias)
    for module in master.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    generator = torch.Generator(device).manual_seed(seed)

    def image(channels: int, size: int) -> Tensor:
        sizes = (batch, channels, size, size)
        return torch.randn(sizes, device=device, dtype=dtype, generator=generator)

    x = image(shape.in_channels, shape.size)
    return Inputs(shape, bias, master, x, image(shape.out_channels, shape.out_size))


def build_cases(inputs: Inputs) -> dict[str, Case]:
    """`{"reference contiguous": ..., ...}`: reference and fused, each contiguous and channels_last,
    the two of a layout on the same input."""
    cases: dict[str, Case] = {}
    for kind in BLOCKS:
        for layout in MEMORY_FORMATS:
            case = build_case(inputs, f"{kind} {layout}")
            twin = cases.get(f"reference {layout}")
            if isinstance(twin, TorchCase):
                case = TorchCase(case.block, twin.x, twin.grad_out)
            cases[f"{kind} {layout}"] = case
    return cases


def build_case(inputs: Inputs, name: str) -> TorchCase:
    """The variant of that name, as in `build_cases`."""
    kind, layout = name.split(" ")
    return inputs.case(BLOCKS[kind], layout)


def new_block(kind: type[Bottleneck], shape: BlockShape, bias: bool) -> Bottleneck:
    """A block of that class and shape; bias: of its three convolutions."""
    downsample = None
    if shape.downsample:
        downsample = nn.Sequential(
            nn.Conv2d(shape.in_channels, shape.out_channels, 1, shape.stride, bias=False),
            nn.BatchNorm2d(shape.out_channels),
        )
    return kind(
        shape.in_channels,
        shape.width,
        downsample,
        shape.stride,
        bias=bias,
        groups=shape.groups,
        expansion=shape.expansion,
    )


def composed_reasons(cases: Mapping[str, Case]) -> list[str]:
    """Why a fused variant would run its composed forward instead, one line each; empty if none."""
    reasons = {
        name: case.block.why_not_fused(case.x)
        for name, case in cases.items()
        if isinstance(case, TorchCase) and isinstance(case.block, FusedBottleneck)
    }
    return [f"{name} would run unfused: {reason}" for name, reason in reasons.items() if reason]


def disagreements(
    cases: Mapping[str, Case], bounds: tuple[float, float], expected: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """By variant, the tensors that leave `bounds` around the expected ones, one line each.

    Runs one training step of every variant and compares the output and all gradients. Variants
    that agree are left out.
    """
    scales = _scales(expected)
    found: dict[str, list[str]] = {}
    for name, case in cases.items():
        lines = []
        actual = case.results()
        for key, tensor in expected.items():
            bound = bounds[0 if key == "output" else 1]
            error = _norm(actual[key].double() - tensor.double()) / scales[key]
            if not error <= bound:  # also when it is NaN
                lines.append(f"{name}: {key} is off by {error:.1e}, the bound is {bound:.0e}")
        if lines:
            found[name] = lines
    return found


def _scales(expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm that each tensor's error is measured in: its own, or its layer's if larger.

    The gradient of a convolution bias before a batch norm is exactly zero, and rounding noise
    where it is computed: only the gradient of the same layer's weight gives it a scale.
    """
    norms = {key: _norm(tensor) for key, tensor in expected.items()}
    return {
        key: max(norm, norms.get(key.removesuffix("bias") + "weight", 0.0))
        for key, norm in norms.items()
    }


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
