"""``fuse`` and ``unfuse``: a model's bottleneck blocks become fused ones, and plain again."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar

from torch import nn

from . import adapters, checks
from .block import FusedBlock
from .bottleneck import FusedBottleneck
from .chain import FusedChain
from .conv_bn_relu import FusedConvBNReLU
from .fused_module import FusedModule, composed_method
from .layout import ChainLayout, Layout
from .reference import Bottleneck, ConvBNReLU

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[str, nn.Module], bool]


AnyLayout = Layout | ChainLayout


class Converted(FusedModule):
    """Base of the classes that ``fuse`` makes, which no module has by name.

    They are pickled as the plain class and its layout, and made anew where they are loaded.
    """

    def __reduce_ex__(self, protocol: Any) -> tuple:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        make, arguments, *state = reduced
        plain = [self.plain_class if a is type(self) else a for a in arguments]
        return restored, (self.plain_layout, make, *plain), *state


class ConvertedBlock(Converted, FusedBlock):
    """Base of the classes made of classes of bottleneck blocks."""


class ConvertedChain(Converted, FusedChain):
    """Base of the classes made of classes that call conv, BN and ReLU in turn."""


def restored(layout: AnyLayout, make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """An unpickled module, before its state is set; make(*arguments) is the plain one."""
    module = make(*arguments)
    return _with_class(module, fused_class(type(module), layout))


_classes: dict[tuple[type[nn.Module], AnyLayout], type[FusedModule]] = {
    (Bottleneck, FusedBottleneck.plain_layout): FusedBottleneck,
    (ConvBNReLU, FusedConvBNReLU.plain_layout): FusedConvBNReLU,
}


def fused_class(plain: type[nn.Module], layout: AnyLayout) -> type[FusedModule]:
    """The fused subclass of a class that has that layout; always the same."""
    if (plain, layout) not in _classes:
        _classes[plain, layout] = _made_class(plain, layout)
    return _classes[plain, layout]


def _made_class(plain: type[nn.Module], layout: AnyLayout) -> type[FusedModule]:
    members = {
        "__module__": __name__,
        "__doc__": f"Fused {plain.__module__}.{plain.__qualname__}.",
        "plain_class": plain,
        "plain_layout": layout,
        "composed": composed_method(plain),
    }
    argument = next(name for name in inspect.signature(plain.forward).parameters if name != "self")
    if argument != "x":
        members["forward"] = _forward_of(argument)
    base = ConvertedBlock if isinstance(layout, Layout) else ConvertedChain
    return type(f"Fused{plain.__name__}", (base, plain), members)


def _forward_of(argument: str) -> FunctionType:
    """FusedModule.forward with its argument called so, for calls by keyword and for tracers."""
    forward = FusedModule.forward
    names = tuple(argument if n == "x" else n for n in forward.__code__.co_varnames)
    code = forward.__code__.replace(co_varnames=names)
    return FunctionType(code, forward.__globals__, forward.__name__)


def _with_class(block: nn.Module, kind: type[nn.Module]) -> nn.Module:
    object.__setattr__(block, "__class__", kind)
    return block


def fuse(
    model: Model, *, filter_fn: Filter | None = None, strict: bool = False, stem: bool = False
) -> Model:
    """Fuse the bottleneck blocks of a model, in place.

    A block keeps its identity, parameters, buffers, children, hooks and state_dict; its class
    becomes a subclass of what it was, whose forward is the fused one. Blocks that cannot be fused
    are left as they are (``explain`` says why), and so are those that are fused already. With
    FUSED_BOTTLENECK_DISABLE=1 nothing is changed.

    Args:
        model: any module; wrappers like DistributedDataParallel are looked into.
        filter_fn: called with the name and the module of each block that can be fused; those for
            which it is false are left.
        strict: raise unless there is something to fuse and nothing had to be declined.
        stem: also fuse convolution, normalisation and ReLU outside the blocks, where a known
            ResNet starts with them, and in every nn.Sequential; on CPU with the nn.MaxPool2d after
            them, if there is one.

    Returns:
        The model.

    Raises:
        TypeError: model is not a module.
        ValueError: strict, and a block was declined or nothing found; names and reasons are in
            the message, and nothing was changed.
    """
    checks.raise_if(checks.module(model))
    if checks.disabled():
        return model
    findings = adapters.survey(model)
    if stem:
        findings += adapters.survey_stems(model)
    if strict:
        _require_all(findings)
    if not any(f.layout is not None for f in findings):
        warnings.warn(f"fuse found nothing to fuse{_declined(findings)}", stacklevel=2)
    chosen = [
        (f.module, fused_class(type(f.module), f.layout))
        for f in findings
        if f.layout is not None and not f.fused
        if filter_fn is None or filter_fn(f.name, f.module)
    ]
    _swap(chosen)
    return model


def _declined(findings: list[adapters.Finding]) -> str:
    lines = [f"\n  {f.name or 'the model'}: {f.reason}" for f in findings if f.layout is None]
    return ":" + "".join(lines) if lines else ": the model has no bottleneck blocks"


def _require_all(findings: list[adapters.Finding]) -> None:
    if not findings or any(f.layout is None for f in findings):
        raise ValueError(f"fuse(strict=True) cannot fuse the whole model{_declined(findings)}")


def _swap(chosen: Sequence[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Give every module its class, or, where Python refuses one, none."""
    before = [(module, type(module)) for module, _ in chosen]
    try:
        for module, kind in chosen:
            _with_class(module, kind)
    except TypeError:
        for module, kind in before:
            _with_class(module, kind)
        raise


def unfuse(model: Model) -> Model:
    """Make the fused modules of a model plain again, in place, and return the model.

    The inverse of ``fuse``; a FusedBottleneck becomes a Bottleneck, a FusedConvBNReLU a
    ConvBNReLU. Classes that users derived from them stay.

    Raises:
        TypeError: model is not a module.
    """
    checks.raise_if(checks.module(model))
    for module in model.modules():
        if isinstance(module, FusedModule) and "plain_class" in vars(type(module)):
            _with_class(module, module.plain_class)
    return model
