"""Synchronised normalisations: several processes compute what one does on the whole batch."""

from __future__ import annotations

import pytest
import torch
from helpers import Case, assert_equal_float64, grad_like
from ranks import Pool
from sync_helpers import Job, UnitCase, joined, noise, output_grads, rank_steps

UNIT = UnitCase(channels=6, width=5, stride=2, size=(0, 7, 6))
IDENTITY = Case(size=(0, 6, 5))
DOWNSAMPLE = Case(channels=6, stride=2, downsample="conv", size=(0, 7, 6))
CASES = {
    "identity": IDENTITY,
    "downsample": DOWNSAMPLE,
    "pool": Case(channels=6, stride=2, downsample="pool", size=(0, 7, 6)),
    "module": Case(downsample="module", size=(0, 5, 4)),
    "conv3": Case(channels=6, stride=2, downsample="conv3", size=(0, 7, 6)),
    "groups": Case(width=4, size=(0, 6, 5), options={"groups": 2}),
    "dilation": Case(size=(0, 7, 6), options={"dilation": 2}),
    "no bias": Case(channels=6, stride=2, downsample="conv", bias=False, size=(0, 7, 6)),
    "unit": UNIT,
}


def assert_as_one_process(pool: Pool, job: Job) -> None:
    """Each rank's gradients are the oracle's, and all together those of the plain block."""
    whole = job.whole()
    results = pool.run(job.world, rank_steps, job, output_grads(job, whole))
    for fused, oracle in results:
        assert_equal_float64(fused, oracle)
    ranks = [fused for fused, _ in results]
    assert_equal_float64(joined(ranks), whole, noise=noise(job))
    for name, buffer in whole.buffers.items():
        for rank in ranks[1:]:
            torch.testing.assert_close(rank.buffers[name], buffer, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_step(pool: Pool, case: str, backend: str) -> None:
    assert_as_one_process(pool, Job(CASES[case], backend=backend))


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("downsample", "affine False"),
        ("downsample", "momentum None"),
        ("downsample", "frozen bn2"),
        ("downsample", "frozen downsample"),
        ("downsample", "frozen weights"),
        ("downsample", "eval"),
        ("unit", "momentum None"),
        ("unit", "eval"),
    ],
)
def test_modes(pool: Pool, case: str, change: str) -> None:
    assert_as_one_process(pool, Job(CASES[case], change=change))


SPLITS = {
    "equal": (2, 2),
    "one empty": (4, 0),
    "three": (1, 3, 1),
    "three, the first empty": (0, 2, 1),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", ["identity", "downsample", "unit"])
def test_splits(pool: Pool, case: str, split: str, layout: str) -> None:
    last = layout == "channels_last"
    assert_as_one_process(pool, Job(CASES[case], SPLITS[split], channels_last=last))
