"""The libraries' own models: fused against unfused, in float64 and over training steps."""

import copy
import pickle
import warnings
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_helpers import (
    assert_close,
    blocks_of,
    first_tensor,
    images,
    load,
    reasons,
    small_resnet,
    step,
)
from tolerances import FLOAT64, LOSS_CURVE
from torch import Tensor, nn

import fused_bottleneck as fb
from benchmarks.model_zoo import MODELS
from fused_bottleneck import adapters, tracing
from fused_bottleneck.chain import FusedChain
from fused_bottleneck.layout import Container, Layout


def model_of(name: str, **options: Any) -> nn.Module:
    load(MODELS[name].package)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MODELS[name].make(**options).double()


TIMM = {"layers": [2, 1, 1, 1], "num_classes": 5}
# Name, size of the images, options (fewer blocks where that shows as much), and how many stems and
# other chains stem=True finds.
COMPARED: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "resnet50": ("torchvision.resnet50", 64, {"num_classes": 5}, 1),
    "timm resnet50d": ("timm.resnet50d", 48, TIMM, 1),
}
SLOW: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "regnet_x_400mf": ("torchvision.regnet_x_400mf", 64, {"num_classes": 5}, 1),
    "timm resnet50": ("timm.resnet50", 48, TIMM, 1),
    "transformers": (
        "transformers.ResNetForImageClassification",
        48,
        {"depths": [2, 1, 1, 1], "num_labels": 5},
        1,
    ),
    "monai": (
        "monai.resnet50(spatial_dims=2, n_input_channels=3)",
        48,
        {"num_classes": 5, "conv1_t_stride": 2},
        1,
    ),
    "resnet101": ("torchvision.resnet101", 33, {"num_classes": 5}, 1),
    "resnext50_32x4d": ("torchvision.resnext50_32x4d", 48, {"num_classes": 5}, 1),
    "wide_resnet50_2": ("torchvision.wide_resnet50_2", 33, {"num_classes": 5}, 1),
    "fcn_resnet50": ("torchvision.segmentation.fcn_resnet50", 33, {"num_classes": 5}, 2),
    "deeplabv3_resnet50": (
        "torchvision.segmentation.deeplabv3_resnet50",
        33,
        {"num_classes": 5},
        5,
    ),
    "smp Unet": ("segmentation_models_pytorch.Unet('resnet50')", 64, {}, 10),
}
# The blocks alone, and then with the stem; all at once where a step takes long.
CASES = [
    *(pytest.param(*case, [False, True], id=name) for name, case in COMPARED.items()),
    *(pytest.param(*case, [True], id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
]


def stems_of(model: nn.Module) -> list[FusedChain]:
    return [module for module in model.modules() if isinstance(module, FusedChain)]


@pytest.mark.parametrize(("name", "size", "options", "stems", "ways"), CASES)
def test_training_step(
    name: str, size: int, options: dict[str, Any], stems: int, ways: list[bool]
) -> None:
    """Output, every gradient and all running statistics, in float64; ways: values of stem."""
    model = model_of(name, **options)
    x = images(2, size)
    want = step(model, x)
    for stem in ways:
        # One model takes all steps, but for the statistics.
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.reset_running_stats()
        fb.fuse(model, strict=True, stem=stem)
        assert len(stems_of(model)) == (stems if stem else 0)
        assert set(reasons(model.eval(), x)) == {None}
        assert_close(step(model.train(), x), want, FLOAT64)


@pytest.mark.parametrize("name", ["torchvision.resnet50", "timm.resnet50d"])
def test_eval(name: str) -> None:
    options = TIMM if name.startswith("timm") else {}
    model = model_of(name, **options).eval()
    x = images(2, 40)
    with torch.no_grad():
        want = first_tensor(model(x))
        got = first_tensor(fb.fuse(model)(x))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_frozen_backbone_of_detection() -> None:
    """FrozenBatchNorm2d is a fixed affine: fused in training, and never changed."""
    torchvision = load("torchvision")
    resnet = torchvision.models.resnet
    frozen = torchvision.ops.misc.FrozenBatchNorm2d
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], num_classes=5, norm_layer=frozen)
    for norm in (m for m in model.double().modules() if isinstance(m, frozen)):
        norm.weight.uniform_(0.5, 1.0)
        norm.bias.normal_(0, 0.3)
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
    for parameter in [*model.conv1.parameters(), *model.layer1.parameters()]:
        parameter.requires_grad_(False)
    x = images(2, 40)
    want = step(model, x)
    fused = fb.fuse(model, strict=True)
    assert reasons(fused, x) == [None] * 5
    assert_close(step(fused, x), want, FLOAT64)


