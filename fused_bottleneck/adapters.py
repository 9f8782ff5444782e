"""Which modules of a model are bottleneck blocks: known classes by name, others by proof."""

from typing import NamedTuple

from torch import Tensor, fx, jit, nn

from . import chain, checks, layout, tracing
from .block import FusedBlock
from .chain import FusedChain
from .fused_module import FusedModule
from .layout import ChainLayout, Container, Layout
from .modules import class_path

_HF_LAYERS = tuple(
    Container(
        f"layer.{i}",
        "transformers.models.resnet.modeling_resnet.ResNetConvLayer",
        ("convolution", "normalization", "activation"),
    )
    for i in range(3)
)

# mmdet's and mmseg's blocks take plugins, mmpretrain's drops paths.
_MM_BOTTLENECK = Layout(
    units=tuple((f"conv{i}", f"norm{i}") for i in (1, 2, 3)),
    idle=("with_cp", "drop_path", *(f"after_conv{i}_plugin_names" for i in (1, 2, 3))),
)
_MM_BACKBONES = [f"{library}.models.backbones" for library in ("mmdet", "mmpretrain", "mmseg")]

# The classes of the libraries, by the names they have there: recognising a class imports nothing,
# as whoever has an instance has imported its library. The tests prove each of these again by
# its graph. Other libraries' blocks are found by that alone.
KNOWN: dict[str, Layout] = {
    "fused_bottleneck.reference.Bottleneck": Layout(shortcut="identity_downsample"),
    "torchvision.models.resnet.Bottleneck": Layout(),
    "timm.models.resnet.Bottleneck": Layout(
        activations=("act1", "act2", "act3"), idle=("drop_block", "aa", "se", "drop_path")
    ),
    "transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer": Layout(
        units=tuple((f"layer.{i}.convolution", f"layer.{i}.normalization") for i in range(3)),
        activations=("layer.0.activation", "layer.1.activation", "activation"),
        shortcut="shortcut",
        idle=("layer.2.activation",),
        containers=(
            Container("layer", "torch.nn.modules.container.Sequential", ("0", "1", "2")),
            *_HF_LAYERS,
        ),
    ),
    "monai.networks.nets.resnet.ResNetBottleneck": Layout(activations=("act", "act", "act")),
    "detectron2.modeling.backbone.resnet.BottleneckBlock": Layout(
        units=tuple((f"conv{i}", f"conv{i}.norm") for i in (1, 2, 3)),
        activations=(None, None, None),
        shortcut="shortcut",
        idle=tuple(f"conv{i}.activation" for i in (1, 2, 3)),
    ),
    **{f"{module}.resnet.Bottleneck": _MM_BOTTLENECK for module in _MM_BACKBONES},
    **{f"{module}.resnext.Bottleneck": _MM_BOTTLENECK for module in _MM_BACKBONES},
}

_STEM = ("conv1", "bn1", "relu", "maxpool")

# Modules that are, or start with, conv+BN+ReLU; besides any nn.Sequential. Only MONAI's
# may leave out its pooling.
STEMS: dict[str, ChainLayout] = {
    "fused_bottleneck.reference.ConvBNReLU": ChainLayout(("conv", "bn", "relu")),
    "torchvision.models.resnet.ResNet": ChainLayout(_STEM, has_rest=True),
    "torchvision.models._utils.IntermediateLayerGetter": ChainLayout(
        _STEM, has_rest=True, given_out="return_layers"
    ),
    "timm.models.resnet.ResNet": ChainLayout(("conv1", "bn1", "act1", "maxpool"), has_rest=True),
    "monai.networks.nets.resnet.ResNet": ChainLayout(("conv1", "bn1", "act"), has_rest=True),
    **{
        f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}ConvLayer": ChainLayout(
            ("convolution", "normalization", "activation")
        )
        for name in ("ResNet", "RegNet")
    },
    **{f"{module}.resnet.ResNet": ChainLayout(_STEM, has_rest=True) for module in _MM_BACKBONES},
}

# A shortcut with more convolutions than this is no block's.
_MOST_CONVOLUTIONS = 8


_OWN_FORWARD = "its forward was replaced on the instance"
_SHARDED = "fully_shard has changed its class: fuse before fully_shard"


class Finding(NamedTuple):
    """A bottleneck block, or what looks like one, in a model; or a stem.

    name: its path; empty for the model itself. layout: None where it is declined, which reason
    explains. What is fused already may have a reason too, why it runs composed for now.
    """

    name: str
    module: nn.Module
    layout: Layout | ChainLayout | None
    reason: str | None

    @property
    def fused(self) -> bool:
        """Whether it is fused already."""
        return isinstance(self.module, FusedModule)


