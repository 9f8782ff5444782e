"""Steps of a block whose normalisations are synchronised, on one rank and on all as one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from conftest import use
from helpers import (
    Case,
    Result,
    assert_criterion,
    channels_last,
    errors,
    grad_like,
    in_dtype,
    noise_gradients,
    norms_of,
    randomise,
    run,
    zero_gradients,
)
from ranks import Pool
from test_numerics import without_flips
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from fused_bottleneck import Bottleneck, ConvBNReLU, FusedBottleneck, FusedConvBNReLU
from fused_bottleneck.fused_module import FusedModule


class OracleNorm(nn.BatchNorm2d):
    """Batch statistics over all ranks, by plain torch and a differentiable all-reduce."""

    def forward(self, y: Tensor) -> Tensor:
        if not self.training:
            return super().forward(y)
        count = all_reduce(torch.tensor(float(y.numel() // y.shape[1]), dtype=y.dtype))
        mean = all_reduce(y.sum((0, 2, 3))) / count
        centred = y - mean.view(1, -1, 1, 1)
        var = all_reduce(centred.square().sum((0, 2, 3))) / count
        self._track(mean.detach(), var.detach() * (count / (count - 1)))
        xhat = centred * torch.rsqrt(var + self.eps).view(1, -1, 1, 1)
        if not self.affine:
            return xhat
        return xhat * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    def _track(self, mean: Tensor, var: Tensor) -> None:
        self.num_batches_tracked += 1
        momentum = self.momentum or 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var, momentum)


def with_oracle_norms(module: nn.Module) -> nn.Module:
    """The module with its normalisations replaced in place."""
    for norm in norms_of(module).values():
        norm.__class__ = OracleNorm
    return module


@dataclass(frozen=True)
class UnitCase(Case):
    """A convolution with its normalisation and ReLU, in place of a block."""

    def module(self, kind: type[nn.Module], seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        options = {"stride": self.stride, "padding": 1, "bias": self.bias, **self.options}
        unit = kind(self.channels, self.width, 3, **options).double()
        randomise(unit)
        return unit


def _no_affine(block: nn.Module) -> None:
    block.bn2 = nn.BatchNorm2d(block.bn2.num_features, affine=False).double()


def _no_momentum(block: nn.Module) -> None:
    for norm in norms_of(block).values():
        norm.momentum = None


WIDE = {  # as in test_numerics: enough channels for the criterion
    "identity": Case(channels=256, width=64, size=(0, 7, 6)),
    "downsample": Case(channels=64, width=64, stride=2, downsample="conv", size=(0, 13, 12)),
}

CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "": lambda block: None,
    "affine False": _no_affine,
    "momentum None": _no_momentum,
    "frozen bn2": lambda block: block.bn2.eval(),
    "frozen downsample": lambda block: block.identity_downsample[1].eval(),
    "frozen weights": lambda block: block.conv3.weight.requires_grad_(False),
    "eval": lambda block: block.eval(),
    "without flips": without_flips,
}


@dataclass(frozen=True)
class Job:
    """A block, what is changed in it, and how its batch is split over the ranks.

    offset is added to the input. sizes: height and width on each rank, where they differ. device:
    "cpu", or "cuda" for one GPU of the ranks each, as far as there are. autocast: run under it, in
    bfloat16.
    """

    case: Case
    split: tuple[int, ...] = (3, 1)
    change: str = ""
    backend: str = "extension"
    channels_last: bool = False
    dtype: torch.dtype = torch.float64
    offset: float = 0.0
    seed: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    device: str = "cpu"
    autocast: bool = False

    @property
    def world(self) -> int:
        return len(self.split)

    def place(self, rank: int) -> torch.device:
        """Where a rank computes."""
        if self.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", rank % torch.cuda.device_count())

    def step(self, rank: int, block: nn.Module, x: Tensor, grad: Tensor | None) -> Result:
        """A step of a block, fused where it is a fused one; the result in the host's memory."""
        place = self.place(rank)
        block, x = block.to(place), x.to(place)
        with torch.autocast(place.type, torch.bfloat16, enabled=self.autocast):
            assert not isinstance(block, FusedModule) or block.why_not_fused(x) is None
            return on_cpu(run(block, x, None if grad is None else grad.to(place)))

    def module(self, fused: bool) -> nn.Module:
        """The block with normalisations of a process of its own."""
        if isinstance(self.case, UnitCase):
            block = self.case.module(FusedConvBNReLU if fused else ConvBNReLU, self.seed)
        else:
            block = self.case.module(FusedBottleneck if fused else Bottleneck, self.seed)
        CHANGES[self.change](block)
        return (
            channels_last(in_dtype(block, self.dtype))
            if self.channels_last
            else (in_dtype(block, self.dtype))
        )

    def synchronised(self) -> nn.Module:
        """The fused block, synchronised; the oracle's where nn's would run, which has no CPU's."""
        block = nn.SyncBatchNorm.convert_sync_batchnorm(self.module(fused=True))
        if self.case.downsample == "pool":
            block.identity_downsample = with_oracle_norms(self.module(True).identity_downsample)
        return block

    def batch(self) -> Tensor:
        """The whole batch."""
        n, (_, h, w) = sum(self.split), self.case.size
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (n, self.case.channels, h, w)
        x = torch.randn(shape, dtype=torch.float64, generator=generator) + self.offset
        return channels_last(x.to(self.dtype)) if self.channels_last else x.to(self.dtype)

    def part(self, rank: int) -> Tensor:
        """The batch of one rank."""
        part = self.batch().split(self.split)[rank]
        return part[:, :, : self.sizes[rank][0], : self.sizes[rank][1]] if self.sizes else part

    def whole(self) -> Result:
        """A step of the plain block on the whole batch."""
        return self.step(0, self.module(fused=False), self.batch(), None)


