"""The command line that the benchmarks share, and what becomes of a measurement."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import records
from benchmarks.cases import NORM_BOUNDS
from benchmarks.harness import progress
from benchmarks.shapes import NETWORKS, SHAPES

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NORM_BOUNDS}
T = TypeVar("T")
QUICK_SHAPES = ["256-64@56", "1024-512@14->7-ds"]


class Refused(Exception):
    """The measurement would be of something else than it says."""


def parser(name: str, description: str, *, several_dtypes: bool = False) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; without `--dtype` for one that has several."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--device", type=torch.device, default="cpu", help="cpu (default) or cuda")
    if not several_dtypes:
        result.add_argument(
            "--dtype", choices=DTYPES, default="float32", help="default: %(default)s"
        )
    result.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    result.add_argument(
        "--output",
        type=Path,
        help="JSON file to write (default: in benchmarks/results/, named after the settings; "
        "with --quick none)",
    )
    return result


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_quick(parser: argparse.ArgumentParser, what: str) -> None:
    """`--quick`, which only changes defaults: a run that tells whether the benchmark works."""
    parser.add_argument("--quick", action="store_true", help=f"{what}, nothing written")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """`--processes`: whether each variant has processes of its own."""
    parser.add_argument(
        "--processes",
        action=argparse.BooleanOptionalAction,
        help="each variant in processes of its own, as its user has it, which take turns (default: "
        "on a CPU, without --quick)",
    )


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """`--network`, `--shapes` and `--bias`: which blocks are measured."""
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default="resnet50",
        help="whose blocks are measured (default: %(default)s)",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        metavar="SHAPE",
        help=f"which blocks instead, of: {', '.join(SHAPES)}",
    )
    parser.add_argument(
        "--bias",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="convolutions with a bias, as the plain block has by default and networks have not",
    )


def named(args: argparse.Namespace, parts: Sequence[str]) -> list[str]:
    """The parts of a file's name, with what `add_shapes` added where it is not the default."""
    network = [] if args.network == "resnet50" else [args.network]
    return [*parts, *network, *([] if args.bias else ["nobias"])]


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace, **usual: Any) -> None:
    """Fill in what was not given: of `usual` {option: (value, value of --quick)}."""
    for name, (full, quick) in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    if getattr(args, "processes", False) is None:
        args.processes = args.device.type == "cpu" and not args.quick
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this torch finds no CUDA device")
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def default_output(args: argparse.Namespace, *parts: object) -> None:
    """Name the output file after the settings, unless one was given or the run is a quick one."""
    if args.output is None and not args.quick:
        args.output = records.RESULTS / ("-".join(map(str, parts)) + ".json")


def collect(
    benchmark: str,
    args: argparse.Namespace,
    items: Sequence[T],
    measure: Callable[[T, argparse.Namespace], list[dict[str, Any]]],
    settings: dict[str, Any],
    **extra: Any,
) -> records.Run:
    """The run of a benchmark: where and how it was measured, and the records of all items.

    Written after every item, so that a run that is cut short leaves what it has measured.
    """
    result: records.Run = {
        "benchmark": benchmark,
        "environment": records.environment(args.device),
        "settings": {
            "device": args.device.type,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            **settings,
        },
        **extra,
        "records": [],
    }
    for item in progress(items, benchmark, "item"):
        result["records"] += measure(item, args)
        if args.output is not None:
            records.write(result, args.output)
    return result


def report(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], records.Run],
    text: Callable[[records.Run], str],
) -> int:
    """Run and print the text; 0, or 1 where the check failed: then nothing is written."""
    try:
        result = run(args)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        if args.output is not None:
            args.output.unlink(missing_ok=True)
        return 1
    print(text(result))
    if args.output is not None:
        print(f"\nwritten to {args.output}")
    return 0
