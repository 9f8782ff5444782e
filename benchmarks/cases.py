"""The four variants of a block that are timed side by side, their agreement and their memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.shapes import BlockShape
from fused_bottleneck import Bottleneck, FusedBottleneck

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BASELINE = "reference contiguous"

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


@dataclass(frozen=True)
class Case:
    """A block with an input and an output gradient, both in the layout of its variant."""

    block: nn.Module
    x: Tensor
    grad_out: Tensor

    def forward(self) -> Tensor:
        """One forward pass that keeps what its backward needs."""
        return self.block(self.x)

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward: gradients of the input and of every parameter."""
        inputs = [self.x, *self.block.parameters()]
        return torch.autograd.grad(self.block(self.x), inputs, self.grad_out)


def build_cases(
    shape: BlockShape, batch: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> dict[str, Case]:
    """`{"reference contiguous": ..., ...}`: reference and fused, each contiguous and channels_last.

    All start from the same parameters and see the same input and output gradient. The affine
    parameters of the batch norms are drawn at random, so that none of them multiplies by one.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    master = _new_block(Bottleneck, shape)
    for module in master.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0.0, 0.2, generator=generator)
    x = torch.randn(batch, shape.in_channels, shape.size, shape.size, generator=generator)
    grad_out = torch.randn(
        batch, shape.out_channels, shape.out_size, shape.out_size, generator=generator
    )
    cases = {}
    for kind, block_type in (("reference", Bottleneck), ("fused", FusedBottleneck)):
        for layout, memory_format in MEMORY_FORMATS.items():
            block = _new_block(block_type, shape).to(device, dtype)
            block.load_state_dict(master.state_dict())
            cases[f"{kind} {layout}"] = Case(
                # torch's annotations of Module.to leave memory_format out.
                block.to(memory_format=memory_format),  # type: ignore[call-overload]
                x.detach().to(device, dtype, memory_format=memory_format).requires_grad_(),
                grad_out.to(device, dtype, memory_format=memory_format),
            )
    return cases


def _new_block(block_type: type[Bottleneck], shape: BlockShape) -> Bottleneck:
    downsample = None
    if shape.downsample:
        downsample = nn.Sequential(
            nn.Conv2d(shape.in_channels, shape.out_channels, 1, shape.stride, bias=False),
            nn.BatchNorm2d(shape.out_channels),
        )
    return block_type(shape.in_channels, shape.width, downsample, shape.stride)


def composed_reasons(cases: Mapping[str, Case]) -> list[str]:
    """Why a fused variant would run its composed forward instead, one line each; empty if none."""
    reasons = {
        name: case.block.why_not_fused(case.x)
        for name, case in cases.items()
        if isinstance(case.block, FusedBottleneck)
    }
    return [f"{name} would run unfused: {reason}" for name, reason in reasons.items() if reason]


def disagreements(cases: Mapping[str, Case], dtype: torch.dtype) -> list[str]:
    """Tensors in which a variant leaves `NORM_BOUNDS[dtype]` around the baseline, one line each.

    Runs one training step of every variant and compares the output and all gradients.
    """
    expected = _step_results(cases[BASELINE])
    scales = _scales(expected)
    lines = []
    for name, case in cases.items():
        if name == BASELINE:
            continue
        for key, actual in _step_results(case).items():
            bound = NORM_BOUNDS[dtype][0 if key == "output" else 1]
            error = _norm(actual.double() - expected[key].double()) / scales[key]
            if not error <= bound:  # also when it is NaN
                lines.append(f"{name}: {key} is off by {error:.1e}, the bound is {bound:.0e}")
    return lines


def _step_results(case: Case) -> dict[str, Tensor]:
    out = case.block(case.x)
    parameters = dict(case.block.named_parameters())
    grads = torch.autograd.grad(out, [case.x, *parameters.values()], case.grad_out)
    names = ["grad_x", *(f"grad of {name}" for name in parameters)]
    return {"output": out.detach(), **dict(zip(names, grads, strict=True))}


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


def saved_bytes(case: Case) -> int:
    """Bytes of the distinct storages that one forward keeps for backward.

    The input counts, the block's own parameters and buffers do not.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in case.block.state_dict().values()}
    # The storages are held until the count is done: a freed address could be handed out again.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = case.forward()
    del out
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(case: Case) -> int | None:
    """Most device memory that one step allocates beyond what was there; None on the CPU."""
    if case.x.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
