"""DDP, FSDP2, hooks and distributed checkpoints: the fused blocks under torch's own wrappers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import Case, Result, assert_criterion, errors, grad_like, leaf
from ranks import Pool
from tolerances import FLOAT64
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_bottleneck as fb
from fused_bottleneck import Bottleneck, FusedBottleneck
from fused_bottleneck.block import FusedBlock

pytestmark = pytest.mark.slow

CASES = (Case(channels=6, stride=2, downsample="conv"), Case())
STEPS, WORLD, IMAGES = 3, 2, 2  # images of a rank in each of two parts of a step


class Network(nn.Module):
    """Blocks, pooling and a classifier.

    unused: with parameters that no output depends on.
    """

    def __init__(self, kind: type[Bottleneck], unused: bool = False) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(case.module(kind, i) for i, case in enumerate(CASES)))
        torch.manual_seed(3)
        self.head = nn.Linear(CASES[1].wide, 3).double()
        self.unused = CASES[1].module(kind, 5) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def batches(step: int) -> Sequence[Tensor]:
    """The two parts of a step's batch, of all ranks."""
    generator = torch.Generator().manual_seed(10 + step)
    x = torch.randn(2 * WORLD * IMAGES, 6, 7, 6, dtype=torch.float64, generator=generator)
    return x.chunk(2)


def loss_of(out: Tensor) -> Tensor:
    """The mean over the images of something that is not linear."""
    return (out - torch.tensor([1.0, -1.0, 0.5], dtype=out.dtype)).square().mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int | None,
    steps: Sequence[int],
    first_part: Callable[[], Any] = contextlib.nullcontext,
) -> None:
    """Some steps, each on the gradients of both parts of its batch; rank None: of all ranks.

    first_part: the context of all but the last backward of a step.
    """
    for step in steps:
        optimizer.zero_grad()
        for i, whole in enumerate(batches(step)):
            x = whole if rank is None else whole.chunk(WORLD)[rank]
            with first_part() if i == 0 else contextlib.nullcontext():
                loss_of(model(x)).backward()
        optimizer.step()


