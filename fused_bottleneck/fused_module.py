"""``FusedModule``: what every fused class shares, whatever it fuses."""

from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .layout import ChainLayout, Layout


def composed_method(plain: type[nn.Module]) -> Callable[..., Tensor]:
    """The forward of a plain class, under the name of a method of its fused class.

    torch.jit compiles a method by the name that its function has, and forward is another one.
    """
    forward = plain.forward
    if not isinstance(forward, FunctionType):
        return forward
    code, defaults = forward.__code__, forward.__defaults__
    method = FunctionType(code, forward.__globals__, "composed", defaults, forward.__closure__)
    method.__kwdefaults__ = forward.__kwdefaults__
    method.__annotations__ = forward.__annotations__
    return method


class FusedModule(nn.Module):
    """Base of the fused classes, each of which also derives from the plain class it stands for.

    Geometry, modes and parameters are read from the children at every call. Where fusing would
    change what the user sees, the plain class's own forward runs.

    Class attributes: ``plain_class``; ``plain_layout``, where it keeps its parts; ``composed``, its
    forward. A subclass defines ``_fused_call`` and ``_run``.
    """

    plain_class: ClassVar[type[nn.Module]]
    plain_layout: ClassVar[Layout | ChainLayout]
    composed: Callable[..., Tensor]

    # torch.jit reads types here, and a plain class that is no block may return any other.
    def forward(self, x):  # type: ignore[no-untyped-def]
        if torch.jit.is_scripting():
            return self.composed(x)
        return self._forward(x)

    @torch.jit.unused
    def why_not_fused(self, x: Tensor) -> str | None:
        """The reason why ``self(x)`` would run composed, in one sentence; None if it is fused.

        Runs nothing; the output of a downsample that is not conv1x1+BN is taken on trust.
        """
        call = self._fused_call(x)
        return call if isinstance(call, str) else None

    @torch.jit.unused
    def _forward(self, x: Tensor) -> Tensor:
        call = self._fused_call(x)
        return self.composed(x) if isinstance(call, str) else self._run(x, call)

    def _fused_call(self, x: Any) -> Any:
        """What ``_run`` needs for x, or the reason why x must run composed."""
        raise NotImplementedError

    def _run(self, x: Tensor, call: Any) -> Tensor:
        """The fused result."""
        raise NotImplementedError