def test_frozen_norms_promote_under_autocast() -> None:
    """They are products with float32 vectors: outputs are float32, and stay so."""
    torchvision = load("torchvision")
    block = torchvision.models.resnet.Bottleneck(
        16, 4, norm_layer=torchvision.ops.misc.FrozenBatchNorm2d
    )
    x = images(2, 8)[:, :1].expand(2, 16, 8, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        want = block(x)
        fused = fb.fuse(block, strict=True)
        assert "promotes" in str(fused.why_not_fused(x))
        got = fused(x)
    assert got.dtype == want.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.slow
def test_detection_model_runs() -> None:
    """The detector's own features, losses and gradients through the fused backbone."""
    name = "torchvision.detection.fasterrcnn_resnet50_fpn, frozen"
    backbone = model_of(name).backbone
    want = backbone(images(1, 64))
    fb.fuse(backbone, strict=True)
    got = backbone(images(1, 64))
    for level, features in want.items():
        torch.testing.assert_close(got[level], features, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "declined", "word"),
    [
        ("timm.seresnet50", 16, "se is not empty"),
        ("timm.resnetaa50", 3, "aa is not empty"),
        ("timm.resnet50_gn", 16, "GroupNorm"),
        ("torchvision.quantization.resnet50", 16, "quantization"),
        ("torchvision.regnet_y_400mf", 16, "mul"),
    ],
)
def test_declined(name: str, declined: int, word: str) -> None:
    """These keep running as they are, and strict says which."""
    model = model_of(name).float()
    kinds = [type(m) for m in model.modules()]
    rows = [row for row in fb.explain(model) if row.reason is not None]
    assert len(rows) == declined
    assert all(word in str(row.reason) for row in rows)
    with pytest.raises(ValueError, match=word):
        fb.fuse(model, strict=True)
    assert [type(m) for m in model.modules()] == kinds


LOOK_ALIKES = {
    "timm.skresnext50_32x4d": "neither addend is three convolutions",
    "timm.res2net50_26w_4s": "neither addend is three convolutions",
    "timm.resnest50d": "the input of convolution 3",
    "timm.resnetv2_50": "its output comes from add, not from a ReLU",
    "timm.cspresnet50": "LeakyReLU",
    "timm.resnet50_gn": "GroupNorm",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_are_declined(name: str) -> None:
    """Every one of their blocks, with the reason."""
    load(MODELS[name].package)
    with torch.device("meta"):
        rows = fb.explain(MODELS[name].make())
    assert len(rows) >= 13
    assert all(LOOK_ALIKES[name] in str(row.reason) for row in rows)


def test_stochastic_depth_is_declined_per_block() -> None:
    """timm gives the first block a rate of zero, which is no DropPath at all."""
    load("timm")
    model = model_of("timm.resnet50", drop_path_rate=0.1, **TIMM)
    assert [row.reason is None for row in fb.explain(model)] == [True, False, False, False, False]
    fb.fuse(model)
    assert len(blocks_of(model)) == 1
    block = blocks_of(model)[0]
    block.drop_path = nn.Dropout(0.5)
    assert "drop_path" in str(block.why_not_fused(torch.zeros(2, 64, 4, 4, dtype=torch.float64)))


# The classes that are known by name, each proved by its graph.

KNOWN_MODELS = {
    "torchvision.models.resnet.Bottleneck": "torchvision.resnet50",
    "timm.models.resnet.Bottleneck": "timm.resnet50",
    "transformers.models.resnet.modeling_resnet.ResNetBottleNeckLayer": (
        "transformers.ResNetForImageClassification"
    ),
    "monai.networks.nets.resnet.ResNetBottleneck": (
        "monai.resnet50(spatial_dims=2, n_input_channels=3)"
    ),
}


def parts(block: nn.Module, layout: Layout) -> list[Any]:
    """What a layout says of a block, as the modules themselves."""
    found = adapters.layout.read(block, layout)
    activations = [a and adapters.layout.attribute(block, a) for a in layout.activations]
    return [found.pairs, found.called, activations, layout.adds_in_place]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KNOWN_MODELS)