def survey(model: nn.Module) -> list[Finding]:
    """The bottleneck blocks of a model, and what looks like one, each once, in its order."""
    return _survey("", model, set())


def survey_stems(model: nn.Module) -> list[Finding]:
    """The chains with a conv+BN+ReLU that are not inside a model's blocks, each once."""
    visited = {id(m) for f in survey(model) for m in f.module.modules()}
    found = []
    for name, module in model.named_modules():
        where = _chain_layout(module)
        if where is None or id(module) in visited:
            continue
        planned = chain.plan(module, where)
        reason = planned if isinstance(planned, str) else None
        if reason is None and "forward" in module.__dict__:
            reason = _OWN_FORWARD
        if reason is None:  # what the chain calls is not a chain by itself
            visited |= {id(getattr(module, child)) for child in where.names_in(module)}
        declined = reason is not None and not isinstance(module, FusedChain)
        found.append(Finding(name, module, None if declined else where, reason))
    return found


def _chain_layout(module: nn.Module) -> ChainLayout | None:
    """The layout of a module that has conv+BN+ReLU, or had; None for any other."""
    if isinstance(module, FusedChain):
        return module.plain_layout
    where = STEMS.get(class_path(type(module)))
    if where is None and chain.is_sequential(module):
        where = ChainLayout()
    if where is None:
        return None
    # A known ResNet without is worth a reason, unless its stem is elsewhere (OpenMMLab's deep one).
    expected = where.has_rest and hasattr(module, where.names[0])
    return where if expected or chain.has_units(module, where) else None


def _survey(
    name: str, module: nn.Module, visited: set[int], sharded: bool = False
) -> list[Finding]:
    """sharded: whether a module around it is an FSDPModule."""
    if id(module) in visited or isinstance(module, jit.ScriptModule):
        return []
    visited.add(id(module))
    sharded = sharded or _is_sharded(module)
    if isinstance(module, FusedBlock):
        where = module.plain_layout
        # Its own parameters are not there between calls, but their shards.
        reason = None if sharded else instance_reason(module, where)
        return [Finding(name, module, where, reason)]
    if class_path(type(module)) in KNOWN:
        return [_finding(name, module, KNOWN[class_path(type(module))])]
    found = []
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        found += _survey(path, child, visited, sharded)
    if any(f.layout is not None for f in found):
        return found
    if _is_sharded(module) and _looks_like_block(module):
        return [Finding(name, module, None, _SHARDED)]
    if not _may_be_block(module):
        return found
    proved = tracing.prove(module)
    if isinstance(proved, Layout):
        return [_finding(name, module, proved)]
    # Of a block and its branch, both named like blocks, the block is the one to report.
    if _looks_like_block(module) and len(found) < 2:
        return [Finding(name, module, None, proved)]
    return found


def _finding(name: str, module: nn.Module, where: Layout) -> Finding:
    reason = instance_reason(module, where)
    return Finding(name, module, where if reason is None else None, reason)


def _is_sharded(module: nn.Module) -> bool:
    """Whether it is an FSDPModule: by name, as that class takes long to import."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def _may_be_block(module: nn.Module) -> bool:
    """Whether a proof is worth trying."""
    if type(module).__module__.startswith("torch.") or isinstance(
        module, fx.GraphModule | FusedModule
    ):
        return False
    convolutions = sum(isinstance(m, nn.Conv2d) for m in module.modules())
    return 3 <= convolutions <= _MOST_CONVOLUTIONS


def _looks_like_block(module: nn.Module) -> bool:
    """Whether its user would take it for a bottleneck block, and wants to know why it is none."""
    children = dict(module.named_children())
    return "bottle" in type(module).__name__.lower() or {"conv1", "conv2", "conv3"} <= set(children)


def instance_reason(block: nn.Module, where: Layout) -> str | None:
    """Why this block of a class that can be fused can not be; None if it can."""
    if "forward" in block.__dict__:
        return _OWN_FORWARD
    for name, module in block.named_modules():
        if type(module).__module__.startswith("torch.ao."):
            return f"{name} is a {type(module).__name__}, of torch's quantization tools"
    reason = layout.reason(block, where)
    if reason is not None:
        return reason
    parts = layout.read(block, where)
    if len({id(norm) for _, norm in parts.pairs}) < len(parts.pairs):
        return "two of its normalisations are one module"
    units = parts.units()
    x = _probe(parts.pairs[0][0].weight)
    problem = checks.bottleneck(x, units)
    if problem is None and parts.called is None:
        problem = checks.residual(x, units, None)
    return None if problem is None else str(problem)


def _probe(weight: Tensor) -> Tensor:
    """An input of that first convolution, with strides of zero: it has no memory to speak of."""
    return weight.detach().new_zeros(()).expand(2, weight.shape[1], 32, 32)
