"""What a user would pick instead of the fused block, as further variants of the benchmarks.

A peer that is not installed, does not run here or computes something else is left out with the
reason: it never ends a run, and is never reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import model_zoo
from benchmarks.cases import Case, Inputs, TorchCase, disagreements
from fused_bottleneck import Bottleneck

Peers = dict[str, Callable[[Inputs], Case]]


def compiled(inputs: Inputs, mode: str) -> Case:
    """The plain block under torch.compile, in channels_last."""
    torch._dynamo.reset()  # every shape is compiled for itself, none as a dynamic one
    case = inputs.case(Bottleneck, "channels_last")
    call: Any = torch.compile(case.block, mode=mode, dynamic=False)

    def run(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step returned is done with
        return call(x)

    return TorchCase(case.block, case.x, case.grad_out, run)


class TimmBottleneck(Bottleneck):
    """The plain block with timm's BatchNormAct2d in place of its first two BN+ReLU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        make_norm = model_zoo.load("timm.layers").BatchNormAct2d
        super().__init__(*args, **kwargs)
        for name in ("bn1", "bn2"):
            norm = getattr(self, name)
            setattr(self, name, make_norm(norm.num_features, norm.eps, norm.momentum))
        self.relu = nn.ReLU(inplace=True)

    def branch(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        return self.bn3(self.conv3(out))


def _jax(inputs: Inputs) -> Case:
    # Otherwise JAX takes most of the GPU's memory at its first use.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from benchmarks.jax_peer import jax_case

    return jax_case(inputs)


PEERS: Peers = {
    "compile": lambda inputs: compiled(inputs, "default"),
    "compile max-autotune": lambda inputs: compiled(inputs, "max-autotune"),
    "timm": lambda inputs: inputs.case(TimmBottleneck, "channels_last"),
    "jax": _jax,
}


# All but max-autotune, which tries for minutes a block: only when asked for.
DEFAULT_PEERS = [name for name in PEERS if name != "compile max-autotune"]


def build_peers(
    names: Sequence[str],
    inputs: Inputs,
    bounds: tuple[float, float],
    expected: dict[str, Tensor],
    peers: Peers = PEERS,
) -> tuple[dict[str, Case], dict[str, str]]:
    """The peers that run and agree with the expected results, and why the others do not."""
    cases: dict[str, Case] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            case = peers[name](inputs)
            wrong = disagreements({name: case}, bounds, expected)
            case.forward()
        except Exception as error:  # whatever happens inside another library
            left_out[name] = first_line(error)
            continue
        if wrong:
            left_out[name] = wrong[name][0]
        else:
            cases[name] = case
    return cases, left_out


def first_line(error: Exception) -> str:
    """An error in one line of at most 200 characters."""
    text = f"{type(error).__name__}: {error}".strip()
    with suppress(IndexError):
        text = text.splitlines()[0]
    return text[:200]
