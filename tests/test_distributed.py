"""Synchronised normalisations: several processes compute what one does on the whole batch."""

from __future__ import annotations

import copy
import os
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import (
    CRITERION_SEEDS,
    Case,
    Result,
    assert_equal_float64,
    run,
)
from model_helpers import assert_close, images, small_resnet, step
from ranks import Pool, RankFailed
from sync_helpers import (
    WIDE,
    Job,
    UnitCase,
    assert_by_criterion,
    joined,
    noise,
    output_grads,
    rank_step,
    rank_steps,
)
from test_benchmarks import TINY, TINY_DOWNSAMPLE
from tolerances import FLOAT64, float64_offset
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_bottleneck as fb
from benchmarks import collective_model
from benchmarks.cases import new_block
from benchmarks.shapes import BlockShape
from fused_bottleneck import FusedBottleneck
from fused_bottleneck.functional import BatchNorm, Conv, bottleneck

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
    for rank in ranks[1:]:
        assert_equal_float64(rank._replace(out=whole.out, grads={}), whole._replace(grads={}))


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


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", ["identity", "downsample", "unit"])
def test_splits(pool: Pool, case: str, split: str, layout: str) -> None:
    last = layout == "channels_last"
    assert_as_one_process(pool, Job(CASES[case], SPLITS[split], channels_last=last))


@pytest.mark.parametrize("case", ["downsample", "unit"])
def test_no_rank_has_a_batch(pool: Pool, case: str) -> None:
    """Gradients are zero, and nothing becomes NaN."""
    job = Job(CASES[case], (0, 0))
    for result in pool.run(2, rank_step, job, [None, None]):
        assert all(t.isfinite().all() for t in result.tensors().values())
        assert not any(grad.any() for grad in result.grads.values() if grad is not None)


SIZES = {
    "two": ((6, 5), (3, 7)),
    "one value per channel": ((1, 1), (1, 1)),
    "one value on a rank": ((1, 1), (5, 6)),
    "three": ((8, 8), (1, 2), (5, 3)),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("case", ["identity", "downsample"])
def test_resolutions(pool: Pool, case: str, sizes: str) -> None:
    """Each rank may have its own, and as few as one pixel."""
    case_of_most = replace(CASES[case], size=(0, 8, 8))
    of_rank = SIZES[sizes]
    job = Job(case_of_most, (1,) * len(of_rank), sizes=of_rank)
    for fused, oracle in pool.run(job.world, rank_steps, job, [None] * job.world):
        assert_equal_float64(fused, oracle)


# Lower precision, and inputs whose mean is large against their deviation.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WIDE)
def test_lower_precision(pool: Pool, case: str, dtype: torch.dtype) -> None:
    jobs = [
        Job(WIDE[case], channels_last=True, dtype=dtype, seed=seed)
        for seed in CRITERION_SEEDS[dtype]
    ]
    assert_by_criterion(pool, jobs)


def test_autocast(pool: Pool) -> None:
    jobs = [
        Job(
            WIDE["downsample"],
            channels_last=True,
            dtype=torch.float32,
            seed=seed,
            autocast=True,
        )
        for seed in CRITERION_SEEDS[torch.bfloat16]
    ]
    assert_by_criterion(pool, jobs)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_offset_input(pool: Pool, offset: float) -> None:
    """A float32 sum of squares has no correct digit here."""
    jobs = [
        Job(
            WIDE["downsample"],
            change="without flips",
            channels_last=True,
            dtype=torch.float32,
            offset=offset,
            seed=seed,
        )
        for seed in range(4)
    ]
    assert_by_criterion(pool, jobs, but="running_mean")


@pytest.mark.parametrize("case", ["identity", "downsample", "unit"])
def test_offset_input_in_float64(pool: Pool, case: str) -> None:
    job = Job(CASES[case], offset=1e3)
    whole = job.whole()
    ranks = pool.run(job.world, rank_step, job, output_grads(job, whole))
    tolerance = float64_offset(job.offset)
    assert_equal_float64(joined(ranks), whole, noise=noise(job), tolerance=tolerance)


# Collectives and their groups.

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier")


def _summed(rank: int, shape: BlockShape) -> list[int]:
    """How many numbers each all-reduce of a step sums."""
    sizes: list[int] = []
    block = nn.SyncBatchNorm.convert_sync_batchnorm(new_block(FusedBottleneck, shape, bias=True))
    x = torch.randn(2, shape.in_channels, shape.size, shape.size)
    block(x)
    original = dist.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dist, "all_reduce", lambda t, **o: (sizes.append(t.numel()), original(t, **o))
        )
        block(x).sum().backward()
    return sizes


