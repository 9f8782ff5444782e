"""The command line that the benchmarks share, and what becomes of a measurement."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from benchmarks.cases import NORM_BOUNDS

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NORM_BOUNDS}


class Refused(Exception):
    """The measurement would be of something else than it says."""


def parser(name: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        epilog=epilog or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--device", type=torch.device, default="cpu", help="cpu (default) or cuda")
    result.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
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


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace, **usual: Any) -> None:
    """Fill in what was not given: of `usual` {option: (value, value of --quick)}."""
    for name, (full, quick) in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this torch finds no CUDA device")
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def default_output(args: argparse.Namespace, *parts: object) -> None:
    """Name the output file after the settings, unless one was given or the run is a quick one."""
    if args.output is None and not args.quick:
        args.output = records.RESULTS / ("-".join(map(str, parts)) + ".json")


def measured(
    benchmark: str,
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    **extra: Any,
) -> records.Run:
    """The run as it is written: where it was measured, how, and its records."""
    return {
        "benchmark": benchmark,
        "environment": records.environment(args.device),
        "settings": {
            "device": args.device.type,
            "dtype": args.dtype,
            "threads": torch.get_num_threads(),
            **settings,
        },
        **extra,
        "records": rows,
    }


def report(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], records.Run],
    text: Callable[[records.Run], str],
) -> int:
    """Run, print the text, write the records; 0, or 1 where the check failed."""
    try:
        result = run(args)
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 1
    print(text(result))
    if args.output is not None:
        records.write(result, args.output)
        print(f"\nwritten to {args.output}")
    return 0
