"""A full training step of ResNet-50 on random images: images per second, and memory.

    python -m benchmarks.bench_resnet50                   # batch 16, float32, CPU
    python -m benchmarks.bench_resnet50 --quick
    python -m benchmarks.bench_resnet50 --device cuda --dtype bfloat16 --batch 128 256

A step is forward, loss, backward and SGD with momentum on one batch in memory; bfloat16 and float16
mean autocast. The losses of the first steps, which depend on every gradient, must agree with those
of the plain network: a fused variant that does not ends the run with exit status 1, a peer is left
out, with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import memory, options, records, resnet_report
from benchmarks.harness import measure, timer_for
from benchmarks.networks import CLASSES, GraphedStep, ResNet, TrainingStep
from benchmarks.options import DTYPES, Refused
from benchmarks.peers import first_line
from benchmarks.processes import Calls, Process, generations, measure_processes
from benchmarks.shapes import NETWORKS
from fused_bottleneck import Bottleneck, FusedBottleneck, fuse

# Largest relative difference of the first loss, and of how far two updates bring it down, each of
# which is a sum over all squared gradients. The plain network in channels_last differs from itself
# in contiguous layout by up to 7e-8, 2e-5 and 3e-6 in float32, and by 3e-4, 1.4e-2 and 2.2e-3 in
# bfloat16 (batches of 4 and 8, 64 and 96 pixels).
LOSS_BOUNDS = {
    torch.float32: (1e-5, 5e-4, 5e-4),
    torch.bfloat16: (3e-3, 8e-2, 3e-2),
    torch.float16: (1e-3, 3e-2, 1e-2),
}
TRAINED_IN = [str(dtype).removeprefix("torch.") for dtype in LOSS_BOUNDS]
BASELINE = "reference contiguous"
WARMUP_ROUNDS = 1
Step = Callable[[], Tensor]


class Variant(NamedTuple):
    """A network's blocks, whether its stem is fused too, its layout, and what becomes of its
    training step."""

    block: type[Bottleneck]
    stem: bool
    layout: str
    wrap: Callable[[TrainingStep], Step]


def _as_it_is(step: TrainingStep) -> Step:
    return step


def _compiled(mode: str) -> Callable[[TrainingStep], Step]:
    def compiled(step: TrainingStep) -> Step:
        torch._dynamo.reset()
        step.network = torch.compile(step.model, mode=mode, dynamic=False)
        return step

    return compiled


def _plain(layout: str, wrap: Callable[[TrainingStep], Step] = _as_it_is) -> Variant:
    return Variant(Bottleneck, False, layout, wrap)


def _fused(wrap: Callable[[TrainingStep], Step] = _as_it_is) -> Variant:
    return Variant(FusedBottleneck, False, "channels_last", wrap)


VARIANTS: dict[str, Variant] = {
    BASELINE: _plain("contiguous"),
    "reference channels_last": _plain("channels_last"),
    "fused channels_last": _fused(),
    "fused, stem too": _fused()._replace(stem=True),
    "compile": _plain("channels_last", _compiled("default")),
    "compile max-autotune": _plain("channels_last", _compiled("max-autotune")),
    "reference graph": _plain("channels_last", GraphedStep),
    "fused compile": _fused(_compiled("default")),
    "fused graph": _fused(GraphedStep),
}
EAGER = [BASELINE, "reference channels_last", "fused channels_last", "fused, stem too"]
MANDATORY = [BASELINE, "fused channels_last"]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default is resolved."""
    parser = options.parser("bench_resnet50", __doc__ or "")
    options.add_quick(parser, "batch 4, 64 pixels, 2 rounds")
    options.add_processes(parser)
    parser.add_argument("--network", choices=NETWORKS, default="resnet50")
    parser.add_argument(
        "--batch", type=options.positive, nargs="+", help="batch sizes (default: 16)"
    )
    parser.add_argument("--size", type=options.positive, help="pixels (default: 224)")
    parser.add_argument("--rounds", type=options.positive, help="timed samples (default: 7)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="VARIANT",
        help=f"of: {', '.join(VARIANTS)} (default: all but max-autotune; on a CPU "
        "those that need no compiling)",
    )
    args = parser.parse_args(argv)
    quick_to_compile = [name for name in VARIANTS if name != "compile max-autotune"]
    usual = EAGER if args.device.type == "cpu" else quick_to_compile
    options.resolve(
        parser,
        args,
        batch=([16], [4]),
        size=(224, 64),
        rounds=(7, 2),
        variants=(usual, MANDATORY),
    )
    if DTYPES[args.dtype] not in LOSS_BOUNDS:
        parser.error(f"argument --dtype: networks are trained in {', '.join(TRAINED_IN)}")
    args.variants = list(dict.fromkeys([*MANDATORY, *args.variants]))
    batches = "+".join(map(str, args.batch))
    parts = [args.network, args.device.type, args.dtype, f"batch{batches}", f"size{args.size}"]
    options.default_output(args, *parts)
    return args


