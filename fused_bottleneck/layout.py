"""Where a class of bottleneck blocks keeps its parts, and reading them at call time."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .functional import Unit
from .modules import (
    batch_norm_arguments,
    class_path,
    conv_arguments,
    conv_bn_of,
    conv_class,
    norm_class,
    promotes,
)


@dataclass(frozen=True)
class Container:
    """A module that calls its children in the order of the formula, and does nothing else.

    path: empty for the block itself. kind: its class (``modules.class_path``).
    """

    path: str
    kind: str
    children: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How a class spells ``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))``.

    Everything is an attribute path from the block, like ``layer.0.convolution``.

    Attributes:
        units: the three convolutions, each with its normalisation.
        activations: the three ReLUs; None for one that is a function.
        shortcut: the module called on x, a convolution with its normalisation, or None where the
            class has no place for one.
        idle: attributes that must be off for the formula to hold: absent, nn.Identity, or None,
            False or empty.
        containers: the modules between the block and its parts; the block itself too where its
            class is not known, but its formula was proved with exactly these children.
        adds_in_place: whether the class writes ``out += residual``, which keeps out's dtype.
        flags: the block's attributes that are true or false, as they were when its formula was
            proved: the proof says nothing about other values.
    """

    units: tuple[tuple[str, str], ...] = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
    activations: tuple[str | None, ...] = ("relu", "relu", "relu")
    shortcut: str | tuple[str, str] | None = "downsample"
    idle: tuple[str, ...] = ()
    containers: tuple[Container, ...] = ()
    adds_in_place: bool = True
    flags: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class ChainLayout:
    """Which children a class calls one after the other.

    Attributes:
        names: those children, where a Sequential stands for its own; empty for all there are, as
            nn.Sequential calls them.
        has_rest: whether the class goes on from there. It then uses its input, and these
            children, for nothing else.
        given_out: the attribute that says which children's outputs the class also gives out: the
            chain ends with the first of them (``names_in``).
    """

    names: tuple[str, ...] = ()
    has_rest: bool = False
    given_out: str = ""

    def names_in(self, module: nn.Module) -> tuple[str, ...]:
        """The names, up to the first whose output that module gives out now."""
        given_out = getattr(module, self.given_out) if self.given_out else ()
        for count, name in enumerate(self.names, 1):
            if name in given_out:
                return self.names[:count]
        return self.names

    @property
    def is_unit(self) -> bool:
        """Whether a convolution, a normalisation and a ReLU are all there is."""
        return bool(self.names) and not self.has_rest


class Parts(NamedTuple):
    """The parts of a block as they are now: units to fuse, and the shortcut if it must be called.

    pairs: convolution and normalisation, three times, and that of the shortcut if it is fused.
    """

    pairs: list[tuple[nn.Conv2d, nn.Module]]
    called: nn.Module | None

    def units(self) -> list[Unit]:
        """What the convolutions and normalisations stand for now."""
        return [(conv_arguments(conv), batch_norm_arguments(bn)) for conv, bn in self.pairs]


def attribute(block: nn.Module, path: str, default: Any = None) -> Any:
    """The attribute at a dotted path; the default where there is none."""
    value: Any = block
    for name in path.split("."):
        value = getattr(value, name, default)
    return value


def read(block: nn.Module, layout: Layout) -> Parts:
    """The parts of a block, of which ``reason`` is None."""
    pairs = [(attribute(block, conv), attribute(block, norm)) for conv, norm in layout.units]
    if isinstance(layout.shortcut, tuple):
        conv, norm = layout.shortcut
        return Parts([*pairs, (attribute(block, conv), attribute(block, norm))], None)
    shortcut = None if layout.shortcut is None else attribute(block, layout.shortcut)
    if shortcut is None or checks.child("shortcut", shortcut, nn.Identity) is None:
        return Parts(pairs, None)
    unit = conv_bn_of(shortcut)
    return Parts(pairs, shortcut) if unit is None else Parts([*pairs, unit], None)


def reason(block: nn.Module, layout: Layout) -> str | None:
    """Why the block is not its layout's formula over plain children; None if it is."""
    for path in layout.idle:
        problem = _idle_reason(path, attribute(block, path))
        if problem is not None:
            return problem
    for container in layout.containers:
        problem = _container_reason(block, container)
        if problem is not None:
            return problem
    for flag, value in layout.flags:
        if getattr(block, flag, None) is not value:
            return f"{flag} was {value} when its forward was read"
    return _parts_reason(block, layout)


def _idle_reason(path: str, value: Any) -> str | None:
    """Why the attribute is not off; None if it is."""
    if not isinstance(value, nn.Module):
        return f"{path} is set" if value else None
    if checks.child(path, value, nn.Identity) is not None:
        return f"{path} is not empty, but {type(value).__name__}"
    return None


def _container_reason(block: nn.Module, container: Container) -> str | None:
    """Why the container does not just call its children; None if it does."""
    path = container.path
    module = attribute(block, path) if path else block
    if not isinstance(module, nn.Module):
        return f"{path} is missing"
    children = tuple(name for name, child in module._modules.items() if child is not None)
    if children != container.children:
        return f"the children of {path or 'the block'} have changed: {', '.join(children)}"
    if path and class_path(type(module)) != container.kind:
        return f"{path} is a {type(module).__name__}"
    return checks.child(path, module, type(module)) if path else None


def _parts_reason(block: nn.Module, layout: Layout) -> str | None:
    units = layout.units
    if isinstance(layout.shortcut, tuple):
        units = (*units, layout.shortcut)
    for conv, norm in units:
        problem = pair_reason(conv, attribute(block, conv), norm, attribute(block, norm))
        if problem is not None:
            return problem
    for path in layout.activations:
        if path is not None:
            problem = checks.child(path, attribute(block, path), nn.ReLU)
            if problem is not None:
                return problem
    return None


def pair_reason(conv: str, conv_module: Any, norm: str, norm_module: Any) -> str | None:
    """Why the parameters of a convolution and a normalisation of those names do not say it all."""
    problem = checks.child(conv, conv_module, conv_class(conv_module))
    return problem or checks.child(norm, norm_module, norm_class(norm_module))


def norm_promotion(parts: Parts, x: Tensor) -> str | None:
    """Why a normalisation's output is not of x's dtype, that of the convolutions; None if it is."""
    for _, norm in parts.pairs:
        if promotes(norm) and norm.weight.dtype != x.dtype:
            return f"a {type(norm).__name__} promotes {x.dtype} to {norm.weight.dtype}"
    return None


def promotion(parts: Parts, layout: Layout, x: Tensor, cast_x: Tensor) -> str | None:
    """Why the output is not of the dtype that the convolutions run in; None if it is.

    cast_x: x in the autocast dtype, where autocast is on.
    """
    reason = norm_promotion(parts, cast_x)
    if reason is not None:
        return reason
    if not layout.adds_in_place and x.dtype != cast_x.dtype:
        return f"adding x promotes {cast_x.dtype} to {x.dtype}"
    return None


def composed_with(block: nn.Module, layout: Layout, x: Tensor, residual: Tensor) -> Tensor:
    """The block's formula through its children, with a residual that is computed already."""
    out = x
    steps = zip(layout.units, layout.activations, strict=True)
    for last, ((conv, norm), activation) in zip((False, False, True), steps, strict=True):
        out = attribute(block, conv)(out)
        if not norm.startswith(f"{conv}."):  # which calls it itself
            out = attribute(block, norm)(out)
        if last and layout.adds_in_place:
            out += residual
        elif last:
            out = out + residual
        out = F.relu(out) if activation is None else attribute(block, activation)(out)
    return out
