"""Scratch memory: reused, bounded, given back, and never shared by two runs."""

import threading

import pytest
import torch
from helpers import Case, Result, run

from fused_bottleneck import FusedBottleneck, extension, release_scratch, scratch

pytestmark = pytest.mark.skipif(not extension.load(), reason=extension.reason())

CASES = [
    Case(channels=32, width=8, size=(4, 9, 8)),
    Case(channels=12, width=8, stride=2, downsample="conv", size=(4, 11, 10)),
]


@pytest.fixture(autouse=True)
def empty_pool() -> None:
    release_scratch()


def test_lease_gives_back() -> None:
    assert scratch.pooled_bytes() == 0
    with scratch.Lease() as lease:
        t = lease.take((2, 8, 16, 16), torch.float32)
        assert t.shape == (2, 8, 16, 16)
        assert t.dtype == torch.float32
        assert t.is_contiguous(memory_format=torch.channels_last)
        assert scratch.pooled_bytes() == 0
        pointer = t.untyped_storage().data_ptr()
    assert scratch.pooled_bytes() >= t.numel() * 4
    with scratch.Lease() as lease:
        again = lease.take((1, 4, 16, 16), torch.float64)
        assert again.untyped_storage().data_ptr() == pointer
    release_scratch()
    assert scratch.pooled_bytes() == 0


def test_leased_buffers_are_distinct() -> None:
    with scratch.Lease() as outer:
        taken = [outer.take((1, 8, 4, 4), torch.float32) for _ in range(3)]
        with scratch.Lease() as inner:  # re-entrant: a run inside a run
            taken.append(inner.take((1, 8, 4, 4), torch.float32))
        taken.append(outer.take((1, 8, 5, 5), torch.float32))
        pointers = {t.untyped_storage().data_ptr() for t in taken[:3]}
        assert len(pointers) == 3
        assert taken[3].untyped_storage().data_ptr() not in pointers
        assert taken[4].untyped_storage().data_ptr() not in pointers


def test_buffers_come_back_after_an_error() -> None:
    def fail() -> None:
        with scratch.Lease() as lease:
            lease.take((1, 8, 4, 4), torch.float32)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert scratch.pooled_bytes() > 0


def test_leased_memory_is_nan_here() -> None:
    """As torch.empty: what a run reads and has not written shows in every test."""
    for _ in range(2):  # the second time from the pool
        with scratch.Lease() as lease:
            t = lease.take((1, 8, 4, 4), torch.float32)
            assert t.isnan().all()
            t.fill_(1)


def test_pool_does_not_grow() -> None:
    """Steps of the same block reuse what the first one took."""
    block = CASES[1].module(FusedBottleneck).float()
    sizes = []
    for _ in range(4):
        run(block, CASES[1].input().float())
        sizes.append(scratch.pooled_bytes())
    assert sizes[1:] == sizes[:1] * 3


def test_pool_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is above the limit goes back to the allocator, the smallest buffers first."""
    limit = 16 * 2**20
    monkeypatch.setattr(scratch, "LIMIT_BYTES", limit)
    with scratch.Lease() as lease:
        for mebibytes in (2, 2, 2, 12):
            lease.take((1, 1, mebibytes * 2**10, 256), torch.float32)
    assert 12 * 2**20 <= scratch.pooled_bytes() <= limit
    with scratch.Lease() as lease:
        lease.take((1, 1, 20 * 2**10, 256), torch.float32)  # alone above the limit
    assert scratch.pooled_bytes() <= limit


def test_concurrent_runs() -> None:
    """Two threads train two blocks at the same time; results are those of one after the other."""
    steps = 12

    def train(block: FusedBottleneck, case: Case, results: list[Result]) -> None:
        torch.set_num_threads(1)
        results.extend(run(block, case.input(seed)) for seed in range(steps))

    wanted: list[list[Result]] = [[] for _ in CASES]
    results: list[list[Result]] = [[] for _ in CASES]
    threads = []
    for case, want, got in zip(CASES, wanted, results, strict=True):
        train(case.module(FusedBottleneck), case, want)
        block = case.module(FusedBottleneck)
        threads.append(threading.Thread(target=train, args=(block, case, got)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for want, got in zip(wanted, results, strict=True):
        assert len(got) == steps
        for expected, actual in zip(want, got, strict=True):
            for name, tensor in expected.tensors().items():
                assert torch.equal(actual.tensors()[name], tensor), name


def test_one_module_in_two_threads() -> None:
    """In eval mode nothing of the module changes: the same bits in every thread."""
    block = CASES[0].module(FusedBottleneck).eval()
    inputs = [CASES[0].input(seed) for seed in range(8)]
    with torch.no_grad():
        want = [block(x) for x in inputs]
    wrong: list[int] = []

    def infer() -> None:
        with torch.no_grad():
            for _ in range(5):
                wrong.extend(i for i, x in enumerate(inputs) if not torch.equal(block(x), want[i]))

    threads = [threading.Thread(target=infer) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_backward_inside_backward() -> None:
    """A hook that trains another block while this one is in its backward."""
    outer, inner = (case.module(FusedBottleneck) for case in CASES)
    want = [run(case.module(FusedBottleneck), case.input()) for case in CASES]
    inside: list[Result] = []

    def train_inner(grad: torch.Tensor) -> None:
        with torch.enable_grad():
            inside.append(run(inner, CASES[1].input()))

    outer.conv3.weight.register_hook(train_inner)
    got = run(outer, CASES[0].input())
    for name, tensor in want[0].tensors().items():
        assert torch.equal(got.tensors()[name], tensor), name
    for name, tensor in want[1].tensors().items():
        assert torch.equal(inside[0].tensors()[name], tensor), name
