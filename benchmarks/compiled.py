"""Kernels compiled ahead of time, without a GPU: what a training step calls, and what it costs.

A step runs on meta tensors while its kernel calls are recorded; each distinct specialisation is
then compiled for a named architecture, and the cubin is read with the tools in Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.sass import Code, disassemble, hazards
from benchmarks.shapes import RESNET50, BlockShape
from fused_bottleneck import program
from fused_bottleneck.kernels.config import assumed_architecture
from fused_bottleneck.kernels.launch import Call, recording
from fused_bottleneck.operands import POINTWISE, Geometry
from fused_bottleneck.units import Unit

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
}
ALIGNMENT = 16  # bytes of a pointer, or units of an integer, that the compiler is told of


def step_calls(
    shape: BlockShape,
    batch: int,
    dtype: torch.dtype,
    architecture: int = 90,
    fixed: bool = False,
    affine: torch.dtype = torch.float32,
) -> tuple[list[Call], list[Call]]:
    """The kernel calls of one training step of a block on an architecture: forward, backward.

    fixed: with fixed statistics, and a given shortcut in place of the identity. affine: the
    element type of the normalisations' parameters.
    """
    x = _meta(dtype, batch, shape.in_channels, shape.size, shape.size)
    units = _units(shape, dtype, fixed, affine)
    out = _meta(dtype, batch, shape.out_channels, shape.out_size, shape.out_size)
    shortcut = out if fixed and not shape.downsample else None
    identity = shortcut is None and not shape.downsample
    needs = [True] * len(units)
    with assumed_architecture(divmod(architecture, 10)):
        with recording() as forward:
            _, saved, _ = program.bottleneck_forward(x, shortcut, units, True)
        with recording() as backward:
            program.bottleneck_backward(
                out, x, units, saved, True, shortcut is not None, needs, identity, True
            )
    return forward, backward


def unit_calls(
    dtype: torch.dtype, architecture: int = 90, affine: torch.dtype = torch.float32
) -> list[Call]:
    """The kernel calls of one training step of standalone conv+BN+ReLU units."""
    calls: list[Call] = []
    for kernel, geometry in ((1, POINTWISE), (3, Geometry((2, 2), (1, 1)))):
        x = _meta(dtype, 32, 64, 56, 56)
        unit = _unit(dtype, 128, 64, kernel, geometry, False, affine)
        with assumed_architecture(divmod(architecture, 10)), recording() as made:
            out, saved, _ = program.conv_bn_relu_forward(x, unit, True)
            program.conv_bn_relu_backward(out, x, unit, saved, True, True, True)
        calls += made
    return calls


def _meta(dtype: torch.dtype, *size: int) -> Tensor:
    memory = torch.channels_last if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=memory)


def _unit(
    dtype: torch.dtype,
    out: int,
    channels: int,
    kernel: int,
    geometry: Geometry,
    fixed: bool,
    affine: torch.dtype,
) -> Unit:
    gamma, beta, mean, var = (_meta(affine, out) for _ in range(4))
    weight = _meta(dtype, out, channels, kernel, kernel)
    unit = Unit(weight, gamma, beta, geometry, not fixed, eps=1e-5)
    return unit._replace(fixed_mean=mean, fixed_var=var) if fixed else unit


def _units(shape: BlockShape, dtype: torch.dtype, fixed: bool, affine: torch.dtype) -> list[Unit]:
    width, wide = shape.width, shape.out_channels
    stride = (shape.stride, shape.stride)
    sizes = [
        (width, shape.in_channels, 1, POINTWISE),
        (width, width, 3, Geometry(stride, (1, 1))),
        (wide, width, 1, POINTWISE),
    ]
    if shape.downsample:
        sizes.append((wide, shape.in_channels, 1, Geometry(stride)))
    return [_unit(dtype, *size, fixed, affine) for size in sizes]


def shipped(
    dtype: torch.dtype,
    architecture: int,
    shapes: Sequence[BlockShape] = RESNET50,
    batch: int = 256,
) -> list[Specialisation]:
    """Everything that is compiled for blocks of these shapes and for standalone units, and on
    Hopper for frozen blocks of the first three shapes: they have fewer operands.
    """
    calls = unit_calls(dtype, architecture)
    cases = [(shape, False) for shape in shapes]
    if architecture == 90:
        cases += [(shape, True) for shape in shapes[:3]]
    for shape, fixed in cases:
        forward, backward = step_calls(shape, batch, dtype, architecture, fixed)
        calls += forward + backward
    return distinct(calls)


@dataclass(frozen=True)
class Specialisation:
    """A kernel as the compiler sees one call of it: what distinguishes its binaries."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """The kernel's name without its decoration."""
        return self.kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")

    @property
    def blocks(self) -> str:
        """Block sizes, warps and stages, as `128x64x64 w4 s3`."""
        sizes = [str(value) for name, value in self.constants if name.startswith("BLOCK")]
        return f"{'x'.join(sizes)} w{self.num_warps} s{self.num_stages}"

    @property
    def variant(self) -> str:
        """What else distinguishes it: a residual's kind, taps, strides, an operand's kind."""
        constants = dict(self.constants)
        parts = [str(constants[name]) for name in ("RESIDUAL",) if name in constants]
        if constants.get("HAS_DOWNSAMPLE"):
            parts.append("downsample")
        if constants.get("KH", 1) * constants.get("KW", 1) > 1:
            parts.append(f"{constants['KH']}x{constants['KW']}")
        if constants.get("SH", 1) * constants.get("SW", 1) > 1:
            parts.append(f"stride {constants['SH']}")
        if "scale_ptr" in constants:
            parts.append("input operand")
        return ", ".join(parts)

    @property
    def dtype(self) -> str:
        """The element type of its first operand."""
        return next(kind[1:] for _, kind in self.signature if kind.startswith("*"))


