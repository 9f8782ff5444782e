"""Cases that were checked against the plain block: what any benchmark of a block starts from."""

from __future__ import annotations

import argparse

from torch import Tensor

from benchmarks.cases import (
    BASELINE,
    Case,
    Inputs,
    build_cases,
    build_inputs,
    composed_reasons,
    disagreements,
)
from benchmarks.options import DTYPES, Refused
from benchmarks.shapes import BlockShape

SEEDS = 3


def agreeing_cases(
    shape: BlockShape, args: argparse.Namespace, bounds: tuple[float, float]
) -> tuple[Inputs, dict[str, Case], dict[str, Tensor]]:
    """Inputs, the reference and the fused variants, and the baseline's results.

    Raises Refused where a variant would run unfused or disagrees. A gradient disagrees if it does
    so on every one of `SEEDS` data sets: where a tensor is small, a single ReLU whose argument is
    within rounding of zero moves its gradients by a per cent, but not on every data set.
    """
    for seed in range(SEEDS):
        inputs = build_inputs(
            shape, args.batch, DTYPES[args.dtype], args.device, bias=args.bias, seed=seed
        )
        cases = build_cases(inputs)
        expected = cases[BASELINE].results()
        problems = composed_reasons(cases)
        if not problems:
            found = disagreements(cases, bounds, expected)
            problems = [line for lines in found.values() for line in lines]
        if not problems:
            return inputs, cases, expected
        if not all(": grad" in line for line in problems):
            break
    raise Refused("\n".join([f"{shape.name} is not reported:", *problems]))
