"""The block in JAX, compiled by XLA, in its own NHWC layout: a peer of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from jax import lax
from torch import Tensor, nn

from benchmarks.cases import Case, Inputs
from fused_bottleneck import Bottleneck

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
IMAGE_AXES = (0, 2, 3, 1)  # of torch's NCHW, in the order NHWC
WEIGHT_AXES = (2, 3, 1, 0)  # of torch's OIHW, in the order HWIO
Parameters = dict[str, Any]


class Unit(NamedTuple):
    """A convolution and its normalisation: their names in the block, stride, groups."""

    conv: str
    norm: str
    stride: int
    groups: int


def _units(inputs: Inputs) -> list[Unit]:
    shape = inputs.shape
    units = [
        Unit("conv1", "bn1", 1, 1),
        Unit("conv2", "bn2", shape.stride, shape.groups),
        Unit("conv3", "bn3", 1, 1),
    ]
    if shape.downsample:
        units.append(Unit("identity_downsample.0", "identity_downsample.1", shape.stride, 1))
    return units


def _normalised(
    x: Any, unit: Unit, parameters: Parameters, statistics: Parameters, updated: Parameters
) -> Any:
    """``bn(conv(x))`` with batch statistics in float32; the running ones go into updated."""
    weight = parameters[f"{unit.conv}.weight"]
    padding = weight.shape[0] // 2
    y = lax.conv_general_dilated(
        x,
        weight,
        (unit.stride, unit.stride),
        [(padding, padding)] * 2,
        dimension_numbers=DIMENSIONS,
        feature_group_count=unit.groups,
    )
    if f"{unit.conv}.bias" in parameters:
        y = y + parameters[f"{unit.conv}.bias"]
    wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    unbiased = var * (y.size / y.shape[-1]) / (y.size / y.shape[-1] - 1)
    for name, value in (("running_mean", mean), ("running_var", unbiased)):
        key = f"{unit.norm}.{name}"
        updated[key] = 0.9 * statistics[key] + 0.1 * value
    scale = parameters[f"{unit.norm}.weight"] * lax.rsqrt(var + 1e-5)
    return ((wide - mean) * scale + parameters[f"{unit.norm}.bias"]).astype(y.dtype)


def block_function(units: list[Unit]) -> Callable[..., Any]:
    """The block: (x, parameters, running statistics) to (out, new running statistics)."""

    def block(x: Any, parameters: Parameters, statistics: Parameters) -> Any:
        updated: Parameters = {}
        state = (parameters, statistics, updated)
        out = jax.nn.relu(_normalised(x, units[0], *state))
        out = jax.nn.relu(_normalised(out, units[1], *state))
        out = _normalised(out, units[2], *state)
        shortcut = _normalised(x, units[3], *state) if len(units) > 3 else x
        return jax.nn.relu(out + shortcut), updated

    return block


class JaxCase(Case):
    """The jitted block; its runs return when the device is done."""

    def __init__(
        self, block: Callable[..., Any], x: Any, grad_out: Any, parameters: Any, statistics: Any
    ) -> None:
        self._arguments = (x, parameters, statistics)
        self._grad_out = grad_out

        def forward(x: Any, parameters: Any, statistics: Any) -> Any:
            """Out, running statistics, and the pullback: what backward needs is kept."""
            out, pullback, updated = jax.vjp(
                lambda x, parameters: block(x, parameters, statistics), x, parameters, has_aux=True
            )
            return out, updated, pullback

        def step(grad_out: Any, *arguments: Any) -> Any:
            out, updated, pullback = forward(*arguments)
            return out, updated, pullback(grad_out)

        self._forward = jax.jit(forward)
        self._step = jax.jit(step)

    def forward(self) -> Any:
        return jax.block_until_ready(self._forward(*self._arguments))

    def step(self) -> Any:
        return jax.block_until_ready(self._step(self._grad_out, *self._arguments))

    def results(self) -> dict[str, Tensor]:
        out, _, (grad_x, grads) = self.step()
        named = {f"grad of {name}": _tensor(grad, WEIGHT_AXES) for name, grad in grads.items()}
        return {
            "output": _tensor(out, IMAGE_AXES),
            "grad_x": _tensor(grad_x, IMAGE_AXES),
            **named,
        }


def jax_case(inputs: Inputs) -> JaxCase:
    """The block with the inputs' parameters, in their dtype, on their device."""
    block = inputs.block(Bottleneck, "contiguous")
    parameters = {name: _array(p, WEIGHT_AXES) for name, p in block.named_parameters()}
    statistics = {
        f"{name}.{key}": _array(getattr(module, key), WEIGHT_AXES)
        for name, module in block.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key in ("running_mean", "running_var")
    }
    x, grad_out = (_array(image, IMAGE_AXES) for image in (inputs.x, inputs.grad_out))
    return JaxCase(block_function(_units(inputs)), x, grad_out, parameters, statistics)


def _array(tensor: Tensor, axes: Sequence[int]) -> Any:
    """As a JAX array, with four axes in that order."""
    tensor = tensor.detach()
    moved = tensor.permute(*axes).contiguous() if tensor.dim() == 4 else tensor.clone()
    return jax.dlpack.from_dlpack(moved)


def _tensor(array: Any, axes: Sequence[int]) -> Tensor:
    """The inverse of `_array`."""
    tensor = torch.from_dlpack(array)
    if tensor.dim() != 4:
        return tensor
    return tensor.permute(*(axes.index(axis) for axis in range(4)))
