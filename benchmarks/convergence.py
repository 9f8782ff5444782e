"""Do networks of fused blocks learn what plain ones do? Several seeds, float32 and bfloat16.

    python -m benchmarks.convergence            # about 10 minutes on two cores
    python -m benchmarks.convergence --quick

Trains the small ResNet of examples/train.py on the real images that it uses, with the same weights
and batches for both variants of a seed. A seed whose first losses part by more than
examples/parity.py allows ends the run with exit status 1. How the trainings end depends on chance;
the report compares mean and spread over the seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from benchmarks import convergence_report, options, records
from benchmarks.options import Refused

sys.path.insert(0, str(records.ROOT / "examples"))

import data
import parity
from config import DTYPES, VARIANTS, Config
from training import Training, train_in_lockstep

EPOCHS = {"digits": 3, "mnist": 2}
TRAINED_IN = ("float32", "bfloat16")


class Trial(NamedTuple):
    """One seed: both variants are trained on the data in the dtype."""

    data: str
    dtype: str
    seed: int

    def __str__(self) -> str:
        return f"{self.data}, {self.dtype}, seed {self.seed}"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default is resolved."""
    parser = options.parser("convergence", __doc__ or "", several_dtypes=True)
    options.add_quick(parser, "digits, one epoch, 2 seeds, width 4")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(TRAINED_IN), help="default: %(default)s"
    )
    parser.add_argument("--data", nargs="+", choices=EPOCHS, help="default: digits and mnist")
    parser.add_argument("--seeds", type=options.positive, help="trainings of each (default: 5)")
    parser.add_argument("--width", type=options.positive, help="of the first stage (default: 16)")
    args = parser.parse_args(argv)
    options.resolve(parser, args, data=(list(EPOCHS), ["digits"]), seeds=(5, 2), width=(16, 4))
    if args.seeds < 2:
        parser.error("argument --seeds: a spread needs at least 2")
    args.dtype = "+".join(args.dtypes)
    options.default_output(args, "convergence", args.device.type)
    return args


def _epochs(args: argparse.Namespace) -> dict[str, int]:
    """Passes over each data set."""
    return {name: 1 if args.quick else EPOCHS[name] for name in args.data}


def _config(trial: Trial, args: argparse.Namespace) -> Config:
    return Config(
        trial.data,
        _epochs(args)[trial.data],
        width=args.width,
        seed=trial.seed,
        device=args.device.type,
        dtype=trial.dtype,
    )


def train(trial: Trial, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per variant; raises Refused where their first losses part."""
    dataset = data.load(trial.data)
    config = data.describe(_config(trial, args), dataset)
    steps = config.total_steps
    trainings = [Training(config, variant, steps) for variant in VARIANTS]
    batches = data.training_batches(dataset.train, config, range(steps))
    train_in_lockstep(trainings, batches, steps, lambda training: None)
    for training in trainings:
        training.test(data.evaluation_batches(dataset.test, config))
    reference, fused = (training.losses for training in trainings)
    for step, bound in enumerate(parity.BOUNDS[trial.dtype].early):
        gap = abs(reference[step] - fused[step])
        if not gap <= bound:  # also when it is NaN
            raise Refused(f"{trial}: the losses of step {step + 1} differ by {gap:.1e}")
    return [
        {
            **trial._asdict(),
            "variant": training.variant,
            "accuracy": training.accuracy,
            "final_loss": parity.final_loss(training.losses),
            "steps": steps,
        }
        for training in trainings
    ]


def run(args: argparse.Namespace) -> records.Run:
    """Train every seed; raises Refused where one parts."""
    trials = [
        Trial(name, dtype, seed)
        for name in args.data
        for dtype in args.dtypes
        for seed in range(args.seeds)
    ]
    config = asdict(_config(trials[0], args))
    kept = ("width", "blocks_per_stage", "batch_size", "lr", "layout")
    settings = {"seeds": args.seeds, "epochs": _epochs(args)}
    settings |= {name: config[name] for name in kept}
    return options.collect("convergence", args, trials, train, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, write the records; 0, or 1 where the check failed."""
    return options.report(parse_arguments(argv), run, convergence_report.text)


if __name__ == "__main__":
    sys.exit(main())
