"""The one place that calls a kernel, so that the calls of a program can be listed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from ..operands import Activation, ConvGrad
from .config import Config


class Call(NamedTuple):
    """One call of a kernel: its grid, its arguments by position, its constants by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config


_calls: list[Call] | None = None


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constants: Any
) -> None:
    """Call a kernel, or only take note of it inside ``recording``."""
    if _calls is not None:
        _calls.append(Call(kernel, grid, arguments, constants, config))
        return
    kernel[grid](*arguments, **constants, num_warps=config.num_warps, num_stages=config.num_stages)


def source_pointers(source: Tensor | Activation) -> tuple[Tensor | None, ...]:
    """A convolution's input as kernels take it: x, and what makes it an activation, or None."""
    return source if isinstance(source, Activation) else (source, None, None, None, None)


def grad_pointers(grad: Tensor | ConvGrad) -> tuple[Tensor | None, ...]:
    """The gradient of a convolution's output as ``load_conv_grad`` takes it: computed, or dy."""
    if isinstance(grad, Tensor):
        return grad, None, None, None, None, None
    assert isinstance(grad.g, Tensor)  # a masked one is of the product way, which is CPU's
    return (grad.g, *grad[1:])


def is_recording() -> bool:
    """Whether calls are being listed, not made."""
    return _calls is not None


@contextmanager
def recording() -> Iterator[list[Call]]:
    """List the calls of whatever runs inside, without running them.

    With tensors on the meta device a whole training step can be listed on a machine without a
    GPU: that is what the compilation tests and the kernel report do.
    """
    global _calls
    previous, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = previous
