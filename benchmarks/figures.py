"""The figures this project sets itself, computed from one run's records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.records import Run
from benchmarks.roofline import Peaks, plan_floor
from benchmarks.shapes import SHAPES
from benchmarks.traffic import FORWARD_STAGES, fused_stages

LAYOUTS = ("contiguous", "channels_last")
TARGET_SHAPE = "256-64@56"
TARGET_SETTINGS = {"device": "cpu", "dtype": "float32", "batch": 16, "threads": 2, "bias": True}
# What a figure must reach, and what it is to reach in the end.
SPEEDUP_CONTIGUOUS = (2.0, 3.0)
SPEEDUP_CHANNELS_LAST = (1.5, 2.2)
SPEEDUP_ANY_SHAPE = (1.0, 1.15)
# The same where the C allocator keeps its memory, so that the reference has no page faults.
SPEEDUP_WITHOUT_FAULTS = (1.0, 1.25)
KEEPING_ALLOCATORS = ("libtcmalloc", "libjemalloc", "libmimalloc")
MEMORY_RATIO = (0.55, 0.55)
FLOOR_SHARE = (0.8, 0.8)


@dataclass(frozen=True)
class Figure:
    """One measured figure and its bounds, from below or from above: what it must reach, and what
    it is to reach in the end."""

    description: str
    value: float
    bounds: tuple[float, float]
    at_most: bool = False

    @property
    def met(self) -> tuple[bool, bool]:
        """Whether it reaches the one and the other."""
        bound, goal = self.bounds
        if self.at_most:
            return self.value <= bound, self.value <= goal
        return self.value >= bound, self.value >= goal


Records = Mapping[tuple[str, str], Mapping[str, Any]]


def by_shape_and_variant(run: Run) -> Records:
    """The run's records by (shape, variant); what was left out of it is left out here."""
    return {
        (record["shape"], record["variant"]): record
        for record in run["records"]
        if "left_out" not in record
    }


def shape_names(run: Run) -> list[str]:
    """The measured shapes, each once, in the order they were measured."""
    return list(dict.fromkeys(record["shape"] for record in run["records"]))


def variants(run: Run) -> list[str]:
    """The variants that have times, each once, in the order they were measured."""
    return list(dict.fromkeys(variant for _, variant in by_shape_and_variant(run)))


def peers(run: Run) -> list[str]:
    """The variants that are neither the reference nor fused."""
    return [name for name in variants(run) if name.split()[0] not in ("reference", "fused")]


def peer_speedup(records: Records, shape: str, peer: str, phase: str = "step") -> float | None:
    """Median time of a peer over that of the fused block in channels_last; None without either."""
    if (shape, peer) not in records:
        return None
    fused = records[shape, "fused channels_last"]
    return records[shape, peer][phase]["median"] / fused[phase]["median"]


def floor(run: Run, shape: str, phase: str) -> float:
    """The least seconds of the fused stages of `phase` at the peaks of the run."""
    settings = run["settings"]
    itemsize = getattr(torch, settings["dtype"]).itemsize
    costs = fused_stages(SHAPES[shape], settings["batch"], itemsize)
    return plan_floor(costs, Peaks(**run["peaks"]), FORWARD_STAGES if phase == "forward" else None)


def floor_share(run: Run, shape: str, phase: str) -> float:
    """That floor over the median time of the fused block in channels_last."""
    fused = by_shape_and_variant(run)[shape, "fused channels_last"]
    return floor(run, shape, phase) / fused[phase]["median"]


def speedup(records: Records, shape: str, layout: str, phase: str = "step") -> float:
    """Median time of the reference over that of the fused block, both in `layout`."""
    reference, fused = (records[shape, f"{kind} {layout}"] for kind in ("reference", "fused"))
    return reference[phase]["median"] / fused[phase]["median"]


def memory_ratio(records: Records, shape: str, layout: str) -> float:
    """Bytes kept for backward by the fused block over those of the reference, both in `layout`."""
    reference, fused = (records[shape, f"{kind} {layout}"] for kind in ("reference", "fused"))
    return fused["saved_bytes"] / reference["saved_bytes"]


def figures(run: Run) -> list[Figure]:
    """The figures that `run` can tell: none unless it ran under `TARGET_SETTINGS`."""
    if any(run["settings"][key] != value for key, value in TARGET_SETTINGS.items()):
        return []
    records = by_shape_and_variant(run)
    rows = []
    for shape in shape_names(run):
        bounds = SPEEDUP_ANY_SHAPE
        if shape == TARGET_SHAPE and _keeps_memory(run):
            bounds = SPEEDUP_WITHOUT_FAULTS
        elif shape == TARGET_SHAPE:
            bounds = SPEEDUP_CHANNELS_LAST
            value = speedup(records, shape, "contiguous")
            rows.append(Figure(f"{shape}, speed-up contiguous", value, SPEEDUP_CONTIGUOUS))
        value = speedup(records, shape, "channels_last")
        rows.append(Figure(f"{shape}, speed-up channels_last", value, bounds))
    for shape in shape_names(run):
        value = max(memory_ratio(records, shape, layout) for layout in LAYOUTS)
        rows.append(Figure(f"{shape}, kept for backward", value, MEMORY_RATIO, at_most=True))
    for shape in shape_names(run):
        value = floor_share(run, shape, "step")
        rows.append(Figure(f"{shape}, floor over time", value, FLOOR_SHARE))
    return rows


def _keeps_memory(run: Run) -> bool:
    preloaded = run["environment"].get("preloaded", [])
    return any(name.startswith(KEEPING_ALLOCATORS) for name in preloaded)
