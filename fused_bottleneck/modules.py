"""What the fused modules share: reading their children at call time."""

from typing import cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import checks, collectives
from .functional import BatchNorm, Conv
from .operands import Pair, Pool


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


def pool_arguments(pool: nn.MaxPool2d) -> Pool | None:
    """The arguments of ``F.max_pool2d`` that this child stands for now; None where it returns
    indices too, or they are no ints and pairs."""
    values = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    pairs = [(v, v) if isinstance(v, int) else tuple(v) for v in values]
    if pool.return_indices or any(len(pair) != 2 for pair in pairs):
        return None
    kernel, stride, padding, dilation = cast("list[Pair]", pairs)
    return Pool(kernel, stride, padding, dilation, pool.ceil_mode)


# By name: a library that the user has not imported must not be imported here.
# Fixed affine normalisations, and whether products with their own vectors promote what they get.
_FROZEN_NORMS = {
    "torchvision.ops.misc.FrozenBatchNorm2d": True,
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": False,
}
# Convolutions that call a normalisation and an activation of their own, where they have them.
_CONV_WITH_NORM = "detectron2.layers.wrappers.Conv2d"
# Modules that are a convolution and a normalisation and no more.
_CONV_BN = {
    "transformers.models.resnet.modeling_resnet.ResNetShortCut": ("convolution", "normalization"),
    "transformers.models.regnet.modeling_regnet.RegNetShortCut": ("convolution", "normalization"),
}


def class_path(kind: type) -> str:
    """The module and name of a class, as it would be imported."""
    return f"{kind.__module__}.{kind.__qualname__}"


def norm_class(module: nn.Module) -> type[nn.Module]:
    """The class that a normalisation must have exactly: its own if that is a known one."""
    kind = type(module)
    known = kind is nn.SyncBatchNorm or class_path(kind) in _FROZEN_NORMS
    return kind if known else nn.BatchNorm2d


def is_norm(module: object) -> bool:
    """Whether the module is a batch normalisation of any class, or a fixed affine."""
    return isinstance(module, _BatchNorm) or class_path(type(module)) in _FROZEN_NORMS


def conv_class(module: nn.Module) -> type[nn.Module]:
    """The class that a convolution must have exactly."""
    return type(module) if class_path(type(module)) == _CONV_WITH_NORM else nn.Conv2d


def promotes(norm: nn.Module) -> bool:
    """Whether the output has the dtype of the normalisation's vectors where that is wider."""
    return _FROZEN_NORMS.get(class_path(type(norm)), False)


def _conv_bn_children(module: nn.Module) -> list[nn.Module]:
    """The children that such a module calls in turn; none for a class that is not known."""
    if type(module) is nn.Sequential:
        # An empty place in a ResNet-D shortcut, where its stride is one.
        return [m for m in module if checks.child("", m, nn.Identity) is not None]
    if class_path(type(module)) == _CONV_WITH_NORM:
        return [module, module.norm] if module.activation is None else []
    names = _CONV_BN.get(class_path(type(module)), ())
    return [getattr(module, name) for name in names]


def conv_bn_of(module: nn.Module) -> tuple[nn.Conv2d, nn.Module] | None:
    """The two children of a downsample that is exactly conv1x1 + BN; None for any other module."""
    children = _conv_bn_children(module)
    if len(children) != 2 or checks.child("downsample", module, type(module)) is not None:
        return None
    conv, bn = children
    if checks.child("conv", conv, conv_class(conv)) or checks.child("bn", bn, norm_class(bn)):
        return None
    conv = cast("nn.Conv2d", conv)
    pointwise = (conv.kernel_size, conv.padding, conv.groups) == ((1, 1), (0, 0), 1)
    return (conv, bn) if pointwise else None


def _group(bn: _BatchNorm) -> str | None:
    """The process group over whose ranks it takes batch statistics; None for its own batch's."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return None
    return collectives.group_name(bn.process_group)


def _momentum(bn: _BatchNorm) -> float | Tensor:
    """The weight of the next batch in the running statistics; momentum None: the plain average."""
    if bn.momentum is not None:
        return bn.momentum
    if bn.num_batches_tracked is None:
        return 0.0
    return 1.0 / (bn.num_batches_tracked + 1).double()


def batch_norm_arguments(bn: nn.Module) -> BatchNorm:
    """The arguments of ``F.batch_norm`` that this child stands for now (nn's rules).

    bn: an nn.BatchNorm2d or nn.SyncBatchNorm, or a fixed affine with the same four tensors.
    """
    if not isinstance(bn, _BatchNorm):
        fixed = cast("nn.BatchNorm2d", bn)  # in what matters here
        running = (fixed.running_mean, fixed.running_var)
        return BatchNorm(fixed.weight, fixed.bias, *running, False, 0.0, fixed.eps)
    batch = bn.training or (bn.running_mean is None and bn.running_var is None)
    keep = not batch or (bn.training and bn.track_running_stats)
    running = (bn.running_mean, bn.running_var) if keep else (None, None)
    momentum = _momentum(bn) if batch and keep else 0.0
    counter = bn.num_batches_tracked if bn.training and bn.track_running_stats else None
    return BatchNorm(bn.weight, bn.bias, *running, batch, momentum, bn.eps, counter, _group(bn))