def test_known_layouts_are_what_the_graph_shows(kind: str) -> None:
    model = MODELS[KNOWN_MODELS[kind]]
    load(model.package)
    with torch.device("meta"):
        made = model.make()
    blocks = [f.module for f in adapters.survey(made)]
    assert {adapters.class_path(type(b)) for b in blocks} == {kind}
    for block in blocks[:2]:  # with and without a downsample
        proved = tracing.prove(block)
        assert isinstance(proved, Layout), proved
        assert parts(block, proved) == parts(block, adapters.KNOWN[kind])
        known = set(adapters.KNOWN[kind].containers)
        inner: set[Container] = {c for c in proved.containers if c.path}
        assert known in (inner, set())


@pytest.mark.slow
def test_hooks_inside_a_layer_of_transformers() -> None:
    """The containers between the block and its convolutions have hooks too."""
    model = model_of("transformers.ResNetForImageClassification", depths=[1, 1, 1, 1], num_labels=2)
    fused = fb.fuse(model, strict=True)
    seen: list[int] = []
    layer = fused.resnet.encoder.stages[1].layers[0].layer
    for number, module in enumerate([layer, layer[1], layer[2].activation]):
        handle = module.register_forward_hook(lambda *a, number=number: seen.append(number))
        fused(images(2, 33))
        assert seen.pop() == number
        handle.remove()


# Stems.

SEQUENTIALS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "FCNHead": ("torchvision", "models.segmentation.fcn.FCNHead", {"in_channels": 16}),
    "Conv2dNormActivation": ("torchvision", "ops.misc.Conv2dNormActivation", {"in_channels": 16}),
    "Conv2dReLU": (
        "segmentation_models_pytorch",
        "base.modules.Conv2dReLU",
        {"in_channels": 16, "kernel_size": 3, "padding": 1},
    ),
}


@pytest.mark.parametrize("case", SEQUENTIALS)
def test_sequentials_of_libraries(case: str) -> None:
    """What heads and decoders are made of."""
    package, path, options = SEQUENTIALS[case]
    name = "channels" if case == "FCNHead" else "out_channels"
    plain = attrgetter(path)(load(package))(**options, **{name: 8}).double()
    (fused,) = stems_of(fb.fuse(copy.deepcopy(plain), stem=True, strict=True))
    x = images(1, 32).view(3, 16, 8, 8)
    assert fused.why_not_fused(x) is None
    assert_close(step(fused, x), step(plain, x), FLOAT64)


def test_stem_of_a_backbone() -> None:
    """Of detection and segmentation: unless outputs are asked for that are never made."""
    getter = load("torchvision").models._utils.IntermediateLayerGetter
    plain = getter(small_resnet(), {"relu": "low", "layer2": "high"})
    fused = fb.fuse(copy.deepcopy(plain), stem=True, strict=True)
    assert stems_of(fused) == [fused]
    for asked in ({"relu": "low", "layer2": "high"}, {"maxpool": "low"}, {"layer1": "low"}):
        plain.return_layers = fused.return_layers = asked
        assert fused.why_not_fused(images()) is None
        want, got = (model.train()(images()) for model in (plain, fused))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    fused.return_layers = {"bn1": "low"}
    assert fused.why_not_fused(images()) == "the output of bn1 is given out"
    plain.return_layers = fused.return_layers
    torch.testing.assert_close(fused(images()), plain(images()), rtol=1e-10, atol=1e-10)
    (row, *_) = fb.explain(plain, stem=True)
    assert "bn1 is given out" in str(row.reason)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_script_of_a_backbone() -> None:
    """Its forward returns a dict."""
    getter = load("torchvision").models._utils.IntermediateLayerGetter
    plain = getter(small_resnet(), {"layer2": "high"}).eval()
    script = torch.jit.script(fb.fuse(copy.deepcopy(plain), stem=True, strict=True))
    torch.testing.assert_close(script(images()), plain(images()), rtol=1e-10, atol=1e-10)


def test_stem_of_torchvision() -> None:
    """The model itself becomes a fused class: results, copies, tracers, and the way back."""
    plain, fused = small_resnet(), fb.fuse(small_resnet(), stem=True, strict=True)
    x = images()
    assert stems_of(fused) == [fused]
    assert fused.why_not_fused(x) is None
    assert isinstance(fused, type(plain))
    assert list(fused.state_dict()) == list(plain.state_dict())
    want = step(plain, x)
    for model in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(model) is type(fused)
        assert_close(step(model, x), want, FLOAT64)
    plain, traced = small_resnet().eval(), torch.fx.symbolic_trace(fused.eval())
    torch.testing.assert_close(traced(x), plain(x), rtol=1e-10, atol=1e-10)
    assert [type(m) for m in fb.unfuse(fused).modules()] == [type(m) for m in plain.modules()]


