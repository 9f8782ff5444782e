"""Blocks to test, runs of them, and comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from tolerances import EAGER_FACTOR, FLOAT64, FLOAT64_SMALL, FLOORS, SMALL_GRADIENT
from torch import Tensor, nn

from fused_bottleneck import Bottleneck, FusedBottleneck

Pair = tuple[int, int]

# Every way to compute a block (conftest.use).
IMPLEMENTATIONS = ["extension", "gram", "product", "torch"]

# Enough for the scatter of errors from seed to seed to be known (see assert_criterion).
CRITERION_SEEDS = {
    torch.float32: range(4),
    torch.bfloat16: range(10),
    torch.float16: range(10),
}


class PooledDownsample(nn.Sequential):
    """ResNet-D's shortcut: pooling, then a 1x1 convolution."""

    def __init__(self, channels: int, wide: int, stride: int, bias: bool) -> None:
        super().__init__(
            nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(channels, wide, 1, bias=bias),
            nn.BatchNorm2d(wide),
        )


class ScaledIdentity(nn.Module):
    """A shortcut without parameters that is not the identity."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


DOWNSAMPLES: dict[str, Callable[[int, int, Any, bool], nn.Module | None]] = {
    "identity": lambda c, w, s, b: None,
    "conv": lambda c, w, s, b: nn.Sequential(
        nn.Conv2d(c, w, 1, s, bias=b), nn.BatchNorm2d(w, eps=1e-3, momentum=0.3)
    ),
    "pool": PooledDownsample,
    "conv3": lambda c, w, s, b: nn.Conv2d(c, w, 3, s, 1, bias=b),
    "module": lambda c, w, s, b: ScaledIdentity(),
    "nn.Identity": lambda c, w, s, b: nn.Identity(),
}


@dataclass(frozen=True)
class Case:
    """A block and its input."""

    channels: int = 16
    width: int = 4
    stride: int | Pair = 1
    downsample: str = "identity"
    bias: bool = True
    size: tuple[int, int, int] = (3, 6, 5)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def wide(self) -> int:
        return self.width * self.options.get("expansion", 4)

    def module(self, kind: type[Bottleneck], seed: int = 0) -> Bottleneck:
        """The block in float64 with parameters and buffers away from their initial values."""
        torch.manual_seed(seed)
        make = DOWNSAMPLES[self.downsample]
        downsample = make(self.channels, self.wide, self.stride, self.bias)
        args = (self.channels, self.width, downsample, self.stride)
        block = kind(*args, bias=self.bias, **self.options).double()
        randomise(block)
        return block

    def pair(self, seed: int = 0) -> tuple[Bottleneck, FusedBottleneck]:
        """The plain and the fused block with equal parameters and buffers."""
        reference = self.module(Bottleneck, seed)
        fused = self.module(FusedBottleneck, seed)
        fused.load_state_dict(reference.state_dict(), strict=True)
        return reference, fused

    def input(self, seed: int = 1) -> Tensor:
        n, h, w = self.size
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, self.channels, h, w, dtype=torch.float64, generator=generator)


def randomise(module: nn.Module) -> None:
    """Batch norm parameters of both signs and non-trivial running statistics."""
    for norm in norms_of(module).values():
        with torch.no_grad():
            if norm.weight is not None:
                sign = torch.where(torch.rand_like(norm.weight) < 0.2, -1.0, 1.0)
                norm.weight.copy_(sign * torch.empty_like(norm.weight).uniform_(0.5, 1.5))
            if norm.bias is not None:
                norm.bias.normal_(0, 0.5)
            if norm.running_mean is not None:
                norm.running_mean.normal_(0, 0.5)
                norm.running_var.uniform_(0.5, 2)


def norms_of(module: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)}


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def zero_gradients(module: nn.Module) -> set[str]:
    """Biases of the block's own convolutions whose gradient is exactly zero: those before batch
    statistics. The downsample's is one of them where it is fused."""
    before = {"bn1": "conv1", "bn2": "conv2", "bn3": "conv3", "bn": "conv"}
    downsample = getattr(module, "identity_downsample", None)
    if isinstance(downsample, nn.Sequential) and isinstance(downsample[0], nn.Conv2d):
        before["identity_downsample.1"] = "identity_downsample.0"
    names = {n for n, _ in module.named_parameters()}
    norms = norms_of(module)
    batch = {n for n in before if n in norms and uses_batch_statistics(norms[n])}
    return names & {f"{before[n]}.bias" for n in batch}


