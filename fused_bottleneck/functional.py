"""The fused block and unit as functions: validation, autocast, then the autograd Function."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch
from .autograd import BottleneckFunction, ConvBNReLUFunction, Observer, Plan
from .operands import Geometry, Pair, Pool


class BatchNorm(NamedTuple):
    """Arguments of ``torch.nn.functional.batch_norm``, with its semantics.

    weight, bias, running_mean, running_var: ``[C]`` or None. training: normalise with batch
    statistics, and update running_mean and running_var in place where given (momentum, a
    float or a 0-d tensor, is the weight of the new value; the variance is unbiased there).
    Not training: normalise with them. num_batches_tracked: a counter that goes up by one with
    every update. group: the name of a process group (``ProcessGroup.group_name``), to normalise
    with the statistics of its ranks' batches together, as ``torch.nn.SyncBatchNorm`` does; None:
    with those of this process's batch.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    training: bool = True
    momentum: float | Tensor = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None
    group: str | None = None


class Conv(NamedTuple):
    """Arguments of ``F.conv2d``: weight ``[W, C/groups, kh, kw]``, bias ``[W]`` or None."""

    weight: Tensor
    bias: Tensor | None = None
    stride: int | Pair = 1
    padding: int | Pair = 0
    dilation: int | Pair = 1
    groups: int = 1

    def geometry(self) -> Geometry:
        """Stride, padding, dilation as pairs, and groups."""
        return Geometry(
            checks.pair("stride", self.stride),
            checks.pair("padding", self.padding),
            checks.pair("dilation", self.dilation),
            self.groups,
        )


Unit = tuple[Conv, BatchNorm]


def is_channels_last(t: Tensor) -> bool:
    """Whether t is channels_last and not at the same time contiguous."""
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _plan(x: Tensor, units: Sequence[Unit], backend: str | None, pool: Pool | None = None) -> Plan:
    x_last = is_channels_last(x)
    return Plan(
        eps=tuple(bn.eps for _, bn in units),
        geometries=tuple(conv.geometry() for conv, _ in units),
        batch=tuple(bn.training for _, bn in units),
        channels_last=(x_last or any(is_channels_last(conv.weight) for conv, _ in units), x_last),
        backend=dispatch.requested_backend(backend),
        group=next((bn.group for _, bn in units if bn.training), None),
        pool=pool,
    )


def _tensors(units: Sequence[Unit]) -> list[Tensor | None]:
    """The six tensors of each unit, in the order of autograd.py."""
    flat: list[Tensor | None] = []
    for conv, bn in units:
        fixed = (None, None) if bn.training else (bn.running_mean, bn.running_var)
        flat += [conv.weight, conv.bias, bn.weight, bn.bias, *fixed]
    return flat


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in the autocast dtype; autocast leaves float64 alone."""
    return t if t.dtype == torch.float64 else t.to(dtype)


def _cast_conv(conv: Conv, dtype: torch.dtype) -> Conv:
    bias = None if conv.bias is None else _cast(conv.bias, dtype)
    return conv._replace(weight=_cast(conv.weight, dtype), bias=bias)


def autocast(x: Tensor, units: Sequence[Unit]) -> tuple[Tensor, list[Unit]]:
    """x and the convolutions in the autocast dtype, where autocast is on (as conv2d would)."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, list(units)
    dtype = torch.get_autocast_dtype(x.device.type)
    return _cast(x, dtype), [(_cast_conv(conv, dtype), bn) for conv, bn in units]


def autocast_shortcut(shortcut: Tensor | None, x: Tensor) -> Tensor | None:
    """The shortcut in the dtype of x, which is cast already, where autocast is on."""
    if shortcut is None or not torch.is_autocast_enabled(x.device.type):
        return shortcut
    return _cast(shortcut, x.dtype)


def _update_running(running: Tensor, value: Tensor, momentum: float | Tensor) -> None:
    """``running = (1 - momentum) * running + momentum * value``, in running's dtype.

    F.batch_norm changes its buffers without telling autograd, so that a graph that holds them
    (an eval-mode forward before) stays valid: so does this, through ``data``.
    """
    target = running if torch.compiler.is_compiling() else running.data
    weight = momentum.to(value.dtype) if isinstance(momentum, Tensor) else momentum
    if running.dtype == value.dtype:
        target.lerp_(value, weight)
    else:
        target.copy_(torch.lerp(running.to(value.dtype), value, weight))


@torch.no_grad()
def _update_statistics(units: Sequence[Unit], moments: Sequence[Tensor]) -> None:
    """Update the running statistics of every unit that used batch statistics.

    moments: mean and unbiased variance of each of these, in the order of the units.
    """
    source = iter(moments)
    for _, bn in units:
        if not bn.training:
            continue
        mean, var = next(source), next(source)
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        if bn.running_mean is not None:
            _update_running(bn.running_mean, mean, bn.momentum)
        if bn.running_var is not None:
            _update_running(bn.running_var, var, bn.momentum)


