"""Proof by ``torch.fx`` that a block of an unknown class computes the bottleneck's formula."""

import copy
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from .layout import Container, Layout, attribute
from .modules import class_path, norm_class

_ADD = (operator.add, torch.add)
_ADD_IN_PLACE = (operator.iadd,)
_RELU = (F.relu, F.relu_, torch.relu, torch.relu_)


class _Mismatch(Exception):
    """The graph is not a bottleneck's; the message says where."""


class _Called(NamedTuple):
    """A call of a child, leaf or not."""

    path: str
    source: fx.Node
    result: fx.Node


class _Proxy(fx.Proxy):
    """Tells ``a += b`` from ``a = a + b``, which torch.fx records alike."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Notes every call of a child besides, as those of containers leave no node.

    Runs no hooks: they are looked for afterwards, and are nobody's business here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Called] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Any:
        result = super().call_module(m, m.forward, args, kwargs)
        proxies = [value for value in (*args, result) if isinstance(value, fx.Proxy)]
        if len(args) == 1 and len(proxies) == 2 and not kwargs:
            source, made = proxies
            self.calls.append(_Called(self.path_of_module(m), source.node, made.node))
        return result


def prove(block: nn.Module) -> Layout | str:
    """The layout that the block's forward was found to have, in both modes; else the reason.

    Runs the forward symbolically, on a shallow copy: what it sets on itself is not kept.
    """
    layouts = []
    for mode in (True, False):
        probe = copy.copy(block)
        object.__setattr__(probe, "training", mode)
        tracer = _Tracer()
        try:
            graph = tracer.trace(probe)
        except Exception as error:  # the forward is anybody's code
            return f"torch.fx cannot trace its forward: {str(error).splitlines()[0]}"
        try:
            layouts.append(_Match(probe, graph, tracer.calls).layout())
        except _Mismatch as mismatch:
            return str(mismatch)
    if layouts[0] != layouts[1]:
        return "its forward is another in training than in eval"
    return layouts[0]


class _Match:
    """Walks a graph from its output back to x along the formula."""

    def __init__(self, block: nn.Module, graph: fx.Graph, calls: list[_Called]) -> None:
        self.block = block
        self.graph = graph
        self.calls = calls
        self.seen: set[fx.Node] = set()
        self.idle: list[str] = []

    def layout(self) -> Layout:
        """The layout; _Mismatch where the graph is another."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise _Mismatch(f"its forward takes {len(inputs)} arguments")
        last, total = self._relu(self._output(), "its output")
        branch, residual, in_place = self._addends(total, inputs[0])
        units: list[tuple[str, str]] = []
        activations: list[str | None] = [last]
        node = branch
        for number in (3, 2, 1):
            conv, norm, node = self._unit(node, number)
            units.insert(0, (conv, norm))
            if number > 1:
                path, node = self._relu(node, f"the input of convolution {number}")
                activations.insert(0, path)
        if self._skip(node) is not inputs[0]:
            raise _Mismatch(f"its first convolution takes {node}, not its input")
        shortcut = self._shortcut(residual, inputs[0])
        self._require_all_seen()
        return Layout(
            units=tuple(units),
            activations=tuple(activations),
            shortcut=shortcut,
            idle=tuple(sorted(self.idle)),
            containers=self._containers(units, activations, shortcut),
            adds_in_place=in_place,
            flags=self._flags(),
        )

    def _output(self) -> fx.Node:
        (node,) = [node for node in self.graph.nodes if node.op == "output"]
        value = node.args[0]
        if not isinstance(value, fx.Node):
            raise _Mismatch("its output is not one tensor")
        return value

    def _child(self, node: fx.Node) -> nn.Module | None:
        """The child that the node calls."""
        return attribute(self.block, str(node.target)) if node.op == "call_module" else None

    def _skip(self, node: fx.Node) -> fx.Node:
        """The node behind identities and copies."""
        while True:
            if type(self._child(node)) is nn.Identity:
                self.idle.append(str(node.target))
            elif not (node.op == "call_method" and node.target == "clone"):
                return node
            if node.kwargs or len(node.args) != 1:
                return node
            self.seen.add(node)
            node = _tensor(node.args[0])

    def _take(self, node: fx.Node) -> fx.Node:
        """The node's first argument; whatever else used the node would be left over at the end."""
        self.seen.add(node)
        return _tensor(node.args[0] if node.args else None)

    def _relu(self, node: fx.Node, what: str) -> tuple[str | None, fx.Node]:
        """The path of the ReLU that made the node, None if it is a function, and its input."""
        node = self._skip(node)
        if type(self._child(node)) is nn.ReLU:
            return str(node.target), self._take(node)
        function = node.op == "call_function" and node.target in _RELU
        method = node.op == "call_method" and node.target in ("relu", "relu_")
        if not (function or method):
            raise _Mismatch(f"{what} comes from {self._describe(node)}, not from a ReLU")
        return None, self._take(node)

    def _unit(self, node: fx.Node, number: int) -> tuple[str, str, fx.Node]:
        """The paths of the normalisation that made the node and of its convolution; its input."""
        norm = self._skip(node)
        child = self._child(norm)
        if child is None or type(child) is not norm_class(child):
            raise _Mismatch(f"normalisation {number} is {self._describe(norm)}")
        conv = self._skip(self._take(norm))
        if type(self._child(conv)) is not nn.Conv2d:
            raise _Mismatch(f"convolution {number} is {self._describe(conv)}")
        return str(conv.target), str(norm.target), self._take(conv)

    def _addends(self, node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node, bool]:
        """Branch, residual, and whether the residual is added in place."""
        node = self._skip(node)
        method = node.target if node.op == "call_method" else None
        in_place = node.target in _ADD_IN_PLACE or method == "add_"
        if not (in_place or node.target in _ADD or method == "add"):
            raise _Mismatch(f"its last ReLU takes {self._describe(node)}, not a sum")
        if len(node.args) != 2 or node.kwargs:
            raise _Mismatch("its sum has weights")
        first, second = _tensor(node.args[0]), _tensor(node.args[1])
        self._take(node)
        if self._is_branch(first):
            return first, second, in_place
        if not self._is_branch(second):
            raise _Mismatch("neither addend is three convolutions, one after the other")
        if in_place:
            raise _Mismatch("it adds its branch to the shortcut, in place")
        return second, first, in_place

    def _is_branch(self, node: fx.Node) -> bool:
        """Whether three convolutions lie behind the node, as a shortcut has fewer."""
        count = 0
        while node.op != "placeholder":
            count += type(self._child(node)) is nn.Conv2d
            if not node.args or not isinstance(node.args[0], fx.Node):
                return False
            node = node.args[0]
        return count >= 3

    def _shortcut(self, residual: fx.Node, x: fx.Node) -> str | tuple[str, str] | None:
        """The child that computes the residual from x, or its two; None for x itself."""
        for call in reversed(self.calls):  # a container's call follows those of its children
            if call.result is residual and self._skip(call.source) is x:
                if type(attribute(self.block, call.path)) is nn.Identity:
                    break
                self._see_between(residual, x)
                return call.path
        residual = self._skip(residual)
        if residual is x:
            return None
        conv, norm, source = self._unit(residual, 4)
        if self._skip(source) is not x:
            raise _Mismatch("its shortcut is not one module on its input")
        return conv, norm

    def _see_between(self, node: fx.Node, x: fx.Node) -> None:
        if node is not x and node not in self.seen:
            self.seen.add(node)
            for source in node.all_input_nodes:
                self._see_between(source, x)

    def _require_all_seen(self) -> None:
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "output") and node not in self.seen:
                raise _Mismatch(f"it computes {self._describe(node)} besides")

    def _containers(self, units: list, activations: list, shortcut: Any) -> tuple[Container, ...]:
        """The block, and what is between it and its parts."""
        pairs = [*units, shortcut] if isinstance(shortcut, tuple) else units
        paths = [path for pair in pairs for path in pair] + [p for p in activations if p]
        names = {""}
        for path in [*paths, *self.idle]:
            steps = path.split(".")[:-1]
            names |= {".".join(steps[: i + 1]) for i in range(len(steps))}
        containers = []
        for name in sorted(names):
            module = attribute(self.block, name) if name else self.block
            children = tuple(n for n, child in module._modules.items() if child is not None)
            containers.append(Container(name, class_path(type(module)), children))
        return tuple(containers)

    def _flags(self) -> tuple[tuple[str, bool], ...]:
        """What the block's code may branch on; what begins with _ is somebody's bookkeeping."""
        flags = [(name, value) for name, value in vars(self.block).items() if type(value) is bool]
        return tuple(sorted(f for f in flags if f[0] != "training" and not f[0].startswith("_")))

    def _describe(self, node: fx.Node) -> str:
        child = self._child(node)
        if child is not None:
            return f"{node.target} ({type(child).__name__})"
        if node.op == "placeholder":
            return "its input"
        target = node.target
        return str(target) if isinstance(target, str) else getattr(target, "__name__", str(target))


def _tensor(value: Any) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise _Mismatch(f"it computes with {value!r}")
    return value