def noise_gradients(module: nn.Module) -> set[str]:
    """Of a downsample that runs as a module: its bias's gradient is zero up to nn's rounding."""
    pooled = isinstance(getattr(module, "identity_downsample", None), PooledDownsample)
    batch = pooled and uses_batch_statistics(module.identity_downsample[2])
    return {"identity_downsample.1.bias"} if batch else set()


class Result(NamedTuple):
    """What a forward and a backward of a module leave."""

    out: Tensor
    grads: dict[str, Tensor | None]  # of "x" and of every parameter
    buffers: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All results that are floating point tensors, by name."""
        grads = {f"grad {n}": g for n, g in self.grads.items() if g is not None}
        buffers = {n: b for n, b in self.buffers.items() if b.is_floating_point()}
        return {"out": self.out} | grads | buffers


def grad_like(out: Tensor, seed: int = 2) -> Tensor:
    """A fixed random gradient of out, equal in every dtype up to its rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)


def leaf(x: Tensor) -> Tensor:
    """A copy of x, with its strides, that takes a gradient."""
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def run(module: nn.Module, x: Tensor, grad_out: Tensor | None = None) -> Result:
    """Forward and backward; the module's gradients are cleared before."""
    module.zero_grad(set_to_none=True)
    x = leaf(x)
    out = module(x)
    if out.requires_grad:
        out.backward(grad_like(out) if grad_out is None else grad_out)
    grads = {"x": x.grad} | {n: p.grad for n, p in module.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
    return Result(out.detach(), grads, buffers)


def greatest(tensors: Iterable[Tensor | None]) -> float:
    """Largest magnitude among all elements."""
    return max((float(t.abs().max()) for t in tensors if t is not None and t.numel()), default=0.0)


def assert_equal_float64(
    actual: Result,
    expected: Result,
    zero: Iterable[str] = (),
    noise: Iterable[str] = (),
    tolerance: float = FLOAT64,
) -> None:
    """All of a float64 result to a relative tolerance.

    Gradients in zero are to be exactly zero, those in noise zero relative to the largest one.
    """
    assert actual.out.dtype == expected.out.dtype == torch.float64
    assert actual.out.shape == expected.out.shape
    assert actual.grads.keys() == expected.grads.keys()
    assert actual.buffers.keys() == expected.buffers.keys()
    limits = {"out": greatest([expected.out])}
    largest = greatest(expected.grads.values())
    for name, grad in expected.grads.items():
        got = actual.grads[name]
        assert (got is None) == (grad is None), f"grad {name}"
        if got is None or grad is None:
            continue
        assert got.shape == grad.shape
        assert got.dtype == grad.dtype
        if name in zero:
            assert not got.any(), f"grad {name} is to be exactly zero"
        if name in zero or name in noise:
            assert greatest([got, grad]) <= tolerance * largest, name
        limits[f"grad {name}"] = max(greatest([grad]), FLOAT64_SMALL * largest)
    for name, buffer in expected.buffers.items():
        if not buffer.is_floating_point():
            assert torch.equal(actual.buffers[name], buffer), name
        limits[name] = greatest([buffer])
    got_tensors, tensors = actual.tensors(), expected.tensors()
    for name, tensor in tensors.items():
        if name.removeprefix("grad ") in {*zero, *noise}:
            continue
        error = greatest([got_tensors[name] - tensor])
        assert error <= tolerance * limits[name], f"{name}: {error / (limits[name] or 1):.3g}"


def relative_error(actual: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """Norm of the difference over that of the expected tensor, or over least if that is more."""
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = max(float(expected.norm()), least)
    difference = float((actual - expected).norm())
    return difference / norm if norm else difference


def errors(actual: Result, oracle: Result, skip: Iterable[str] = ()) -> dict[str, float]:
    """Relative errors of all tensors of a result.

    A gradient that is a difference of large terms, or zero, counts relative to SMALL_GRADIENT
    times the largest one (per element).
    """
    ours, theirs = actual.tensors(), oracle.tensors()
    assert ours.keys() == theirs.keys()
    sizes = {n: t.numel() ** 0.5 for n, t in theirs.items()}
    grads = [n for n in theirs if n.startswith("grad ")]
    largest = max((float(theirs[n].norm()) / sizes[n] for n in grads), default=0.0)
    least = {n: SMALL_GRADIENT * largest * sizes[n] for n in grads}
    names = [n for n in theirs if n.removeprefix("grad ") not in set(skip)]
    return {n: relative_error(ours[n], theirs[n], least.get(n, 0.0)) for n in names}


def assert_criterion(
    fused: list[dict[str, float]],
    eager: list[dict[str, float]],
    dtype: torch.dtype,
    standard_errors: float = 3,
) -> None:
    """DESIGN's criterion: the fused error is not above 1.1 times eager's plus the floor.

    One row per seed. In 16 bit most of an error comes from the few ReLUs that open or close on a
    rounding, so that single ratios scatter: what must not be positive is the mean over the seeds
    of the squared error's excess over the squared limit, by more than its own standard error times
    standard_errors (0 where no ReLU can matter).
    """
    for name in fused[0]:
        ours = torch.tensor([row[name] for row in fused], dtype=torch.float64)
        theirs = torch.tensor([row[name] for row in eager], dtype=torch.float64)
        assert ours.isfinite().all(), name
        if not theirs.isfinite().all():
            continue  # eager overflows (float16)
        excess = ours**2 - (EAGER_FACTOR * theirs + FLOORS[dtype]) ** 2
        scatter = excess.std() if len(excess) > 1 else 0.0
        doubt = standard_errors * scatter / len(excess) ** 0.5
        sizes = f"{ours.square().mean().sqrt():.3g}, eager's {theirs.square().mean().sqrt():.3g}"
        assert excess.mean() <= doubt, (
            f"{name}: error {sizes}, over the limit by {excess.mean():.2g}"
        )


class Trial(NamedTuple):
    """A fused block, its input, and what the criterion holds its results against."""

    fused: FusedBottleneck
    x: Tensor
    want: Result  # in float64
    eager: dict[str, float]  # the plain block's errors
    skip: frozenset[str]  # gradients that do not count


def trial(
    pair: tuple[Bottleneck, FusedBottleneck], x: Tensor, but: frozenset[str] = frozenset()
) -> Trial:
    """Of a plain and a fused block in the dtype of x; but: see Trial.skip.

    The float64 oracle has their rounded parameters, buffers and input.
    """
    plain, fused = pair
    want = run(in_dtype(plain, torch.float64), x.double())
    skip = but | zero_gradients(fused) | noise_gradients(fused)
    return Trial(fused, x, want, errors(run(plain, x), want, skip), skip)


def assert_trials(trials: Sequence[Trial]) -> None:
    """The criterion for the implementation in use; the trials are left as they are."""
    rows = []
    for fused, x, want, _, skip in trials:
        fused = copy.deepcopy(fused)
        assert fused.why_not_fused(x) is None
        got = run(fused, x)
        assert got.out.dtype == x.dtype
        assert all(t.isfinite().all() for t in got.tensors().values())
        assert not any(got.grads[name].any() for name in zero_gradients(fused))
        rows.append(errors(got, want, skip))
    assert_criterion(rows, [each.eager for each in trials], trials[0].x.dtype)


T = TypeVar("T", Tensor, nn.Module)


def channels_last(value: T) -> T:
    """The format that the fused block computes in, and eager too where errors are compared.

    In float32 nn's own errors differ by a factor of two and more between the formats: it sums
    planes in contiguous memory, and rows of a matrix [pixels, channels] in channels_last.
    """
    return value.to(memory_format=torch.channels_last)


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of the module in dtype."""
    return copy.deepcopy(module).to(dtype)
