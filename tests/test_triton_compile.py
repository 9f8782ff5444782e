"""Every kernel at every shipped configuration, compiled ahead of time for three architectures.

Needs no GPU. Two processes, cold about three minutes; Triton keeps what it compiled, by source and
options, in build/triton.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
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
PROCESSES = 2
# Kernels whose products are in exact float32 whatever the activations are.
EXACT = ("fold", "fold_backward", "operand_product")

# Name, blocks, and the figures of benchmarks.compiled.Usage.
Row = tuple[str, str, dict[str, int]]


def compile_all(precision: str, architecture: int) -> list[Row]:
    """In a process of its own: the usage of every kernel for one architecture."""
    from dataclasses import asdict

    from benchmarks.compiled import compile_for, shipped

    dtype, torch.backends.cudnn.conv.fp32_precision = PRECISIONS[precision]
    rows = shipped(dtype, architecture)
    return [(spec.name, spec.blocks, asdict(compile_for(spec, architecture))) for spec in rows]


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[tuple[str, int], Future[list[Row]]]]:
    """The usages by precision and architecture, as they get ready."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        yield {
            (precision, architecture): pool.submit(compile_all, precision, architecture)
            for precision, architecture in CASES
        }


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "architecture"), CASES)
def test_compiles_well(
    precision: str,
    architecture: int,
    compiled: dict[tuple[str, int], Future[list[Row]]],
) -> None:
    """No spills, no more shared memory than any GPU has, wgmma for 16-bit products on Hopper."""
    rows = compiled[precision, architecture].result()
    assert len({name for name, _, _ in rows}) >= 15  # every kernel
    for name, blocks, usage in rows:
        where = f"{name} {blocks}: {usage}"
        assert usage["stack"] == 0, where
        assert usage["shared"] <= SHARED_MEMORY, where
        is_16_bit = precision in ("bfloat16", "float16") and name not in EXACT
        if architecture == 90 and is_16_bit and usage["products"]:
            assert usage["wgmma"] > 0, where