def make_step(name: str, args: argparse.Namespace, batch: int) -> tuple[TrainingStep, Step]:
    """The training step of a variant on the same images and labels as all others."""
    variant = VARIANTS[name]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, args.size, args.size, generator=generator)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    dtype = DTYPES[args.dtype]
    network = ResNet(variant.block, args.network)
    if variant.stem:
        fuse(network, stem=True)
    images, labels = images.to(args.device), labels.to(args.device)
    training = TrainingStep(network, variant.layout, images, labels, dtype)
    return training, variant.wrap(training)


def loss_problem(
    name: str, losses: Sequence[float], expected: Sequence[float], bounds: Sequence[float]
) -> str | None:
    """Where the losses of a variant part from the expected ones; None if they agree."""
    for index, bound in enumerate(bounds):
        actual, right = (
            values[0] - values[index] if index else values[0] for values in (losses, expected)
        )
        error = abs(actual - right) / abs(right)
        if not error <= bound:  # also when it is NaN
            what = f"the decrease of the loss in {index} steps" if index else "the first loss"
            return f"{name}: {what} is off by {error:.1e}, the bound is {bound:.0e}"
    return None


def prepare(
    args: argparse.Namespace, batch: int
) -> tuple[dict[str, tuple[TrainingStep, Step]], dict[str, str]]:
    """The steps that agree, after their first few updates, and why the others are left out."""
    bounds = LOSS_BOUNDS[DTYPES[args.dtype]]
    steps: dict[str, tuple[TrainingStep, Step]] = {}
    left_out: dict[str, str] = {}
    expected: list[float] = []
    for name in args.variants:
        try:
            training, step = make_step(name, args, batch)
            composed = training.composed_reasons()
            if composed:
                raise Refused("\n".join([f"batch {batch} is not reported:", *composed]))
            losses = [float(step()) for _ in bounds]
        except Exception as error:  # a compiler's failure, or memory
            if name in MANDATORY or isinstance(error, Refused):
                raise
            left_out[name] = first_line(error)
            continue
        expected = expected or losses
        problem = loss_problem(name, losses, expected, bounds)
        if problem is None:
            steps[name] = training, step
        elif name.startswith("fused"):
            raise Refused(f"batch {batch} is not reported: {problem}")
        else:
            left_out[name] = problem
    return steps, left_out


def build_calls(name: str, args: argparse.Namespace, batch: int) -> Calls:
    """What the process of a variant can run."""
    return {"step": make_step(name, args, batch)[1]}


def in_processes(
    names: Iterable[str], args: argparse.Namespace, batch: int
) -> dict[str, dict[str, float]]:
    """Times, page faults and the most resident memory, each variant in processes of its own."""
    starts = {name: partial(Process, build_calls, name, args, batch) for name in names}
    found = measure_processes(starts, ["step"], args.rounds, WARMUP_ROUNDS)
    return {
        name: measured.calls["step"] | {"resident_bytes": measured.resident_bytes}
        for name, measured in found.items()
    }


def in_one_process(
    steps: Mapping[str, Step], args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Times only."""
    timings = measure(steps, args.rounds, WARMUP_ROUNDS, timer_for(args.device))
    return {name: dataclasses.asdict(timing) for name, timing in timings.items()}


def measure_batch(batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per variant."""
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.empty_cache()  # what the batch size before has left
    steps, left_out = prepare(args, batch)
    for name, reason in left_out.items():
        print(f"batch {batch}: {name} is left out: {reason}", file=sys.stderr)
    if args.processes:
        timings = in_processes(steps, args, batch)
    else:
        timings = in_one_process({name: step for name, (_, step) in steps.items()}, args)
    rows: list[dict[str, Any]] = []
    for name, (training, step) in steps.items():
        own = [*training.model.state_dict().values()]
        plain = step is training and training.network is training.model
        rows.append(
            {
                "variant": name,
                "batch": batch,
                **timings[name],
                "images_per_second": batch / timings[name]["median"],
                "saved_bytes": memory.saved_bytes(training.forward, own) if plain else None,
                # A graph's memory is its own pool, which no step allocates any more.
                "peak_bytes": memory.peak_bytes(step, args.device) if step is training else None,
            }
        )
    rows += [{"variant": name, "batch": batch, "left_out": why} for name, why in left_out.items()]
    return rows


def run(args: argparse.Namespace) -> records.Run:
    """Measure every batch size; raises Refused where a fused variant disagrees."""
    settings = {
        "network": args.network,
        "size": args.size,
        "rounds": args.rounds,
        "processes": generations(args.rounds) if args.processes else 0,
    }
    return options.collect("network", args, args.batch, measure_batch, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, write the records; 0, or 1 where the check failed."""
    return options.report(parse_arguments(argv), run, resnet_report.text)


if __name__ == "__main__":
    sys.exit(main())
