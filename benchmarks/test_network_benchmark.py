"""pytest-benchmark cases of a network's training step, to compare revisions on one machine."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.bench_resnet50 import EAGER, make_step, parse_arguments

BATCH = 4
ROUNDS = 3


@pytest.mark.parametrize("variant", EAGER)
def test_resnet50(benchmark: BenchmarkFixture, variant: str) -> None:
    """One training step of ResNet-50 at 128 pixels, in float32 on the CPU."""
    benchmark.group = "resnet50"
    _, step = make_step(variant, parse_arguments(["--quick", "--size", "128"]), BATCH)
    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
