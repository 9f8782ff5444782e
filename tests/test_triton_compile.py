"""Every kernel at the shipped configurations, compiled ahead of time for three architectures.

Needs no GPU. One case a test, for `make test` to run side by side: cold about three minutes on two
cores; Triton keeps what it compiled, by source and options, in build/triton.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import sass
from benchmarks.shapes import RESNET50
from fused_bottleneck import dispatch, rules
from fused_bottleneck.kernels.config import SHARED_MEMORY

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

CACHE = Path(__file__).resolve().parent.parent / "build" / "triton"
# Triton 3.6 does not compile for sm_100 (dispatch.py says so to users).
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
ARCHITECTURES = (90, 100, 80) if TRITON >= dispatch.OLDEST_TRITON_FOR_THEM else (90, 80)
PRECISIONS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
}
# float16 has bfloat16's blocks and its instructions but for the conversions: once is enough.
CASES = [(p, a) for a in ARCHITECTURES for p in PRECISIONS if p != "float16" or a == 90]
# Of it one block, which has every kernel; of exact float32 where it is not Hopper's a narrow, a
# wide and a strided block.
FEWER = {
    ("float16", 90): RESNET50[1:2],
    ("float32", 80): RESNET50[:3],
    ("float32", 100): RESNET50[:3],
}
# Kernels whose products are in exact float32 whatever the activations are.
EXACT = ("weight_cov", "operand_product")


@pytest.fixture
def precision_of_convolutions() -> Iterator[None]:
    """Restores what a test sets. (monkeypatch cannot: the setting is a property.)"""
    before = torch.backends.cudnn.conv.fp32_precision
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.slow
@pytest.mark.usefixtures("precision_of_convolutions")
@pytest.mark.parametrize(("precision", "architecture"), CASES)
def test_compiles_well(precision: str, architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No spills, no more shared memory than any GPU has, wgmma for 16-bit products on Hopper, and
    no product whose operand is overwritten while it runs."""
    from benchmarks import compiled  # imports triton

    if "TRITON_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    dtype, torch.backends.cudnn.conv.fp32_precision = PRECISIONS[precision]
    shapes = FEWER.get((precision, architecture), RESNET50)
    specs = compiled.shipped(dtype, architecture, shapes)
    assert len({spec.name for spec in specs}) >= 15  # every kernel
    for spec in specs:
        usage = compiled.compile_for(spec, architecture)
        where = f"{spec.name} {spec.blocks}: {usage}"
        assert usage.stack == 0, where
        assert usage.shared <= SHARED_MEMORY, where
        assert not usage.hazards, where
        is_16_bit = precision in ("bfloat16", "float16") and spec.name not in EXACT
        if architecture == 90 and is_16_bit and usage.products:
            assert usage.wgmma > 0, where


@pytest.mark.slow
def test_plain_operands_come_from_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 3x3 convolutions' products on Hopper: both operands copied ahead, asynchronously, in
    few instructions; computed on load they are in registers, and take three times as many."""
    from benchmarks import compiled

    if "TRITON_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    for written in (True, False):
        monkeypatch.setattr(rules, "LEAST_READS_TO_WRITE", 2 if written else 99)
        calls = compiled.step_calls(RESNET50[1], 256, torch.bfloat16)
        for spec in compiled.distinct(calls[0] + calls[1]):
            if "3x3" not in spec.variant:
                continue
            binary = compiled.build(spec, 90)
            code = compiled.machine_code(binary)
            _, stack = compiled._resources(binary.asm["cubin"])
            assert stack == 0
            assert not sass.hazards(code)
            assert sass.reads_registers(code) != written, spec.name
            for loop in code.loops:
                products, body = code.products(loop), code.body(loop)
                if products:
                    assert any(line.startswith("LDGSTS") for line in body), spec.name
                    assert (len(body) <= 45 * products) == written, spec.name


@pytest.mark.slow
def test_keys_are_those_of_launches() -> None:
    """What is compiled ahead is found by a launch: the sources of both have one hash.

    As a launch makes it, without a driver: by the parts of Triton's own (JITFunction.run).
    """
    from triton.backends.nvidia.compiler import CUDABackend, GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import create_function_from_signature

    from benchmarks import compiled

    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    forward, backward = compiled.step_calls(RESNET50[2], 256, torch.bfloat16)
    for call in forward + backward:
        spec = compiled.specialise(call)
        kernel = call.kernel
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        arguments = [
            torch.empty(64, dtype=a.dtype) if isinstance(a, torch.Tensor) else a
            for a in call.arguments
        ]
        options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
        keywords = call.constants | options | {"debug": False, "instrumentation_mode": ""}
        bound, specialisation, rest = bind(*arguments, **keywords)
        parsed, signature, constants, attributes = kernel._pack_args(
            backend, keywords, bound, specialisation, rest
        )
        launched = ASTSource(kernel, signature, constants, attributes)
        assert compiled.source(spec).hash() == launched.hash(), spec.name
        assert backend.parse_options(options).hash() == parsed.hash(), spec.name


@pytest.mark.slow
def test_warm_up_covers_a_step() -> None:
    """All kernels of a block under autocast and of one in bfloat16 altogether."""
    from benchmarks import compiled, warm_up

    ahead = set(warm_up.specialisations(["bf16"], 90))
    for affine in (torch.float32, torch.bfloat16):
        calls = compiled.step_calls(RESNET50[3], 64, torch.bfloat16, affine=affine)
        assert set(compiled.distinct(calls[0] + calls[1])) <= ahead


LISTING = """
.L_x_0:
        /*0000*/                   LDS.64 R4, [R2] ;
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
{wait}
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("wait", "expected"), [("", 2), ("gsb0, 0x1", 2), ("gsb0, 0x0", 0)], ids=str
)
def test_hazards_are_found(wait: str, expected: int) -> None:
    """A loop whose head loads into the registers that the last step's product still reads."""
    line = f"        /*0030*/                   WARPGROUP.DEPBAR.LE {wait} ;" if wait else ""
    code = sass.parse(LISTING.format(wait=line))
    assert [code.products(loop) for loop in code.loops] == [1]
    assert len(sass.hazards(code)) == expected
