"""pytest-benchmark cases: `python -m pytest benchmarks`, to compare revisions on one machine.

`python -m benchmarks.bench_block` compares the variants with each other.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import MEMORY_FORMATS, build_cases, build_inputs
from benchmarks.shapes import RESNET50, SHAPES

BATCH = 4
ROUNDS = 5


@pytest.mark.parametrize("phase", ["forward", "step"])
@pytest.mark.parametrize("layout", MEMORY_FORMATS)
@pytest.mark.parametrize("kind", ["reference", "fused"])
@pytest.mark.parametrize("shape", [shape.name for shape in RESNET50])
def test_block(benchmark: BenchmarkFixture, shape: str, kind: str, layout: str, phase: str) -> None:
    """One forward, or one training step, of one variant in float32 on the CPU."""
    benchmark.group = f"{shape} {phase}"
    cases = build_cases(build_inputs(SHAPES[shape], BATCH, torch.float32, torch.device("cpu")))
    run = getattr(cases[f"{kind} {layout}"], phase)
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