def specialise(call: Call) -> Specialisation:
    """What Triton's launcher would compile for a call: its rules for pointers and integers."""
    kernel = call.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    values = dict(zip(kernel.arg_names, call.arguments, strict=False)) | call.constants
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind = _kind(value, parameter.is_constexpr, parameter.do_not_specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, Tensor) or _is_aligned(value, parameter.do_not_specialize):
            aligned.append(i)
    return Specialisation(
        kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(aligned),
        call.config.num_warps,
        call.config.num_stages,
    )


def _is_aligned(value: int | float, unspecialised: bool) -> bool:
    return isinstance(value, int) and value % ALIGNMENT == 0 and not unspecialised


def _kind(value: Any, is_constant: bool, unspecialised: bool) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if is_constant or value is None or (value == 1 and not unspecialised):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if value < 2**31 else "i64"


@dataclass(frozen=True)
class Usage:
    """Registers per thread, bytes of stack per thread (spills), shared memory; wgmma in the PTX,
    products in the intermediate code, and what writes to operands of running products (sass.py).
    """

    registers: int
    stack: int
    shared: int
    wgmma: int
    products: int
    hazards: tuple[str, ...] = ()


def source(spec: Specialisation) -> ASTSource:
    """The compiler's input, with the hash that a launch's has.

    That has, in the order of the arguments, attributes for every constant too, empty ones; before
    Triton 3.7 only for the constants that are strings.
    """
    kinds, constants = dict(spec.signature), dict(spec.constants)
    before_3_7 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    attributes: dict[tuple[int], list[list[str | int]]] = {}
    for i, name in enumerate(spec.kernel.arg_names):
        if i in spec.aligned:
            attributes[(i,)] = [["tt.divisibility", ALIGNMENT]]
        elif kinds[name] == "constexpr" and (isinstance(constants[name], str) or not before_3_7):
            attributes[(i,)] = []
    return ASTSource(spec.kernel, kinds, constants, attributes)


def build(spec: Specialisation, architecture: int) -> Any:
    """Compile for an NVIDIA architecture, 80, 90 or 100, or take it from Triton's cache."""
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source(spec), target=target, options=options)


def compile_for(spec: Specialisation, architecture: int) -> Usage:
    """What the compiler makes of a kernel for an architecture."""
    binary = build(spec, architecture)
    registers, stack = _resources(binary.asm["cubin"])
    ptx, ttgir = binary.asm["ptx"], binary.asm["ttgir"]
    products = len(re.findall(r"(?:tt\.dot|warp_group_dot|tc_gen5_mma)\b", ttgir))
    wgmma = ptx.count("wgmma.mma_async")
    found = tuple(hazards(machine_code(binary))) if wgmma else ()
    return Usage(registers, stack, binary.metadata.shared, wgmma, products, found)


def machine_code(binary: Any) -> Code:
    """The machine code of what ``build`` returns."""
    return disassemble(binary.asm["cubin"], str(tool("nvdisasm")))


def _resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool("cuobjdump")), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


@cache
def tool(name: str) -> Path:
    """A CUDA tool from Triton's wheel."""
    root = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    found = sorted(root.glob(f"{name}*"))
    if not found:
        raise FileNotFoundError(f"{name} is not in {root}")
    return found[0]


def distinct(calls: Sequence[Call]) -> list[Specialisation]:
    """The specialisations of calls, each once, in their order."""
    return list(dict.fromkeys(specialise(call) for call in calls))
