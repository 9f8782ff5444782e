"""Synchronised normalisations on GPUs: over NCCL with a GPU for each rank, over gloo with any."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import CRITERION_SEEDS, Result
from ranks import Pool
from sync_helpers import (
    WIDE,
    Job,
    assert_by_criterion,
    on_cpu,
    output_grads,
    rank_results,
    rank_step,
)
from torch import Tensor, nn

from fused_bottleneck import dispatch


def _why_skipped(gpus: int) -> str | None:
    """Why there are not that many GPUs to test on."""
    count = torch.cuda.device_count()
    if count < gpus:
        return f"needs {gpus} CUDA devices, there are {count}"
    return dispatch.why_no_kernels(torch.empty(0, device="cuda"), [])


def _needs(backend: str, gpus: int) -> pytest.param:
    reason = _why_skipped(gpus)
    return pytest.param(backend, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))


pytestmark = pytest.mark.gpu
over_backends = pytest.mark.parametrize("backend", [_needs("nccl", 2), _needs("gloo", 1)])
over_nccl = pytest.mark.parametrize("backend", [_needs("nccl", 2)])


def job_of(case: str, dtype: torch.dtype, seed: int = 0) -> Job:
    return Job(WIDE[case], channels_last=True, dtype=dtype, seed=seed, device="cuda")


@over_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WIDE)
def test_step(pool: Pool, case: str, dtype: torch.dtype, backend: str) -> None:
    """By the criterion of tolerances.py, against eager on the whole batch on one GPU."""
    jobs = [job_of(case, dtype, seed) for seed in CRITERION_SEEDS[dtype]]
    assert_by_criterion(pool, jobs, backend=backend)


@over_backends
@pytest.mark.parametrize("case", WIDE)
def test_rank_without_a_batch(pool: Pool, case: str, backend: str) -> None:
    jobs = [replace(job_of(case, torch.float32, seed), split=(4, 0)) for seed in range(4)]
    assert_by_criterion(pool, jobs, backend=backend)


@over_backends
def test_same_bits_twice(pool: Pool, backend: str) -> None:
    job = job_of("downsample", torch.bfloat16)
    jobs, grads = [job, job], output_grads(job, job.whole())
    for first, second in pool.run(2, rank_results, jobs, [grads, grads], backend=backend):
        for name, tensor in first.tensors().items():
            assert torch.equal(tensor, second.tensors()[name]), name


def _nn_and_fused(rank: int, job: Job, grads: list[Tensor]) -> tuple[Result, Result]:
    """The plain block with nn's synchronised normalisations, and the fused one."""
    place = job.place(rank)
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(job.module(fused=False)).to(place)
    x = job.part(rank).to(place).requires_grad_()
    out = plain(x)
    out.backward(grads[rank].to(place))
    parameters = {name: p.grad for name, p in plain.named_parameters()}
    buffers = {name: b.detach().clone() for name, b in plain.named_buffers()}
    result = Result(out.detach(), {"x": x.grad, **parameters}, buffers)
    return on_cpu(result), rank_step(rank, job, grads)


@over_nccl
@pytest.mark.parametrize("case", WIDE)
def test_as_nn(pool: Pool, case: str, backend: str) -> None:
    """Each rank's own gradients are those of nn's layers, up to ReLUs that open on a rounding."""
    job = job_of(case, torch.float32)
    grads = output_grads(job, job.whole())
    for plain, fused in pool.run(2, _nn_and_fused, job, grads, backend=backend):
        largest = max(float(t.norm()) for t in plain.grads.values() if t is not None)
        for name, want in plain.tensors().items():
            error = float((fused.tensors()[name] - want).norm())
            assert error <= 1e-2 * max(float(want.norm()), 1e-2 * largest), name


def _captured(rank: int, job: Job) -> tuple[Tensor, Tensor]:
    """The output of a step, and of its replay as a CUDA graph."""
    place = job.place(rank)
    torch.cuda.set_device(place)
    block, x = job.synchronised().to(place), job.part(rank).to(place)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            out = block(x)
            out.sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = block(x)
        replayed.sum().backward()
    graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    return out.detach().cpu(), replayed.detach().cpu()


@over_nccl
def test_cuda_graph(pool: Pool, backend: str) -> None:
    """The collectives are captured with the rest; the handshake came before."""
    for out, replayed in pool.run(
        2, _captured, job_of("downsample", torch.float32), backend=backend
    ):
        assert torch.equal(out, replayed)
