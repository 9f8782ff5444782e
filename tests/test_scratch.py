"""Scratch memory: reused, bounded, given back, and never shared by two runs."""

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Case, Result, run
from torch import Tensor

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


def test_swapped_buffer_is_free_again_and_the_new_one_is_not() -> None:
    with scratch.Lease() as lease:
        large = lease.take_bytes(2**23)
    with scratch.Lease() as lease:
        small = lease.swap(None, 2**20)
        assert small.data_ptr() == large.data_ptr()  # the only one there is
        other = lease.swap(small, 2**22)
        assert other.data_ptr() == large.data_ptr()
        assert scratch.pooled_bytes() == 0
    assert scratch.pooled_bytes() == other.numel()


def test_swap_replaces_what_is_too_small() -> None:
    with scratch.Lease() as lease:
        small = lease.swap(None, 2**20)
        large = lease.swap(small, 2 * small.numel())
        assert large.numel() >= 2 * small.numel()
        assert scratch.pooled_bytes() == 0
    assert scratch.pooled_bytes() == large.numel()


def test_small_need_leaves_a_large_buffer_alone() -> None:
    with scratch.Lease() as lease:
        large = lease.take_bytes(2**24)
    with scratch.Lease() as lease:
        assert lease.take_bytes(2**20).data_ptr() != large.data_ptr()
        assert lease.take_bytes(2**23).data_ptr() == large.data_ptr()


def test_swap_takes_the_largest() -> None:
    with scratch.Lease() as lease:
        sizes = [lease.take_bytes(size).numel() for size in (2**21, 2**23, 2**22)]
    with scratch.Lease() as lease:
        assert lease.swap(None, 1).numel() == max(sizes)


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
            workspace = lease.swap(None, 2**20)
            assert workspace.view(torch.float32).isnan().all()
            workspace.fill_(1)


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

    def train_inner(grad: Tensor) -> None:
        with torch.enable_grad():
            inside.append(run(inner, CASES[1].input()))

    outer.conv3.weight.register_hook(train_inner)
    got = run(outer, CASES[0].input())
    for name, tensor in want[0].tensors().items():
        assert torch.equal(got.tensors()[name], tensor), name
    for name, tensor in want[1].tensors().items():
        assert torch.equal(inside[0].tensors()[name], tensor), name


# Results of 2 MiB: above the size from which memory is reused.
RESULT = (2, 64, 64, 64)
# 10 MiB: above that from which pages go back to the system.
LARGE = (10, 64, 64, 64)


def result(value: float = 0.0, shape: tuple[int, ...] = RESULT) -> Tensor:
    return scratch.result_empty(shape, torch.float32).fill_(value)


def address(t: Tensor) -> int:
    """Not the storage's: asking for a storage object ends the reuse of its memory."""
    return t.data_ptr()


def kept_bytes() -> int:
    return sum(kept.holder.numel() for kept in scratch._results.values())


def test_memory_of_a_dead_result_is_reused() -> None:
    t = result()
    assert kept_bytes() == t.numel() * 4
    pointer = address(t)
    del t
    other = torch.empty(RESULT)  # would get the memory, were it free
    for _ in range(3):
        assert address(result()) == pointer != address(other)
    assert kept_bytes() == other.numel() * 4


def saved(t: Tensor) -> Tensor:
    """A product whose graph is all that holds t."""
    return torch.ones((), requires_grad=True) * t.detach()


def saved_value(out: Tensor) -> Tensor:
    return out.grad_fn._saved_other