def assert_states(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Parameters and buffers after training."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=FLOAT64, atol=FLOAT64, msg=name)


def trained_alone(steps: Sequence[int] = range(STEPS), unused: bool = False) -> dict[str, Tensor]:
    """The plain network after training on the whole batches in this process."""
    model = Network(Bottleneck, unused)
    train(model, optimizer_of(model), None, steps)
    return model.state_dict()


def network(fused: bool, synchronised: bool, unused: bool = False) -> nn.Module:
    model: nn.Module = Network(FusedBottleneck if fused else Bottleneck, unused)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if synchronised else model


class Watched:
    """Whether the fused blocks that are called in the context run fused; an error if not."""

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        original = FusedBlock._fused_call

        def checked(block: FusedBlock, x: Any) -> Any:
            call = original(block, x)
            assert not isinstance(call, str), call
            return call

        self.patch.setattr(FusedBlock, "_fused_call", checked)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


# DistributedDataParallel.


class Ddp(NamedTuple):
    """Options of DistributedDataParallel, and how it is used."""

    options: dict[str, Any] = {}  # noqa: RUF012
    unused: bool = False
    no_sync: bool = False


DDP = {
    "default": Ddp(),
    "buckets": Ddp({"bucket_cap_mb": 1e-4}),
    "static_graph": Ddp({"static_graph": True}),
    "find_unused_parameters": Ddp({"find_unused_parameters": True}, unused=True),
    "gradient_as_bucket_view": Ddp({"gradient_as_bucket_view": True}),
    "no_sync": Ddp(no_sync=True),
    "no_sync, bucket views": Ddp({"gradient_as_bucket_view": True}, no_sync=True),
}


def distributed(model: nn.Module, synchronised: bool, **options: Any) -> DistributedDataParallel:
    """The model under DDP. What is not on a GPU it must not hold a SyncBatchNorm of when it is
    made, but may later: its buckets are of parameters, which the conversion keeps."""
    wrapped = DistributedDataParallel(model, **options)
    return nn.SyncBatchNorm.convert_sync_batchnorm(wrapped) if synchronised else wrapped


def _ddp(rank: int, fused: bool, synchronised: bool, ddp: Ddp) -> dict[str, Tensor]:
    model = network(fused, False, ddp.unused)
    wrapped = distributed(model, synchronised, **ddp.options)
    first_part = wrapped.no_sync if ddp.no_sync else contextlib.nullcontext
    with Watched():
        train(wrapped, optimizer_of(model), rank, range(STEPS), first_part)
    return model.state_dict()


@pytest.mark.parametrize("options", DDP)
def test_ddp_synchronised(pool: Pool, options: str) -> None:
    """Every rank is where one process is that trains on the whole batches."""
    want = trained_alone(unused=DDP[options].unused)
    for state in pool.run(WORLD, _ddp, True, True, DDP[options]):
        assert_states(state, want)


LOCAL = ["default", "static_graph", "find_unused_parameters", "no_sync"]


@pytest.mark.parametrize("options", LOCAL)
def test_ddp(pool: Pool, options: str) -> None:
    """With statistics of each rank's own: as the plain blocks under the same wrapper."""
    wants = pool.run(WORLD, _ddp, False, False, DDP[options])
    for got, want in zip(pool.run(WORLD, _ddp, True, False, DDP[options]), wants, strict=True):
        assert_states(got, want)


# FSDP2.


def sharded(model: nn.Module, blocks: bool, **options: Any) -> nn.Module:
    """fully_shard on every block and the model, or on the model alone."""
    mesh = init_device_mesh("cpu", (WORLD,))
    if blocks:
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state with its shards put together."""
    state = model.state_dict()
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def _fsdp(
    rank: int, fused: bool, synchronised: bool, blocks: bool, reshard: bool
) -> dict[str, Tensor]:
    model = sharded(network(fused, synchronised), blocks, reshard_after_forward=reshard)
    with Watched():
        train(model, optimizer_of(model), rank, range(STEPS))
    return whole_state(model)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_fully_shard_synchronised(pool: Pool, blocks: bool, reshard: bool) -> None:
    """On the blocks and the model, and on the model alone."""
    for state in pool.run(WORLD, _fsdp, True, True, blocks, reshard):
        assert_states(state, trained_alone())


@pytest.mark.parametrize("blocks", [True, False])
def test_fully_shard(pool: Pool, blocks: bool) -> None:
    wants = pool.run(WORLD, _fsdp, False, False, blocks, True)
    for got, want in zip(pool.run(WORLD, _fsdp, True, False, blocks, True), wants, strict=True):
        assert_states(got, want)


PRECISION_SEEDS = range(6)
WIDE = Case(channels=256, width=64, size=(4, 7, 6))


def _mixed(rank: int, fused: bool, synchronised: bool) -> list[Result]:
    """Steps of a block in bfloat16, gradients reduced in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    for seed in PRECISION_SEEDS:
        block = WIDE.module(FusedBottleneck if fused else Bottleneck, seed).float()
        if synchronised:
            block = nn.SyncBatchNorm.convert_sync_batchnorm(block)
        if not fused:  # nn's BatchNorm2d takes no bfloat16 weight with a float32 buffer on CPU
            for buffer in block.buffers():
                buffer.data = buffer.data.bfloat16()
        fully_shard(block, mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
        x = leaf(WIDE.input(seed).float())
        with Watched():
            out = block(x)
        out.backward(grad_like(out))
        grads = {"x": x.grad} | {n: p.grad.full_tensor() for n, p in block.named_parameters()}
        results.append(Result(out.detach(), grads, {}))
    return results


def _exact(seed: int) -> Result:
    """The block in float64, of the parameters that bfloat16 has."""
    block = WIDE.module(Bottleneck, seed).bfloat16().double()
    x = leaf(WIDE.input(seed).bfloat16().double())
    out = block(x)
    out.backward(grad_like(out))
    return Result(
        out.detach(), {"x": x.grad} | {n: p.grad for n, p in block.named_parameters()}, {}
    )


@pytest.mark.parametrize("synchronised", [False, True])
def test_mixed_precision_policy(pool: Pool, synchronised: bool) -> None:
    """By the criterion of tolerances.py, against the plain block under the same policy.

    Both ranks have one batch, so that statistics and averaged gradients are those of each.
    """
    biases = {f"conv{i}.bias" for i in (1, 2, 3)}  # zero
    eager = pool.run(WORLD, _mixed, False, False)
    fused = pool.run(WORLD, _mixed, True, synchronised)
    rows = [
        [errors(got, _exact(seed), biases) for seed, got in zip(PRECISION_SEEDS, of, strict=True)]
        for of in (fused[1], eager[1])
    ]
    assert_criterion(*rows, torch.bfloat16)


def _statuses(rank: int, kind: type[Bottleneck], blocks: bool) -> list[str]:
    return [row.status for row in fb.explain(sharded(Network(kind), blocks))]


def test_explain(pool: Pool) -> None:
    """Blocks that are fused stay so; of others the reason names the right order."""
    for blocks in (True, False):
        for statuses in pool.run(WORLD, _statuses, FusedBottleneck, blocks):
            assert statuses == ["fused"] * len(CASES)
    for statuses in pool.run(WORLD, _statuses, Bottleneck, True):
        assert len(statuses) == len(CASES)
        assert all("fuse before fully_shard" in status for status in statuses)


# Hooks on tensors.


def _hooked(rank: int, kind: type[Bottleneck], synchronised: bool) -> dict[str, Tensor]:
    """What hooks on the input, the output and the parameters see and leave, by name."""
    case = CASES[0]
    block = case.module(kind)
    if synchronised:
        block = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    x = leaf(case.input())
    seen: dict[str, Tensor] = {}
    for name, tensor in (("x", x), *block.named_parameters()):
        tensor.register_hook(lambda g, name=name: (seen.update({name: g}), 2 * g)[1])
        tensor.register_post_accumulate_grad_hook(
            lambda t, name=name: seen.update({f"{name}.grad": t.grad})
        )
    out = block(x)
    out.register_hook(lambda g: -g)
    out.backward(grad_like(out))
    return seen


@pytest.mark.parametrize("synchronised", [False, True])
def test_tensor_hooks(pool: Pool, synchronised: bool) -> None:
    """As on the plain block. All ranks have one batch: statistics of all are those of each."""
    wants = pool.run(WORLD, _hooked, Bottleneck, False)
    fused = pool.run(WORLD, _hooked, FusedBottleneck, synchronised)
    for got, want in zip(fused, wants, strict=True):
        assert len(got) == 2 * 17
        assert_states(got, want)


# torch.distributed.checkpoint.


def _saved(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def _loaded(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def _continued(
    rank: int, fused: bool, wrap: str, step: int, source: str | None, target: str
) -> dict[str, Tensor]:
    """One step from a checkpoint to the next; wrap "": in one process, on the whole batch."""
    model = network(fused, synchronised=wrap == "fsdp")
    wrapped = model
    if wrap == "fsdp":
        wrapped = sharded(model, blocks=True)
    if wrap == "ddp":
        wrapped = distributed(model, synchronised=True)
    optimizer = optimizer_of(wrapped)
    if source is not None:
        _loaded(wrapped, optimizer, source)
    train(wrapped, optimizer, rank if wrap else None, [step])
    _saved(wrapped, optimizer, target)
    return whole_state(model)


@pytest.mark.parametrize("wrap", ["fsdp", "ddp"])
@pytest.mark.parametrize("fused_first", [True, False])
def test_distributed_checkpoint(pool: Pool, wrap: str, fused_first: bool, tmp_path: Path) -> None:
    """One process, two and one again, the fused network and the plain one in turn: the result is
    that of one process. Two processes can only have the fused one, as nn's synchronised
    normalisation does not run on CPU."""
    folders = [str(tmp_path / str(step)) for step in range(STEPS)]
    pool.run(1, _continued, fused_first, "", 0, None, folders[0])
    pool.run(WORLD, _continued, True, wrap, 1, folders[0], folders[1])
    (last,) = pool.run(1, _continued, not fused_first, "", 2, folders[1], folders[2])
    assert_states(last, trained_alone())
