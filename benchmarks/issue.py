"""The time that Hopper's multiprocessors take to issue a kernel's instructions: another floor.

From machine code: the instructions outside a kernel's loops over products count once for a warp,
those of a loop as often as its products are needed. A multiprocessor issues at most one instruction
a cycle on each of its four schedulers; real kernels reach about two thirds of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from benchmarks.compiled import Specialisation, build, machine_code, specialise
from benchmarks.sass import Code
from fused_bottleneck.kernels.config import blocks
from fused_bottleneck.kernels.launch import Call

# An H100 or H200 in its SXM form, at the clock it holds under matrix products.
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.755e9
ARCHITECTURE = 90

Values = dict[str, Any]


def _strided(v: Values) -> int:
    return int(v["SH"] * v["SW"])


# Lengths of the loops over products, in their order: channels, or pixels, of one program.
_DEPTHS: dict[str, Callable[[Values], Sequence[float]]] = {
    "conv1x1_forward": lambda v: [v["C"]],
    "conv2d_forward": lambda v: [v["C"] * v["KH"] * v["KW"]],
    "conv2d_dgrad": lambda v: [v["C"] * v["KH"] * v["KW"] / _strided(v)],
    "gram": lambda v: [v["ROWS"]],
    "conv_wgrad": lambda v: [v["ROWS"]],
    "tail_wgrad": lambda v: [v["ROWS"]] * (2 if v["C"] else 1),
    "tail_forward": lambda v: [v["M"], v["C"]] if v["C"] else [v["M"]],
    "tail_dgrad": lambda v: [v["W"], v["N"]],
    "input_dgrad": lambda v: (
        [v["M"], v["W"] / _strided(v), v["N"] / _strided(v)]
        if v["RESIDUAL"] == "downsample"
        else [v["M"]]
    ),
}


@cache
def _code(spec: Specialisation) -> Code:
    return machine_code(build(spec, ARCHITECTURE))


def _programs(name: str, grid: int, v: Values) -> float:
    """Programs that do not return at once: of the gram those on and above the diagonal."""
    if name != "gram":
        return grid
    count = blocks(v["K"], v["BLOCK"])
    return grid * (count + 1) / (2 * count)


def _products_per_step(v: Values, warps: int) -> float:
    """A warp's products in a step of a loop: of 64 rows for four warps, 256 columns, depth 16."""
    rows, columns = (v[key] if key in v else v["BLOCK"] for key in ("BLOCK_M", "BLOCK_N"))
    groups = rows / 64 / (warps / 4) * max(1, columns / 256)
    return float(groups * v["BLOCK_K"] / 16 * v.get("TAPS", 1))


def issue_seconds(call: Call, values: Values) -> float:
    """Seconds to issue a call's instructions at the full rate; 0 for kernels without products."""
    spec = specialise(call)
    if spec.name not in _DEPTHS:
        return 0.0
    code = _code(spec)
    loops = [loop for loop in code.loops if code.products(loop)]
    depths = _DEPTHS[spec.name](values)
    shares = [1.0] * len(depths)
    if spec.name == "tail_wgrad" and len(depths) == 2:  # a program goes through one of them
        first, second = (blocks(values[key], values["BLOCK_N"]) for key in ("K", "C"))
        shares = [first / (first + second), second / (first + second)]
    count = float(sum(not line.startswith("NOP") for line in code.instructions))
    if loops:  # else they are unrolled
        per_step = _products_per_step(values, spec.num_warps)
        for loop, depth, share in zip(loops, depths, shares, strict=True):
            rounds = share * depth / values["BLOCK_K"] * per_step / code.products(loop)
            count += (rounds - 1) * len(code.body(loop))
    warps = _programs(spec.name, call.grid[0], values) * spec.num_warps
    return warps * count / (MULTIPROCESSORS * SCHEDULERS * CLOCK)
