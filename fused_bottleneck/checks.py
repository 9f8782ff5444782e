"""Every input check and its message.

A check returns the exception that describes the first problem, or None. The functional interface
raises it; the modules run composed and give its text as the reason.
"""

import os
from collections.abc import Iterable, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .operands import Pair

if TYPE_CHECKING:
    from .functional import BatchNorm, Conv

Problem = Exception | None

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pair(name: str, value: int | Pair) -> Pair:
    """An int or a pair of ints, numpy's included, as a pair; TypeError otherwise."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value  # what nn.Conv2d has: every call of a module comes here many times
    both: Any = (value, value) if hasattr(value, "__index__") else value
    if len(both) == 2 and all(hasattr(v, "__index__") for v in both):
        return index(both[0]), index(both[1])
    raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")


def _shape(t: Tensor) -> list[int]:
    return list(t.shape)


def raise_if(problem: Problem) -> None:
    """Raise the problem, if there is one."""
    if problem is not None:
        raise problem


def tensor(x: Any) -> Problem:
    """x is a tensor."""
    if isinstance(x, Tensor):
        return None
    return TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")


def module(model: Any) -> Problem:
    """model is a module."""
    if isinstance(model, nn.Module):
        return None
    return TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _input(x: Tensor, norms: "Sequence[BatchNorm]") -> Problem:
    if x.dim() != 4:
        return ValueError(f"x must be [N, C, H, W], got {x.dim()} dimensions: {_shape(x)}")
    if x.layout != torch.strided:
        return TypeError(f"x must have a strided layout, got {x.layout}")
    if x.dtype not in DTYPES:
        return TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    # A rank without a batch takes part where statistics are over several.
    shared = any(bn.training and bn.group is not None for bn in norms)
    if 0 in (x.shape[1:] if shared else x.shape):
        return ValueError(f"x must not be empty, got shape {_shape(x)}")
    return None


def _vector(name: str, t: Tensor | None, channels: int, x: Tensor) -> Problem:
    if t is None:
        return None
    if not isinstance(t, Tensor):
        return TypeError(f"{name} must be a torch.Tensor or None, got {type(t).__name__}")
    if t.dim() != 1 or t.shape[0] != channels:
        return ValueError(f"{name} must be [{channels}], got {_shape(t)}")
    if t.device != x.device:
        return ValueError(f"{name} must be on x's device {x.device}, got {t.device}")
    if not t.is_floating_point():
        return TypeError(f"{name} must be floating-point, got {t.dtype}")
    return None


def _conv(name: str, conv: "Conv", channels: int, x: Tensor) -> Problem:
    weight = conv.weight
    if not isinstance(weight, Tensor):
        return TypeError(f"{name}.weight must be a torch.Tensor, got {type(weight).__name__}")
    if weight.dim() != 4 or weight.numel() == 0:
        return ValueError(
            f"{name}.weight must be [out, in/groups, kh, kw] and not empty, got {_shape(weight)}"
        )
    if weight.dtype != x.dtype:
        return TypeError(f"{name}.weight must have x's dtype {x.dtype}, got {weight.dtype}")
    if weight.device != x.device:
        return ValueError(f"{name}.weight must be on x's device {x.device}, got {weight.device}")
    if conv.groups < 1 or weight.shape[0] % conv.groups:
        return ValueError(
            f"{name}.groups must be positive and divide its {weight.shape[0]} output channels, "
            f"got {conv.groups}"
        )
    if weight.shape[1] * conv.groups != channels:
        return ValueError(
            f"{name}.weight must take {channels} channels, "
            f"got {weight.shape[1]} * {conv.groups} groups"
        )
    geometry = conv.geometry()
    if min(geometry.stride) < 1 or min(geometry.dilation) < 1 or min(geometry.padding) < 0:
        return ValueError(
            f"{name} must have positive stride and dilation and no negative padding, got "
            f"stride {geometry.stride}, padding {geometry.padding}, dilation {geometry.dilation}"
        )
    if conv.bias is not None and conv.bias.dtype != x.dtype:
        return TypeError(f"{name}.bias must have x's dtype {x.dtype}, got {conv.bias.dtype}")
    return _vector(f"{name}.bias", conv.bias, weight.shape[0], x)


def _batch_norm(name: str, bn: "BatchNorm", size: Sequence[int], x: Tensor) -> Problem:
    """size: the shape of its input."""
    for field in ("weight", "bias", "running_mean", "running_var"):
        problem = _vector(f"{name}.{field}", getattr(bn, field), size[1], x)
        if problem is not None:
            return problem
    if not bn.training and (bn.running_mean is None or bn.running_var is None):
        return ValueError(f"{name} needs running_mean and running_var when it is not training")
    if bn.training and bn.group is None and size[0] * size[2] * size[3] == 1:
        return ValueError(
            "Expected more than 1 value per channel when training, "
            f"got input size {torch.Size(size)}"
        )
    return None


def _unit(
    conv_name: str, bn_name: str, conv: "Conv", bn: "BatchNorm", size: Sequence[int], x: Tensor
) -> tuple[Problem, tuple[int, ...]]:
    """The problem of one unit, if any, and the shape of its output given that of its input."""
    problem = _conv(conv_name, conv, size[1], x)
    if problem is not None:
        return problem, ()
    kernel = (conv.weight.shape[2], conv.weight.shape[3])
    height, width = conv.geometry().output_size(size[2], size[3], kernel)
    if min(height, width) < 1:
        return ValueError(
            f"{conv_name}'s kernel {kernel} does not fit its input of {size[2]}x{size[3]} pixels"
        ), ()
    output = (size[0], conv.weight.shape[0], height, width)
    return _batch_norm(bn_name, bn, output, x), output


def _pointwise(name: str, conv: "Conv", any_stride: bool = False) -> Problem:
    kernel = tuple(conv.weight.shape[2:])
    geometry = conv.geometry()
    strided = geometry.stride != (1, 1) and not any_stride
    if kernel != (1, 1) or geometry.padding != (0, 0) or geometry.groups != 1 or strided:
        return ValueError(
            f"{name} must be 1x1 without padding, groups{'' if any_stride else ' or stride'}, got "
            f"kernel {kernel}, stride {geometry.stride}, padding {geometry.padding}, "
            f"groups {geometry.groups}"
        )
    return None


def conv_bn_relu(x: Tensor, unit: "tuple[Conv, BatchNorm]") -> Problem:
    """Problems of x and of the unit."""
    return _input(x, [unit[1]]) or _unit("conv", "bn", *unit, _shape(x), x)[0]


def bottleneck(x: Tensor, units: "Sequence[tuple[Conv, BatchNorm]]") -> Problem:
    """Problems of x and of conv1, conv2, conv3[, downsample] with their normalisations."""
    norms = [bn for _, bn in units]
    problem = _input(x, norms) or _groups(norms)
    if problem is not None:
        return problem
    size: Sequence[int] = x.shape
    for i, (conv, bn) in enumerate(units[:3], 1):
        problem, size = _unit(f"conv{i}", f"bn{i}", conv, bn, size, x)
        if problem is not None:
            return problem
    problem = _pointwise("conv1", units[0][0]) or _pointwise("conv3", units[2][0])
    for conv, bn in units[3:]:
        problem = problem or _unit("downsample conv", "downsample bn", conv, bn, x.shape, x)[0]
        problem = problem or _pointwise("downsample conv", conv, any_stride=True)
    return problem


def _groups(norms: "Sequence[BatchNorm]") -> Problem:
    groups = {bn.group for bn in norms if bn.training}
    if len(groups) > 1:
        names = ", ".join(sorted(map(str, groups)))
        return ValueError(
            "batch normalisations of one block must take their statistics over the same process "
            f"group, got {names}"
        )
    return None


def _output_shape(x: Tensor, convs: "Sequence[Conv]") -> tuple[int, ...]:
    height, width = x.shape[2:]
    for conv in convs:
        kernel = (conv.weight.shape[2], conv.weight.shape[3])
        height, width = conv.geometry().output_size(height, width, kernel)
    return (x.shape[0], convs[-1].weight.shape[0], height, width)


def residual(
    x: Tensor, units: "Sequence[tuple[Conv, BatchNorm]]", shortcut: Tensor | None
) -> Problem:
    """Problems of the residual of a bottleneck whose units have none of their own."""
    expected = _output_shape(x, [conv for conv, _ in units[:3]])
    if len(units) > 3 and shortcut is not None:
        return ValueError("downsample and shortcut must not be given together")
    if len(units) > 3:
        got, source = _output_shape(x, [units[3][0]]), "the downsample's output"
    else:
        value = x if shortcut is None else shortcut
        source = "x (no downsample)" if shortcut is None else "shortcut"
        if not isinstance(value, Tensor):
            return TypeError(f"shortcut must be a torch.Tensor, got {type(value).__name__}")
        if value.dtype != x.dtype or value.device != x.device:
            return TypeError(
                f"shortcut must be {x.dtype} on {x.device}, got {value.dtype} on {value.device}"
            )
        got = tuple(value.shape)
    if got != expected:
        return ValueError(
            f"{source} must have the output's shape {list(expected)}, got {list(got)}"
        )
    return None


# What the modules check besides: whether fusing would change what the user sees.

DISABLE_VARIABLE = "FUSED_BOTTLENECK_DISABLE"

_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
_CHILD_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _plain_tensor(t: Any) -> bool:
    return type(t) in (Tensor, nn.Parameter)


def disabled() -> str | None:
    """That the environment switches fusing off; None if it does not."""
    if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        return f"{DISABLE_VARIABLE} is set"
    return None


def environment(x: Any) -> str | None:
    """Why nothing can be fused here and now, whatever the module: None if it can."""
    if disabled() is not None:
        return disabled()
    if torch.compiler.is_exporting():
        return "torch.export captures the composed graph"
    if not _plain_tensor(x):
        return f"x is a {type(x).__name__}, not a plain torch.Tensor"
    if x.device.type not in ("cpu", "cuda"):
        return f"there are no fused kernels for {x.device.type} yet"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        return "torch.jit.trace captures the composed graph"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def child(name: str, module: nn.Module, expected: type[nn.Module]) -> str | None:
    """Why this child must be called as a module: None if its parameters say all there is."""
    if type(module) is not expected:
        return f"{name} is a {type(module).__name__}, not a plain nn.{expected.__name__}"
    if any(getattr(module, hooks) for hooks in _CHILD_HOOKS):
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"{name}.forward was replaced on the instance"
    for key, parameter in module._parameters.items():
        if parameter is not None and not _plain_tensor(parameter):
            return f"{name}.{key} is a {type(parameter).__name__}, not a plain torch.Tensor"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"{name} pads with {module.padding_mode!r}, not with zeros"
    if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
        return f"{name} has padding={module.padding!r}"
    return None


def global_hooks() -> str | None:
    """That hooks are set which every module's call must run; None if there are none."""
    if any(getattr(nn.modules.module, hooks) for hooks in _GLOBAL_HOOKS):
        return "global module hooks are set"
    return None


def children(named: Iterable[tuple[str, nn.Module, type[nn.Module]]]) -> str | None:
    """The first reason among the children, or that global module hooks are set."""
    problem = global_hooks()
    for name, module, expected in named:
        problem = problem or child(name, module, expected)
    return problem