@pytest.mark.parametrize("shape", [TINY, TINY_DOWNSAMPLE], ids=lambda shape: shape.name)
def test_bytes_of_the_collectives(pool: Pool, shape: BlockShape) -> None:
    """The model of docs/scaling.md counts what is summed."""
    assert pool.run(2, _summed, shape) == [collective_model.junctions(shape)] * 2


def _counted(rank: int, job: Job) -> list[tuple[int, int]]:
    """Collectives of forward and backward in two steps."""
    calls: list[str] = []
    block, x = job.synchronised(), job.part(rank).requires_grad_()

    def counting(name: str, original: Any) -> Any:
        return lambda *args, **options: (calls.append(name), original(*args, **options))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        counts = []
        for _ in range(2):
            out = block(x)
            forward = len(calls)
            out.sum().backward()
            counts.append((forward, len(calls) - forward))
            calls.clear()
    return counts


@pytest.mark.parametrize(("case", "junctions"), [("identity", 3), ("downsample", 3), ("unit", 1)])
def test_one_collective_a_junction(pool: Pool, case: str, junctions: int) -> None:
    """And one more before the first step, by which the ranks make sure of each other."""
    first, second = (junctions + 1, junctions), (junctions, junctions)
    assert pool.run(2, _counted, Job(CASES[case])) == [[first, second]] * 2
    assert pool.run(1, _counted, Job(CASES[case], (4,))) == [[(0, 0)] * 2]


def _in_subgroups(rank: int, job: Job, grads: list[Tensor]) -> Result:
    """A step in the group of ranks 0 and 1; rank 2 has one for itself."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    block = job.module(fused=True)
    block = nn.SyncBatchNorm.convert_sync_batchnorm(block, groups[rank // 2])
    return run(block, job.part(rank), grads[rank])


def test_process_group(pool: Pool) -> None:
    """Statistics are those of the module's group, of one rank alone its own."""
    job = Job(DOWNSAMPLE, (3, 1, 2))
    grads = output_grads(job, job.whole())
    *pair, single = pool.run(3, _in_subgroups, job, grads)
    for ranks, images_of in ((pair, slice(0, 4)), ([single], slice(4, 6))):
        x, grad = job.batch()[images_of], torch.cat(grads)[images_of]
        want = run(job.module(fused=False), x, grad)
        assert_equal_float64(joined(ranks), want, noise=noise(job))


def _of_two_groups(rank: int, job: Job) -> tuple[str | None, str]:
    """The reason and the error of a block whose normalisations name two groups."""
    block = job.synchronised()
    block.bn2.process_group = dist.new_group([0, 1])
    groups = (dist.group.WORLD, block.bn2.process_group, dist.group.WORLD)
    norms = [BatchNorm(group=group.group_name) for group in groups]
    convs = [Conv(c.weight, c.bias, 1, c.padding) for c in (block.conv1, block.conv2, block.conv3)]
    arguments = [t for pair in zip(convs, norms, strict=True) for t in pair]
    with pytest.raises(ValueError, match="batch normalisations") as raised:
        bottleneck(job.part(rank), *arguments)
    return block.why_not_fused(job.part(rank)), str(raised.value)


def test_groups_that_differ(pool: Pool) -> None:
    for reason, error in pool.run(2, _of_two_groups, Job(IDENTITY)):
        assert reason == error
        assert "same process group" in error


def _of_widths(rank: int, jobs: list[Job]) -> str:
    with pytest.raises(ValueError, match="same block") as raised:
        jobs[rank].synchronised()(jobs[rank].part(rank))
    return str(raised.value)


