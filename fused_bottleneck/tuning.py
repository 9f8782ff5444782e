"""``tune``: measure the kernels' configurations for given blocks, ahead of training."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import dispatch
from .bottleneck import FusedBottleneck
from .kernels.tuned import Config, Problem

TUNED_STAGES = (
    "conv_forward",
    "gram",
    "tail_forward",
    "tail_wgrad",
    "tail_dgrad",
    "conv_dgrad",
    "conv_wgrad",
    "input_dgrad",
)
WARMUP_MS, REPEAT_MS = 5, 25


class BlockShape(NamedTuple):
    """A bottleneck to tune for: its batch, input channels C, width M, input size, stride.

    Its shortcut is a convolution where stride or channels ask for one.
    """

    batch: int
    in_channels: int
    width: int
    size: int
    stride: int = 1


def tune(
    model_or_shapes: nn.Module | Sequence[BlockShape],
    x: Tensor | None = None,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
) -> int:
    """Measure the kernels' configurations on this GPU and keep the fastest on disk.

    Takes minutes, as most of it is compiling; ordinary runs never tune. What is kept already is
    not measured again.

    Args:
        model_or_shapes: a model whose training step on x is run (on a copy: neither its parameters
            nor its running statistics change), or shapes of bottleneck blocks.
        x: the model's input, on the GPU; not for shapes.
        device, dtype: for shapes.
        progress: show a progress bar (tqdm if it is there).

    Returns:
        How many problems were tuned.

    Raises:
        ValueError: x is missing for a model, or not on a CUDA device that the kernels run on.
    """
    steps = _steps(model_or_shapes, x, torch.device(device), dtype)
    for _, value in steps:
        if value.device.type != "cuda":
            raise ValueError(f"tuning needs a CUDA device, got x on {value.device}")
    if not steps:
        return 0
    session = _Session(steps[0][1].device)
    _run(steps, session.collect)
    with _bar(len(session.problems), progress) as advance:
        session.advance = advance
        _run(steps, session.measure)
    session.save()
    return len(session.problems)


Step = tuple[nn.Module, Tensor]


def _steps(
    target: nn.Module | Sequence[BlockShape],
    x: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Step]:
    """The modules to run, and their inputs."""
    if isinstance(target, nn.Module):
        if x is None:
            raise ValueError("tune(model, x) needs an input x to run the model on")
        return [(copy.deepcopy(target), x)]
    return [_block_step(shape, device, dtype) for shape in target]


def _block_step(shape: BlockShape, device: torch.device, dtype: torch.dtype) -> Step:
    batch, channels, width, size, stride = shape
    wide = width * FusedBottleneck.expansion
    downsample = None
    if stride != 1 or channels != wide:
        downsample = nn.Sequential(
            nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
        )
    block = FusedBottleneck(channels, width, downsample, stride, bias=False)
    x = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    block = block.to(device, dtype)
    return block.to(memory_format=torch.channels_last), x  # type: ignore[call-overload]


def _run(steps: Sequence[Step], visit: Callable[[Callable[[], Any]], None]) -> None:
    """A training step of each module, with every stage's call shown to visit before it is made."""
    from .triton_stages import TritonStages

    def visited(name: str) -> Callable[..., Any]:
        stage = getattr(TritonStages, name)

        def method(self: TritonStages, *arguments: Any) -> Any:
            call = partial(stage, self, *arguments)
            visit(call)
            return call()

        return method

    kind = type("VisitedStages", (TritonStages,), {name: visited(name) for name in TUNED_STAGES})
    with dispatch.replaced_kernels(kind):
        for module, x in steps:
            out = module(x)
            out.backward(torch.randn_like(out))


class _Session:
    """The problems of a tuning run and what was found for them."""

    def __init__(self, device: torch.device) -> None:
        from .kernels import tuned

        self.device = device
        self.path = tuned.cache_file(torch.cuda.get_device_name(device))
        self.known = tuned.read(self.path)
        self.problems: dict[Problem, None] = {}
        self.found: dict[Problem, Config] = {}
        self.advance: Callable[[str], None] = lambda name: None

    def collect(self, call: Callable[[], Any]) -> None:
        """Note the problems of a stage's call."""
        from .kernels import config

        with config.asked() as problems:
            call()
        self.problems.update((p, None) for p in problems if p not in self.known)

    def measure(self, call: Callable[[], Any]) -> None:
        """Find the best configuration of each problem of a stage's call."""
        from .kernels import config

        with config.asked() as problems:
            call()
        for problem in problems:
            if problem in self.problems and problem not in self.found:
                self.found[problem] = self._best(call, problem)
                self.advance(problem.key())

    def _best(self, call: Callable[[], Any], problem: Problem) -> Config:
        from .kernels import config

        capability = torch.cuda.get_device_capability(self.device)
        tried = config.candidates(problem, capability)
        times = [self._time(call, problem, candidate) for candidate in tried]
        return tried[times.index(min(times))]

    def _time(self, call: Callable[[], Any], problem: Problem, candidate: Config) -> float:
        """Milliseconds of the call with a candidate; infinite where it does not fit the GPU.

        Triton's own passes fail with a plain RuntimeError, a message that starts with theirs; any
        other is not the candidate's fault, and is raised.
        """
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError
        from triton.testing import do_bench

        from .kernels import config

        with config.overridden(problem, candidate):
            try:
                call()
            except (OutOfResources, PTXASError, CompilationError):
                return float("inf")
            except RuntimeError as error:
                if not str(error).startswith("PassManager::run failed"):
                    raise
                return float("inf")
            return do_bench(call, warmup=WARMUP_MS, rep=REPEAT_MS, return_mode="median")

    def save(self) -> None:
        """Keep what was found, with what was known, and use it from now on."""
        from .kernels import tuned

        tuned.write(self.path, self.known | self.found)
        tuned.table.cache_clear()


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar's advance function: tqdm's if it is there, else lines of text."""
    if not show:
        yield lambda name: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        done = iter(range(1, total + 1))
        yield lambda name: print(f"tuned {next(done)}/{total}: {name}", flush=True)
        return
    with tqdm(total=total, desc="tuning", unit="kernel") as bar:

        def advance(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        yield advance