Hold = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
HOLDERS: dict[str, Hold] = {
    "tensor": (lambda t: t, lambda t: t),
    "view": (lambda t: t[1, 2], lambda t: t),
    "detached": (lambda t: t.detach(), lambda t: t),
    "parameter": (torch.nn.Parameter, lambda t: t.detach()),
    "saved for backward": (saved, saved_value),
    "untyped storage": (lambda t: t.untyped_storage(), lambda s: torch.empty(0).set_(s)),
    "typed storage": (lambda t: t.storage(), lambda s: torch.empty(0).set_(s)),
    "storage in another tensor": (lambda t: torch.empty(0).set_(t.untyped_storage()), lambda t: t),
    "numpy": (lambda t: t[0].numpy(), torch.from_numpy),
    "dlpack": (torch.utils.dlpack.to_dlpack, torch.utils.dlpack.from_dlpack),
    "lazy clone": (lambda t: t._lazy_clone(), lambda t: t),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("shape", [RESULT, LARGE], ids=["reused", "discarded"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_is_held_stays(holder: str, shape: tuple[int, ...]) -> None:
    """It is neither handed out again nor given back to the system where there is no other."""
    hold, read = HOLDERS[holder]
    larger = (shape[0] + 1, *shape[1:])
    for _ in range(2):  # the second time in reused memory
        t = result(3, shape)
        held = hold(t)
        del t
        others = [result(9, size) for size in (shape, larger, shape, larger)]
        unchanged = bool((read(held) == 3).all())
        assert unchanged
        del held, others


def test_memory_shared_with_other_processes_is_not_reused() -> None:
    """What a queue has sent to one lives on there when nobody here holds it."""
    result(3).share_memory_()
    shared = [result(9).is_shared() for _ in range(3)]
    assert not any(shared)


def resize_storage(t: Tensor, size: int) -> None:
    """As libraries do that free a parameter's or an activation's memory."""
    t.untyped_storage().resize_(size)


def resize_tensor(t: Tensor, size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.resize_(size // 4)


@pytest.mark.parametrize("resize", [resize_storage, resize_tensor])
@pytest.mark.parametrize("size", [0, 2**20, 3 * 2**20])
def test_memory_that_was_resized(resize: Callable[[Tensor, int], None], size: int) -> None:
    t = result()
    resize(t, size)
    del t
    t = result(1)
    assert t.sum() == 2**19
    assert t.untyped_storage().nbytes() == 2**21


def test_result_is_an_ordinary_tensor() -> None:
    for _ in range(2):  # the second time in reused memory
        t = scratch.result_empty(RESULT, torch.float32)
        assert not t._is_view()
        assert t.is_leaf
        assert not t.requires_grad
        assert not t.is_inference()
        assert t.storage_offset() == 0
        t.fill_(2)
        version = t._version
        view = t[0]
        view.add_(1)
        assert t._version == view._version == version + 1
        x = torch.ones(RESULT, requires_grad=True)
        out = x * t
        out.sum().backward()
        assert torch.equal(x.grad, t)
        out = (x * t).sum()
        t.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()
        del t, view, out


def test_result_of_inference_mode() -> None:
    with torch.inference_mode():
        t = result()
        pointer = address(t)
        assert t.is_inference()
        del t
    for mode in (False, True, False):
        with torch.inference_mode(mode):
            t = result(1)
            assert t.is_inference() == mode
            assert address(t) == pointer
            if not mode:
                (torch.ones(RESULT, requires_grad=True) * t).sum().backward()
            del t


def test_result_is_nan_here() -> None:
    for _ in range(2):  # the second time in reused memory
        t = scratch.result_empty(RESULT, torch.float32)
        assert t.isnan().all()
        t.fill_(1)
        del t


def test_results_of_the_same_size_in_bytes() -> None:
    """Every layout and dtype gets the same memory, and its own strides."""
    n, c, h, w = RESULT
    pointers = set()
    for dtype, channels in [
        (torch.float32, c),
        (torch.float64, c // 2),
        (torch.bfloat16, 2 * c),
        (torch.float16, 2 * c),
    ]:
        for channels_last in (False, True):
            t = scratch.result_empty((n, channels, h, w), dtype, channels_last)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            assert t.shape == (n, channels, h, w)
            assert t.dtype == dtype
            assert t.stride() == torch.empty(t.shape, memory_format=layout).stride()
            pointers.add(address(t))
            del t
    assert len(pointers) == 1


def test_memory_of_another_size() -> None:
    """It is not reused: a storage has no bytes of another tensor behind its own."""
    result()
    for shape in [(2, 64, 64, 63), (2, 64, 64, 65)]:
        t = result(shape=shape)
        assert t.untyped_storage().nbytes() == t.numel() * 4


def test_odd_sizes_and_dtypes() -> None:
    """An odd number of elements of one dtype is no whole number of another's."""
    scratch.result_empty((1, 3, 301, 301), torch.float32)
    t = scratch.result_empty((1, 3, 200, 226), torch.float64)
    assert t.dtype == torch.float64


MEBIBYTE = 2**20
WIDE = (3, 64, 64, 64)  # 3 MiB


def test_kept_results_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ones stay: a step asks for them again before the others."""
    monkeypatch.setattr(scratch, "RESULT_LIMIT_BYTES", 8 * MEBIBYTE)
    held = [result(i) for i in range(7)]
    assert kept_bytes() == 8 * MEBIBYTE
    assert [t[0, 0, 0, 0].item() for t in held] == list(range(7))
    pointers = [address(t) for t in held[:4]]
    del held
    assert [address(t) for t in [result() for _ in range(4)]] == pointers
    result(shape=(10, 64, 64, 64))  # alone above the limit: not kept
    assert kept_bytes() <= 8 * MEBIBYTE


def test_new_memory_takes_the_place_of_unused() -> None:
    """Of what was handed out last, as much as is needed; never of what is held."""
    held = result(5)
    pointers = [address(t) for t in [result() for _ in range(3)]]
    assert kept_bytes() == 8 * MEBIBYTE
    wide = result(7, WIDE)  # in place of two
    assert kept_bytes() == (4 + 3) * MEBIBYTE
    assert address(result()) == pointers[0]
    others = [result(7, WIDE), result(7, WIDE)]  # the last unused one goes
    assert kept_bytes() == (2 + 9) * MEBIBYTE
    assert (held == 5).all()
    del wide, others


def test_results_never_take_more_than_was_in_use_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    held: list[Tensor] = []
    most = 0
    for _ in range(200):
        size = int(torch.randint(2, 9, (), generator=generator))
        if len(held) > 5 or (held and size % 2):
            del held[size % len(held)]
        else:
            held.append(result(size, (size, 64, 64, 64)))
        in_use = sum(t.numel() * 4 for t in held)
        most = max(most, in_use)
        assert in_use <= kept_bytes() <= most
        assert all((t == t.shape[0]).all() for t in held)


def test_pages_of_what_leaves_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the system, not only to the allocator, and not under the lock."""
    seen: list[int] = []
    waited: list[bool] = []

    def take_lock() -> None:
        free = scratch._lock.acquire(timeout=60)
        waited.append(not free)
        if free:
            scratch._lock.release()

    def discard(t: Tensor) -> None:
        seen.append(t.data_ptr())
        other = threading.Thread(target=take_lock)
        other.start()
        other.join()

    pointers = {address(t) for t in [result() for _ in range(3)]}
    monkeypatch.setattr(torch.ops.fused_bottleneck, "discard_pages_", discard)
    result(shape=LARGE)
    assert set(seen) == pointers
    assert not any(waited)


def test_stale_results_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not been handed out in a while, and sooner what is still in use."""
    monkeypatch.setattr(scratch, "_STALE_UNUSED", 12)
    monkeypatch.setattr(scratch, "_STALE_IN_USE", 6)
    held = result(3)
    kept = [address(t) for t in [result() for _ in range(3)]]
    for _ in range(5):
        result()  # in the memory of the first of them
    assert kept_bytes() == 8 * MEBIBYTE
    others = [result(9, WIDE)]  # in place of two
    assert kept_bytes() == (2 + 3) * MEBIBYTE
    assert address(result()) in kept
    for _ in range(12):
        held_for_one = result(5, WIDE)
        del held_for_one
    others.append(result(9, LARGE))
    assert kept_bytes() == 10 * MEBIBYTE
    assert (held == 3).all()
    assert all((t == 9).all() for t in others)


def test_a_lease_above_the_limit_leaves_the_pool_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch.release()
    monkeypatch.setattr(scratch, "LIMIT_BYTES", 8 * 2**20)
    with scratch.Lease() as lease:
        lease.take_bytes(4 * 2**20)
    with scratch.Lease() as lease:
        lease.take_bytes(10 * 2**20)
    assert scratch.pooled_bytes() == 4 * 2**20


def test_torch_that_does_not_tell_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is kept."""
    scratch.release()
    scratch._counts_holders.cache_clear()
    monkeypatch.setattr(scratch, "_use_count", lambda address: 1)
    result()
    monkeypatch.undo()
    scratch._counts_holders.cache_clear()
    assert kept_bytes() == 0


def interrupt(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object], calls: int) -> None:
    """Run that where the pool has asked for the holders of a result for the so manieth time, as a
    signal's handler or the garbage collector may."""
    count = scratch._use_count
    left = [calls]

    def use_count(address: int) -> int:
        counted = count(address)
        left[0] -= 1
        if left[0] == 0:
            run()
        return counted

    monkeypatch.setattr(scratch, "_use_count", use_count)


# Before and after a result is taken out for reuse; of those that are to be discarded.
LARGER = (12, 64, 64, 64)
MOMENTS = [(LARGE, 1), (LARGE, 2), (LARGER, 1), (LARGER, 2), (LARGER, 3)]


@pytest.mark.parametrize(("shape", "calls"), MOMENTS)
def test_another_result_meanwhile(
    shape: tuple[int, ...], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the memory that was about to be taken."""
    for _ in range(3):
        held = [result(shape=LARGE) for _ in range(3)]
        del held
    inner: list[Tensor] = []
    interrupt(monkeypatch, lambda: inner.append(result(5, LARGE)), calls)
    outer = result(9, shape)
    assert len(inner) == 1
    assert (inner[0] == 5).all()
    assert (outer == 9).all()


@pytest.mark.parametrize(("shape", "calls"), MOMENTS)
def test_releasing_meanwhile(
    shape: tuple[int, ...], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [result(5, LARGE) for _ in range(3)]
    del others[1:]
    interrupt(monkeypatch, scratch.release, calls)
    outer = result(9, shape)
    again = result(7, shape)
    assert (outer == 9).all()
    assert (again == 7).all()
    assert (others[0] == 5).all()


def test_forked_child_does_not_wait_for_a_thread_of_its_parent() -> None:
    script = """
import os, threading, torch
from fused_bottleneck import scratch, extension
extension.load()
held, done = threading.Event(), threading.Event()
def hold():
    with scratch._lock:
        held.set()
        done.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    scratch.result_empty((2, 64, 64, 64), torch.float32)
    os._exit(7)
_, status = os.waitpid(child, 0)
done.set()
thread.join()
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    assert subprocess.run(command, check=False, timeout=60).returncode == 7


def test_release_drops_results() -> None:
    t = result(3)
    result()
    scratch.release()
    assert kept_bytes() == 0
    others = [result(9) for _ in range(3)]
    assert (t == 3).all()
    assert address(t) not in {address(other) for other in others}


def test_threads_get_different_memory() -> None:
    wrong: list[float] = []
    start = threading.Barrier(2)

    def work(value: float) -> None:
        torch.set_num_threads(1)
        start.wait()
        for _ in range(100):
            t = result(value)
            other = result(value + 0.5)
            if (t != value).any() or (other != value + 0.5).any():
                wrong.append(value)
            del t, other

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert kept_bytes() <= 4 * 2 * 2**20  # no more than ever at the same time