def test_channel_counts_that_differ(pool: Pool) -> None:
    """An error on every rank, where nn's collectives would fail or wait."""
    jobs = [Job(Case(channels=c, width=c // 4, size=(0, 5, 4))) for c in (16, 32)]
    first, second = pool.run(2, _of_widths, jobs)
    assert "[4, 16, 1, 1]" in first
    assert "[8, 32, 1, 1]" in second


def _agrees_again(rank: int, jobs: list[Job]) -> None:
    """The first job on all ranks; then another group, and a job of its own on each rank."""
    jobs[0].synchronised()(jobs[0].part(rank))
    timeout, store = timedelta(seconds=20), dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    _of_widths(rank, jobs)


def test_agreement_ends_with_the_group(pool: Pool) -> None:
    """The next group may have its name, and its address."""
    jobs = [Job(Case(channels=c, width=c // 4, size=(0, 5, 4))) for c in (16, 32)]
    pool.run(2, _agrees_again, jobs)


def _dies(rank: int, job: Job) -> tuple[str, float]:
    out = job.synchronised()(job.part(rank))
    if rank == 1:
        os._exit(1)
    start = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        out.sum().backward()
    return str(raised.value), time.monotonic() - start


def test_rank_that_dies(pool: Pool) -> None:
    """The others raise; none waits for longer than the group's timeout."""
    with pytest.raises(RankFailed, match="rank 1: died") as failed:
        pool.run(3, _dies, Job(IDENTITY, (1, 1, 2)), timeout=timedelta(seconds=20))
    assert set(failed.value.returned) == {0, 2}
    assert all(seconds < 25 for _, seconds in failed.value.returned.values())


def _fails(rank: int) -> None:
    if rank == 1:
        raise KeyError("the reason")
    dist.barrier()


@pytest.mark.slow
def test_pool_reports_a_failing_rank(pool: Pool) -> None:
    """In bounded time, though the other rank waits for it; the next call has new processes."""
    start = time.monotonic()
    with pytest.raises(RankFailed, match="KeyError: 'the reason'"):
        pool.run(2, _fails)
    assert time.monotonic() - start < 30


def _alone(rank: int, job: Job) -> Result:
    return run(job.synchronised(), job.part(rank))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["identity", "downsample", "unit"])
def test_one_process(pool: Pool, case: str) -> None:
    """Without a process group, or alone in one, it is a BatchNorm2d."""
    job = Job(CASES[case], (3,))
    for result in (_alone(0, job), *pool.run(1, _alone, job)):
        assert_equal_float64(result, job.whole(), noise=noise(job))
    single = replace(job, split=(1,), sizes=((1, 1),))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        _alone(0, single)


# What torch does with the block.


def _resnet(order: str) -> nn.Module:
    """The small ResNet, fused with its stem, and synchronised before or after that."""
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    model = small_resnet()
    if order == "before":
        return fb.fuse(convert(model), strict=True, stem=True)
    return convert(fb.fuse(model, strict=True, stem=True))


def _resnet_step(rank: int, order: str, grads: list[Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    model = _resnet(order)
    x = images(5).split((3, 2))[rank].clone().requires_grad_()
    out = model(x)
    out.backward(grads[rank])
    found = {"out": out.detach(), "grad x": x.grad}
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters()}
    return found | dict(model.named_buffers()), [row.status for row in fb.explain(model)]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_converted_model(pool: Pool, order: str) -> None:
    """convert_sync_batchnorm before and after fuse."""
    want = step(small_resnet(), images(5))
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(want["out"].shape, generator=generator, dtype=torch.float64)
    results = pool.run(2, _resnet_step, order, list(grad.split((3, 2))))
    first, second = (found for found, _ in results)
    got = {}
    for name, tensor in first.items():
        got[name] = tensor
        if name in ("out", "grad x"):
            got[name] = torch.cat([tensor, second[name]])
        elif name.startswith("grad"):
            got[name] = tensor + second[name]
    assert_close(got, want, FLOAT64)
    assert results[0][1] == ["fused"] * 6  # the stem and five blocks


def _compiled(rank: int, job: Job) -> tuple[Result, Result]:
    """A step of the block, and of a copy that is compiled."""
    block = job.synchronised()
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        results = run(block, job.part(rank)), run(compiled, job.part(rank))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("case", ["identity", "downsample", "unit"])
def test_compile(pool: Pool, case: str) -> None:
    for eager, compiled in pool.run(2, _compiled, Job(CASES[case])):
        for name, tensor in compiled.tensors().items():
            want = eager.tensors()[name.replace("_orig_mod.", "")]
            torch.testing.assert_close(tensor, want, rtol=1e-11, atol=1e-11)


class Checkpointed(nn.Module):
    """A block that is computed again in backward."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def _checkpointed(rank: int, job: Job, reentrant: bool) -> tuple[Result, Result]:
    """A step that is computed again; a forward whose results are not used, then a step."""
    block = job.synchronised()
    again = Checkpointed(copy.deepcopy(block), reentrant)
    block(job.part(rank))
    return run(again, job.part(rank)), run(block, job.part(rank))


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["downsample", "unit"])
def test_activation_checkpointing(pool: Pool, case: str, reentrant: bool) -> None:
    """Same gradients; statistics are updated by both forwards, as nn's are."""
    for again, twice in pool.run(2, _checkpointed, Job(CASES[case]), reentrant):
        for (name, got), want in zip(
            again.tensors().items(), twice.tensors().values(), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=name)


def _differentiated_twice(rank: int, job: Job) -> str:
    x = job.part(rank).requires_grad_()
    out = job.synchronised()(x)
    with pytest.raises(RuntimeError) as raised:
        torch.autograd.grad(out.sum(), x, create_graph=True)
    return str(raised.value)


@pytest.mark.parametrize("case", ["identity", "unit"])
def test_double_backward_is_refused(pool: Pool, case: str) -> None:
    for text in pool.run(2, _differentiated_twice, Job(CASES[case])):
        assert "create_graph=True" in text