def on_cpu(result: Result) -> Result:
    """The result with its tensors in the host's memory."""
    grads = {name: None if t is None else t.cpu() for name, t in result.grads.items()}
    return Result(result.out.cpu(), grads, {name: t.cpu() for name, t in result.buffers.items()})


def rank_step(rank: int, job: Job, grads: Sequence[Tensor | None]) -> Result:
    """A step of the fused block on this rank's part; grads: of every rank's output."""
    with pytest.MonkeyPatch.context() as patch:
        use(job.backend, patch)
        return job.step(rank, job.synchronised(), job.part(rank), grads[rank])


def rank_results(
    rank: int, jobs: Sequence[Job], grads: Sequence[Sequence[Tensor | None]]
) -> list[Result]:
    """A step of each of several fused blocks."""
    return [rank_step(rank, job, of_job) for job, of_job in zip(jobs, grads, strict=True)]


def rank_oracle(rank: int, job: Job, grads: Sequence[Tensor | None]) -> Result:
    """The same of the plain block with the oracle's normalisations."""
    return run(with_oracle_norms(job.module(fused=False)), job.part(rank), grads[rank])


def rank_steps(rank: int, job: Job, grads: Sequence[Tensor | None]) -> tuple[Result, Result]:
    """The fused block's and the oracle's."""
    return rank_step(rank, job, grads), rank_oracle(rank, job, grads)


def output_grads(job: Job, whole: Result) -> list[Tensor]:
    """The parts of the gradient that ``Job.whole`` gave the output."""
    return list(grad_like(whole.out).split(job.split))


def joined(results: Sequence[Result]) -> Result:
    """All ranks' results as one process's: gradients of parameters are summed, in float64."""
    grads: dict[str, Tensor | None] = {}
    for name, grad in results[0].grads.items():
        parts = [result.grads[name] for result in results]
        if grad is not None:
            grad = torch.cat(parts) if name == "x" else torch.stack(parts).double().sum(0)
            grad = grad.to(parts[0].dtype)
        grads[name] = grad
    return Result(torch.cat([r.out for r in results]), grads, results[0].buffers)


def noise(job: Job) -> set[str]:
    """Gradients that are zero over all ranks together, of biases before batch statistics."""
    plain = job.module(fused=False)
    return zero_gradients(plain) | noise_gradients(plain)


def assert_by_criterion(pool: Pool, jobs: list[Job], but: str = "", backend: str = "gloo") -> None:
    """The error of all ranks together against float64 not above that of eager on the whole batch;
    but: tensors that are left out, by the end of their names. An offset is taken out for float64:
    batch statistics remove it, so that the oracle has not lost a digit."""
    eager = [job.whole() for job in jobs]
    grads = [output_grads(job, whole) for job, whole in zip(jobs, eager, strict=True)]
    ranks = pool.run(jobs[0].world, rank_results, jobs, grads, backend=backend)
    rows: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for job, theirs, *ours in zip(jobs, eager, *ranks, strict=True):
        exact = in_dtype(job.module(fused=False), torch.float64)
        want = run(exact, job.batch().double() - job.offset)
        for errors_of, got in zip(rows, (joined(ours), theirs), strict=True):
            found = errors(got, want, noise(job))
            errors_of.append({n: e for n, e in found.items() if not (but and n.endswith(but))})
    assert_criterion(*rows, eager[0].out.dtype)
