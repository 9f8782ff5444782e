"""The ten stages of a training step, each timed where it runs, on any device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_bottleneck import program
from fused_bottleneck.stages import Stages

# What a program calls once for each unit, in the order of its stages; see fused_bottleneck.stages.
FORWARD_CONVS = ("F1", "F2")
WEIGHT_GRADS = ("B4", "B5")
# Between two stages; those of the tail belong to F3 and B1, whose results are theirs only.
JUNCTIONS = ("bn_forward", "bn_backward")
FLUSH_BYTES = 512 * 2**20  # beyond any GPU's L2 cache
HEAD_START_CYCLES = 2_000_000  # about a millisecond: the host is ahead when the clock starts


class Clock(Protocol):
    """Times single calls; `seconds` gives what each label took."""

    def timed(self, label: str, call: Callable[[], Any]) -> Any:
        """The call's result; its time is added to the label's."""

    def seconds(self) -> dict[str, float]:
        """Seconds by label since the last time this was asked."""


class CpuClock:
    """Wall clock."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spent: dict[str, float] = defaultdict(float)

    def timed(self, label: str, call: Callable[[], Any]) -> Any:
        start = self._clock()
        result = call()
        self._spent[label] += self._clock() - start
        return result

    def seconds(self) -> dict[str, float]:
        spent, self._spent = self._spent, defaultdict(float)
        return dict(spent)


class CudaClock:
    """CUDA events around each call, which finds its operands in memory, not in the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, label: str, call: Callable[[], Any]) -> Any:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        result = call()
        end.record()
        self._events.append((label, start, end))
        return result

    def seconds(self) -> dict[str, float]:
        torch.cuda.synchronize()
        spent: dict[str, float] = defaultdict(float)
        for label, start, end in self._events:
            spent[label] += start.elapsed_time(end) / 1e3
        self._events = []
        return dict(spent)


def clock_for(device: torch.device) -> Clock:
    """The clock that is right for `device`."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


class WatchedStages:
    """Another implementation's stages, with the calls that a program makes of them timed.

    A call belongs to the stage that the program is in. Forward is in F1 and F2 at its first two
    convolutions, in F4 at tail_forward, and else in F3; backward begins in B1, and B2 to B6 have
    calls of their own (B2 is the convolution's where a block goes the product way).
    """

    def __init__(self, stages: Stages, clock: Clock) -> None:
        self._stages = stages
        self._clock = clock
        self._forward_convs = iter(FORWARD_CONVS)
        self._weight_grads = iter(WEIGHT_GRADS)
        self._label: str | None = None

    def __enter__(self) -> WatchedStages:
        self._stages.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stages.__exit__(kind, error, trace)

    def whole_forward(self, *arguments: object) -> None:
        """Stage by stage: a program that runs as a whole has nothing to be timed."""

    def whole_backward(self, *arguments: object) -> None:
        """Likewise."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._stages, name)

        def timed(*arguments: Any) -> Any:
            label = self._stage(name, arguments)
            return self._clock.timed(label, lambda: method(*arguments))

        return timed

    def _stage(self, name: str, arguments: Sequence[Any]) -> str:
        """The stage of a call, by the method's name and what was called before."""
        if name in JUNCTIONS:
            return "junctions"
        if self._label is None:
            if name == "channels_last":
                return "layout"
            # A forward begins with a convolution, a backward with anything else.
            self._label = "F1" if name == "conv_forward" else "B1"
        forward = self._label.startswith("F")
        if forward and name == "conv_forward":
            self._label = next(self._forward_convs, "F3")
        elif forward:
            self._label = "F4" if name == "tail_forward" else "F3"
        elif name in ("tail_dgrad", "conv_dgrad"):
            pointwise = name == "tail_dgrad" or _is_pointwise(arguments[1])
            self._label = "B2" if pointwise else "B3"
        elif name == "conv_wgrad" and self._label not in ("B1", "B2"):
            self._label = next(self._weight_grads)
        elif name == "input_dgrad":
            self._label = "B6"
        return self._label


def _is_pointwise(weight: Tensor) -> bool:
    return weight.shape[2] == weight.shape[3] == 1


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Time the stages of every program that runs inside."""
    original = program.stages_for

    def stages_for(*arguments: Any) -> WatchedStages:
        return WatchedStages(original(*arguments), clock)

    program.stages_for = stages_for  # type: ignore[assignment]
    try:
        yield
    finally:
        program.stages_for = original
