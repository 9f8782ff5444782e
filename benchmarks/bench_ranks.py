"""What synchronised statistics cost a training step of a block, on processes of one machine.

    python -m benchmarks.bench_ranks                      # 1 and 2 processes, CPU, float32
    python -m benchmarks.bench_ranks --quick
    python -m benchmarks.bench_ranks --device cuda --dtype bfloat16 --ranks 1 2 4 8 --batch 256

Every process has a batch of its own. Timed are a step with statistics of that batch, one with those
of all processes, and the all-reduces of a step by themselves; a time is that of the slowest
process. Where the processes together disagree with one plain block on the whole batch nothing is
reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from benchmarks import collective_model, options, ranks_report, records
from benchmarks.cases import (
    Inputs,
    TorchCase,
    build_inputs,
    composed_reasons,
    disagreements,
    norm_bounds,
)
from benchmarks.checked import SEEDS
from benchmarks.harness import Timer, Variant, measure, timer_for
from benchmarks.options import DTYPES, Refused
from benchmarks.shapes import SHAPES, BlockShape
from fused_bottleneck import Bottleneck, FusedBottleneck

WARMUP_ROUNDS = 2
LAYOUT = "channels_last"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default is resolved."""
    parser = options.parser("bench_ranks", __doc__ or "")
    options.add_quick(parser, "a batch of 2, 3 rounds")
    parser.add_argument(
        "--ranks", type=options.positive, nargs="+", help="numbers of processes (default: 1 2)"
    )
    parser.add_argument("--shape", choices=SHAPES, default="512-128@28", metavar="SHAPE")
    parser.add_argument("--batch", type=options.positive, help="of each process (default: 8)")
    parser.add_argument("--rounds", type=options.positive, help="timed steps (default: 15)")
    args = parser.parse_args(argv)
    # Threads are each process's: one, so that as many processes as cores do not compete.
    options.resolve(
        parser, args, ranks=([1, 2], [1, 2]), batch=(8, 2), rounds=(15, 3), threads=(1, 1)
    )
    if args.device.type == "cuda" and max(args.ranks) > torch.cuda.device_count():
        parser.error(f"argument --ranks: there are {torch.cuda.device_count()} GPUs")
    args.bias = False
    name = args.shape.replace("->", "-")
    options.default_output(args, "ranks", args.device.type, args.dtype, name)
    return args


class SynchronisedCase(TorchCase):
    """A block on this process's part of a batch, whose results are those of all processes."""

    def results(self) -> dict[str, Tensor]:
        return {name: _of_all(name, value) for name, value in super().results().items()}


def _of_all(name: str, value: Tensor) -> Tensor:
    """Parts of a batch one after the other, gradients of parameters summed."""
    if name.startswith("grad of"):
        dist.all_reduce(value)
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return torch.cat(parts)


def part_of(inputs: Inputs, batch: int, synchronised: bool) -> TorchCase:
    """The fused block on this process's part of the inputs."""
    rank = dist.get_rank()
    part = slice(rank * batch, (rank + 1) * batch)
    mine = inputs._replace(x=inputs.x[part], grad_out=inputs.grad_out[part])
    case = mine.case(FusedBottleneck, LAYOUT)
    if not synchronised:
        return case
    block = nn.SyncBatchNorm.convert_sync_batchnorm(case.block)
    return SynchronisedCase(block, case.x, case.grad_out)


def agreeing_inputs(args: argparse.Namespace, device: torch.device) -> Inputs:
    """Inputs for the whole batch, on which all processes and one plain block agree.

    Raises Refused, on every process, where they do not (``checked.agreeing_cases`` has the rule).
    """
    dtype, shape = DTYPES[args.dtype], SHAPES[args.shape]
    bounds = norm_bounds(dtype, device)
    for seed in range(SEEDS):
        whole = args.batch * dist.get_world_size()
        inputs = build_inputs(shape, whole, dtype, device, bias=args.bias, seed=seed)
        case = part_of(inputs, args.batch, synchronised=True)
        expected = inputs.case(Bottleneck, LAYOUT).results()
        problems = composed_reasons({"synchronised": case})
        if not problems:
            problems = disagreements({"synchronised": case}, bounds, expected).get(
                "synchronised", []
            )
        if not problems:
            return inputs
    raise Refused("\n".join([f"{dist.get_world_size()} processes are not reported:", *problems]))


def _slowest(timer: Timer, device: torch.device) -> Timer:
    """The timer, of processes that start together, with the time of the last one."""

    def timed(run: Variant) -> float:
        dist.barrier()
        seconds = torch.tensor(timer(run), dtype=torch.float64, device=device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    return timed


def collectives(shape: BlockShape, device: torch.device) -> Variant:
    """The all-reduces of a step, one after the other."""
    sums = [
        torch.zeros(count, dtype=torch.float64, device=device)
        for count in collective_model.junctions(shape)
    ]
    return lambda: [dist.all_reduce(t) for t in sums]


def measure_rank(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One record per variant, the same on every process."""
    inputs = agreeing_inputs(args, device)
    ranks = dist.get_world_size()
    variants: dict[str, Variant] = {"local": part_of(inputs, args.batch, False).step}
    if ranks > 1:
        variants["synchronised"] = part_of(inputs, args.batch, True).step
        variants["collectives"] = collectives(SHAPES[args.shape], device)
    timer = _slowest(timer_for(device), device)
    timings = measure(variants, args.rounds, WARMUP_ROUNDS, timer)
    return [
        {"ranks": ranks, "variant": name, **dataclasses.asdict(timing)}
        for name, timing in timings.items()
    ]


def _work(rank: int, ranks: int, args: argparse.Namespace, folder: str) -> None:
    """A process: measures with the others; the first one writes what was found."""
    torch.set_num_threads(args.threads)
    device = torch.device("cuda", rank) if args.device.type == "cuda" else args.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
    )
    try:
        found: dict[str, Any] = {"records": measure_rank(args, device)}
    except Refused as refusal:
        found = {"refused": str(refusal)}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure_ranks(ranks: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of that many processes, which start and end here."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        work: Callable[..., None] = _work
        multiprocessing.spawn(work, (ranks, args, folder), nprocs=ranks)
        found = json.loads(Path(folder, "found.json").read_text())
    if "refused" in found:
        raise Refused(found["refused"])
    return found["records"]


def run(args: argparse.Namespace) -> records.Run:
    """Measure every number of processes; raises Refused where they disagree."""
    settings = {"shape": args.shape, "batch": args.batch, "rounds": args.rounds}
    return options.collect("ranks", args, args.ranks, measure_ranks, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, write the records; 0, or 1 where the check failed."""
    return options.report(parse_arguments(argv), run, ranks_report.text)


if __name__ == "__main__":
    sys.exit(main())
