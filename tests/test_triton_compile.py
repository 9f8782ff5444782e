"""Every kernel at every shipped configuration, compiled ahead of time for three architectures.

Needs no GPU. One case a test, for `make test` to run side by side: cold about three minutes on two
cores; Triton keeps what it compiled, by source and options, in build/triton.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fused_bottleneck import dispatch
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
# Kernels whose products are in exact float32 whatever the activations are.
EXACT = ("fold", "fold_backward", "operand_product")


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
    """No spills, no more shared memory than any GPU has, wgmma for 16-bit products on Hopper."""
    from benchmarks import compiled  # imports triton

    if "TRITON_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    dtype, torch.backends.cudnn.conv.fp32_precision = PRECISIONS[precision]
    specs = compiled.shipped(dtype, architecture)
    assert len({spec.name for spec in specs}) >= 15  # every kernel
    for spec in specs:
        usage = compiled.compile_for(spec, architecture)
        where = f"{spec.name} {spec.blocks}: {usage}"
        assert usage.stack == 0, where
        assert usage.shared <= SHARED_MEMORY, where
        is_16_bit = precision in ("bfloat16", "float16") and spec.name not in EXACT
        if architecture == 90 and is_16_bit and usage.products:
            assert usage.wgmma > 0, where