def _observer(units: Sequence[Unit]) -> Observer | None:
    """The update of the running statistics, to be done inside the Function (see autograd.py).

    None while compiling: there it comes after the Function, which must not mutate anything.
    """
    if torch.compiler.is_compiling():
        return None
    return partial(_update_statistics, units)


def bottleneck(
    x: Tensor,
    conv1: Conv,
    bn1: BatchNorm,
    conv2: Conv,
    bn2: BatchNorm,
    conv3: Conv,
    bn3: BatchNorm,
    downsample: Unit | None = None,
    shortcut: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The fused bottleneck block.

    ``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + residual)``; the residual is
    ``bn(conv(x))`` of the downsample, or shortcut, or x. Statistics, gradients and running
    statistics are those of the unfused block; the wide intermediates are not kept, and what
    is kept for backward is x, the two narrow convolution outputs, one bit per output element and
    small statistics; on CPU, in blocks of few pixels, part of a wide output too (tail.py).

    Args:
        x: ``[N, C, H, W]``, float64, float32, bfloat16 or float16, any strides.
        conv1, conv3: 1x1, stride 1, no padding, one group. conv2: any 2-D convolution with zero
            padding. Weights have x's dtype (under autocast, x and weights are cast).
        bn1, bn2, bn3: batch normalisations.
        downsample: a 1x1 convolution (any stride) and its batch normalisation.
        shortcut: a residual computed elsewhere, of the output's shape; not with downsample.
        backend: what serves, forward and backward: "triton", "vendor" (cuDNN or oneDNN with this
            library's passes) or "torch"; None for the environment variable
            FUSED_BOTTLENECK_BACKEND, else for the library's choice.

    Returns:
        ``[N, W, H', W']`` in x's dtype; channels_last if x or a weight is, else contiguous.

    Raises:
        TypeError, ValueError: an argument that does not fit; names it, with what was expected.
        RuntimeError: a backend that was asked for cannot serve.

    Source: He et al. 2015 for the block; docs/algebra.md for the fusion.
    """
    units: list[Unit] = [(conv1, bn1), (conv2, bn2), (conv3, bn3)]
    if downsample is not None:
        units.append(downsample)
    checks.raise_if(checks.tensor(x))
    x, units = autocast(x, units)
    shortcut = autocast_shortcut(shortcut, x)
    checks.raise_if(checks.bottleneck(x, units) or checks.residual(x, units, shortcut))
    return run_bottleneck(x, units, shortcut, backend)


def why_no_kernels(x: Tensor, units: Sequence[Unit]) -> str | None:
    """Why there are no fused kernels for arguments that are right, in one sentence."""
    return dispatch.why_no_kernels(x, [(conv.weight, conv.geometry()) for conv, _ in units])


def run_bottleneck(
    x: Tensor, units: Sequence[Unit], shortcut: Tensor | None, backend: str | None = None
) -> Tensor:
    """``bottleneck`` on arguments that are cast and checked already."""
    observe = _observer(units)
    out, *moments = BottleneckFunction.apply(
        _plan(x, units, backend), observe, x, shortcut, *_tensors(units)
    )
    if observe is None:
        _update_statistics(units, moments)
    return out


def conv_bn_relu(x: Tensor, conv: Conv, bn: BatchNorm, backend: str | None = None) -> Tensor:
    """The fused unit ``relu(bn(conv(x)))``.

    Args:
        x: ``[N, C, H, W]``, float64, float32, bfloat16 or float16, any strides.
        conv: any 2-D convolution with zero padding; its weight has x's dtype (or autocast).
        bn: batch normalisation of its output.
        backend: as in ``bottleneck``.

    Returns:
        ``[N, W, H', W']`` in x's dtype; channels_last if x or the weight is, else contiguous.
        Backward keeps x, the convolution's output and two vectors.

    Raises:
        TypeError, ValueError: an argument that does not fit; names it, with what was expected.
    """
    checks.raise_if(checks.tensor(x))
    x, units = autocast(x, [(conv, bn)])
    checks.raise_if(checks.conv_bn_relu(x, units[0]))
    return run_conv_bn_relu(x, units[0], backend=backend)


def run_conv_bn_relu(
    x: Tensor, unit: Unit, pool: Pool | None = None, backend: str | None = None
) -> Tensor:
    """``conv_bn_relu`` on arguments that are cast and checked already.

    pool: return the max pooling of that instead, of which backward keeps a byte per element.
    """
    observe = _observer([unit])
    out, *moments = ConvBNReLUFunction.apply(
        _plan(x, [unit], backend, pool), observe, x, *_tensors([unit])
    )
    if observe is None:
        _update_statistics([unit], moments)
    return out
