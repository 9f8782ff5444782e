"""What the fused modules share: reading their children at call time."""

from typing import cast

from torch import Tensor, nn

from . import checks
from .functional import BatchNorm, Conv
from .operands import Pair


def conv_arguments(conv: nn.Conv2d) -> Conv:
    """The arguments of ``F.conv2d`` that this child stands for now."""
    return Conv(
        conv.weight,
        conv.bias,
        cast("Pair", conv.stride),
        cast("Pair", conv.padding),
        cast("Pair", conv.dilation),
        conv.groups,
    )


def conv_bn_of(module: nn.Module | None) -> tuple[nn.Conv2d, nn.BatchNorm2d] | None:
    """The two children of a downsample that is exactly conv1x1 + BN; None for any other module."""
    if type(module) is not nn.Sequential or len(module) != 2:
        return None
    conv, bn = module[0], module[1]
    own = checks.child("downsample", module, nn.Sequential)
    if own or checks.child("conv", conv, nn.Conv2d) or checks.child("bn", bn, nn.BatchNorm2d):
        return None
    conv, bn = cast("nn.Conv2d", conv), cast("nn.BatchNorm2d", bn)
    pointwise = (conv.kernel_size, conv.padding, conv.groups) == ((1, 1), (0, 0), 1)
    return (conv, bn) if pointwise else None


def _momentum(bn: nn.BatchNorm2d) -> float | Tensor:
    """The weight of the next batch in the running statistics; momentum None: the plain average."""
    if bn.momentum is not None:
        return bn.momentum
    if bn.num_batches_tracked is None:
        return 0.0
    return 1.0 / (bn.num_batches_tracked + 1).double()


def batch_norm_arguments(bn: nn.BatchNorm2d) -> BatchNorm:
    """The arguments of ``F.batch_norm`` that this child stands for now (nn's rules)."""
    batch = bn.training or (bn.running_mean is None and bn.running_var is None)
    keep = not batch or (bn.training and bn.track_running_stats)
    running = (bn.running_mean, bn.running_var) if keep else (None, None)
    momentum = _momentum(bn) if batch and keep else 0.0
    counter = bn.num_batches_tracked if bn.training and bn.track_running_stats else None
    return BatchNorm(bn.weight, bn.bias, *running, batch, momentum, bn.eps, counter)