def test_stem_reads_the_model_at_every_call() -> None:
    """What does the rest is a view: a replaced head, a hook, a frozen norm count at once."""
    plain, fused = small_resnet(), fb.fuse(small_resnet(), stem=True)
    seen: list[int] = []
    for model in (plain, fused):
        model(images())
        torch.manual_seed(1)
        model.fc = nn.Linear(256, 3).double()
        model.bn1.eval()
        assert model(images()).shape == (3, 3)
    assert_close(step(fused, images()), step(plain, images()), FLOAT64)
    fused.bn1.register_forward_hook(lambda *a: seen.append(1))
    assert "bn1 has hooks" in str(fused.why_not_fused(images()))
    assert_close(step(fused, images()), step(plain, images()), FLOAT64)
    assert seen == [1]


def test_deep_stem() -> None:
    """The Sequential that is conv1 is part of the chain that the model starts with."""
    fused = fb.fuse(model_of("timm.resnet50d", **TIMM), stem=True, strict=True)
    assert stems_of(fused) == [fused]
    x = images(2, 33)
    assert fused.why_not_fused(x) is None
    want = step(copy.deepcopy(fused), x)
    seen: list[int] = []
    fused.conv1.register_forward_hook(lambda *a: seen.append(1))
    assert "conv1 (Sequential)" in str(fused.why_not_fused(x))
    assert_close(step(fused, x), want, FLOAT64)
    assert seen == [1]


# Training.


def losses(model: nn.Module, x: Tensor, steps: int = 20) -> Tensor:
    """The losses of training on one batch."""
    target = torch.arange(len(x)) % 7
    optimiser = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
    found = []
    torch.manual_seed(0)  # for dropout
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return torch.tensor(found, dtype=torch.float64)


def small_timm() -> nn.Module:
    """timm's ResNet-50-D, an eighth as wide: a deep stem, and shortcuts that pool."""
    options = {"stem_type": "deep", "stem_width": 4, "avg_down": True, "num_classes": 7}
    return model_of("timm.resnet50", layers=[2, 1, 1, 1], channels=(8, 16, 32, 64), **options)


def small_transformers() -> nn.Module:
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 256], "depths": [2, 1, 1, 1]}
    model = model_of("transformers.ResNetForImageClassification", num_labels=7, **sizes)
    return Logits(model)


def small_segmentation() -> nn.Module:
    """torchvision's FCN with dilated blocks, behind a narrow backbone."""
    models = load("torchvision").models
    backbone = small_resnet()
    for name, dilation in (("layer3", 2), ("layer4", 4)):
        block = getattr(backbone, name)[0]
        block.conv2.stride = block.downsample[0].stride = (1, 1)
        block.conv2.dilation = block.conv2.padding = (dilation, dilation)
    torch.manual_seed(0)
    head = models.segmentation.fcn.FCNHead(256, 7)
    features = models._utils.IntermediateLayerGetter(backbone, {"layer4": "out"})
    return Pooled(models.segmentation.FCN(features, head)).double()


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return first_tensor(self.model(x))


class Pooled(Logits):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))


# With the size of the images: a head on few pixels multiplies the roundings of float32.
TRAINED = {
    "torchvision": (small_resnet, 33),
    "timm": (small_timm, 33),
    "transformers": (small_transformers, 33),
    "fcn": (small_segmentation, 41),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", TRAINED)
def test_loss_curve(library: str) -> None:
    """20 steps in float64 are equal; in float32 the curve is the same, as eager's is."""
    make, size = TRAINED[library]
    plain, x = make(), images(6, size)
    want = losses(copy.deepcopy(plain), x)
    assert want[-1] < 0.9 * want[0]
    fused = fb.fuse(copy.deepcopy(plain), strict=True, stem=True)
    got = losses(copy.deepcopy(fused), x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    for model in (plain, fused):
        got = losses(model.float(), x.float())
        assert float((got - want).abs().max()) <= LOSS_CURVE * float(want[0])


def test_copies_of_a_fused_model_are_fused() -> None:
    model = fb.fuse(small_resnet())
    assert len(blocks_of(copy.deepcopy(model))) == 5
