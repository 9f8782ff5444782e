"""What users rely on, on a fused ResNet of torchvision's: one test per row of the contract."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_helpers import assert_close, blocks_of, images, load, pair, reasons, small_resnet, step
from tolerances import FLOAT64
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations

import fused_bottleneck as fb
from fused_bottleneck import Bottleneck, checks

ROOT = Path(__file__).resolve().parent.parent


def assert_same_step(
    fused: nn.Module, plain: nn.Module, x: Tensor | None = None, tolerance: float = FLOAT64
) -> None:
    x = images() if x is None else x
    assert_close(step(fused, x), step(plain, x), tolerance)


def in_memory(save: Callable[[io.BytesIO], object]) -> io.BytesIO:
    file = io.BytesIO()
    save(file)
    file.seek(0)
    return file


# State, copies, optimizers.


def test_state_dict() -> None:
    plain, fused = pair()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert fused.state_dict()._metadata == plain.state_dict()._metadata
    for source, target in ((plain, fused), (fused, plain)):
        for value in source.state_dict().values():
            value += 1
        target.load_state_dict(source.state_dict(), strict=True)
    assert_same_step(fused, plain)


def test_checkpoints_across_fused_and_plain() -> None:
    """State dicts load with weights_only, whole models without, each into and as the other."""
    plain, fused = pair()
    for source, target in ((fused, plain), (plain, fused)):
        file = in_memory(lambda f, source=source: torch.save(source.state_dict(), f))
        target.load_state_dict(torch.load(file, weights_only=True), strict=True)
    whole = torch.load(in_memory(lambda f: torch.save(fused, f)), weights_only=False)
    assert [type(m) for m in whole.modules()] == [type(m) for m in fused.modules()]
    assert_same_step(fb.unfuse(whole), fused)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("method", COPIES)
def test_copies(method: str) -> None:
    """After use too: fused, with nothing shared."""
    plain, fused = pair()
    step(fused, images())
    step(plain, images())
    other = COPIES[method](fused)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in fused.parameters()}
    assert reasons(copy.deepcopy(other), images()) == [None] * 5
    assert_same_step(other, plain)


@pytest.mark.slow
def test_pickled_model_in_a_new_process(tmp_path: Path) -> None:
    """The classes that fuse made are made again where nothing was fused."""
    plain, fused = pair()
    torch.save(fused.eval(), tmp_path / "model.pt")
    torch.save(images(), tmp_path / "x.pt")
    code = f"""
import sys, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import model_helpers
model_helpers.load("torchvision")
from torchvision.models.resnet import Bottleneck
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
x = torch.load({str(tmp_path / "x.pt")!r})
assert model_helpers.reasons(model, x) == [None] * 5
assert isinstance(model.layer1[0], Bottleneck)
torch.save(model(x).detach(), {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    want = plain.eval()(images()).detach()
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("before", [True, False])
def test_optimizer_made_before_or_after(before: bool) -> None:
    """Adam keeps state per parameter object."""
    plain, fused = small_resnet(), small_resnet()
    if not before:
        fb.fuse(fused, strict=True)
    optimisers = [torch.optim.Adam(m.parameters(), 1e-3) for m in (plain, fused)]
    fb.fuse(fused, strict=True)
    for _ in range(2):
        for model, optimiser in zip((plain, fused), optimisers, strict=True):
            step(model, images())
            optimiser.step()
    # Adam divides by the root of the squared gradient: noise where a gradient is zero, as that of
    # nothing here is (the convolutions have no bias).
    for (name, got), want in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8, msg=name)


def test_moving_averages() -> None:
    """torch's averaged model, and update_bn, which sets momentum None and finds the norms."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    results = []
    for model in pair():
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for _ in range(2):
            step(model, images())
            with torch.no_grad():
                for p in model.parameters():
                    p.data.sub_(0.01 * p.grad)
            average.update_parameters(model)
        update_bn([images(seed=5), images(seed=6)], average)
        results.append(step(average.eval(), images()))
    assert_close(results[1], results[0], 1e-9)


# Hooks, changed children.


def test_hooks() -> None:
    """On a block they need nothing; on a child, or globally, the block's children are called."""
    plain, fused = pair()
    seen: dict[str, list[str]] = {"plain": [], "fused": []}
    for name, model in (("plain", plain), ("fused", fused)):
        for path in ("layer1.0", "layer2.0.conv2", "layer2.0.downsample.1", "layer4.0.relu"):
            child = model.get_submodule(path)
            child.register_forward_hook(lambda *a, n=name, p=path: seen[n].append(p))
            if not path.endswith("relu"):  # in place: nn refuses
                hook = child.register_full_backward_hook
                hook(lambda *a, n=name, p=path: seen[n].append(f"-{p}"))
    found = reasons(fused, images())
    assert [reason is None for reason in found] == [True, True, False, True, False]
    reasons(plain, images())
    assert_same_step(fused, plain)
    # A shortcut that must be called is called first; everything else in nn's order.
    assert sorted(seen["fused"]) == sorted(seen["plain"])


def test_global_hooks() -> None:
    _, fused = pair()
    count = [0]
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda m, a, o: count.__setitem__(0, count[0] + isinstance(m, nn.Conv2d)))
    try:
        fused(images())
    finally:
        handle.remove()
    assert count[0] == sum(isinstance(m, nn.Conv2d) for m in fused.modules())


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": lambda m: parametrizations.weight_norm(m.layer2[0].conv2),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.layer3[0].conv3),
    "conv+BN fused by torch": lambda m: fuse_conv_and_norm(m.eval().layer1[0]),
    "stride and dilation patched": lambda m: dilate(m.layer2[0]),
    "frozen": lambda m: m.layer1.requires_grad_(False),
    "frozen norms": lambda m: [n.eval() for n in norms(m.layer3)],
    "one frozen norm": lambda m: m.layer2[0].bn2.eval(),
    "momentum None": lambda m: [setattr(n, "momentum", None) for n in norms(m)],
    "no running statistics": lambda m: [untrack(n) for n in norms(m)],
}


def norms(model: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def untrack(norm: nn.BatchNorm2d) -> None:
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def dilate(block: nn.Module) -> None:
    block.conv2.stride = block.downsample[0].stride = (1, 1)
    block.conv2.dilation = block.conv2.padding = (2, 2)


def fuse_conv_and_norm(block: nn.Module) -> None:
    block.conv2 = fusion.fuse_conv_bn_eval(block.conv2, block.bn2)
    block.bn2 = nn.Identity()


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_fuse(change: str) -> None:
    plain, fused = pair()
    for model in (plain, fused):
        torch.manual_seed(1)
        CHANGES[change](model)
        step(model, images(seed=9))
    assert_same_step(fused, plain)


def test_no_running_statistics_in_eval() -> None:
    plain, fused = pair()
    for model in (plain, fused):
        for norm in norms(model.eval()):
            untrack(norm)
    assert_same_step(fused, plain)


# Precision, layouts.


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_scaler(dtype: torch.dtype) -> None:
    """Dtypes as eager's, and training goes on; precision is tested per block."""
    x = images(4).float()
    target = torch.arange(4) % 7
    outs = []
    for model in pair():
        model.float()
        optimiser = torch.optim.SGD(model.parameters(), 1e-2)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=2.0**8)
        found = []
        for _ in range(3):
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype):
                out = model(x)
                loss = F.cross_entropy(out, target)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            found.append(float(loss.detach()))
        assert out.dtype == dtype
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        assert {b.dtype for b in model.buffers()} == {torch.float32, torch.int64}
        assert found[-1] < found[0]
        outs.append(found)
    assert outs[1] == pytest.approx(outs[0], abs=0.05 * outs[0][0])


def test_a_scaler_finds_infinities() -> None:
    """float16 overflows where eager's does: the step is skipped."""
    for model in pair():
        model.float()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        optimiser = torch.optim.SGD(model.parameters(), 1e-2)
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", torch.float16):
            loss = model(images().float()).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        assert scaler.get_scale() < 2.0**40
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("fp32_norms", [False, True])
def test_half_models(fp32_norms: bool) -> None:
    plain, fused = (model.bfloat16() for model in pair())
    for model in (plain, fused):
        for norm in norms(model) if fp32_norms else ():
            norm.float()
    x = images().bfloat16()
    assert reasons(copy.deepcopy(fused), x) == [None] * 5
    want, got = step(plain, x), step(fused, x)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
    assert all(t.isfinite().all() for t in got.values())
    assert relative(got["layer1.0.bn1.running_mean"], want["layer1.0.bn1.running_mean"]) < 1e-2


@pytest.mark.parametrize("images_last", [False, True])
@pytest.mark.parametrize("weights_last", [False, True])
def test_memory_formats(images_last: bool, weights_last: bool) -> None:
    plain, fused = pair()
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    for model in (plain, fused):
        model.to(memory_format=formats[weights_last])
    x = images().contiguous(memory_format=formats[images_last])
    features = [nn.Sequential(*list(m.children())[:-2])(x) for m in (plain, fused)]
    last = images_last or weights_last
    assert [f.is_contiguous(memory_format=formats[last]) for f in features] == [True, True]
    assert_same_step(fused, plain, x)
    for parameter in fused.parameters():
        assert parameter.grad.stride() == parameter.stride()


# Autograd.


def test_checkpointing() -> None:
    """Statistics update twice, as nn's do."""
    from torch.utils.checkpoint import checkpoint

    results = []
    for model in pair():
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            plain_forward = layer.forward
            layer.forward = partial(checkpoint, plain_forward, use_reentrant=False)
        results.append(step(model, images()))
    assert_close(results[1], results[0], FLOAT64)
    assert int(results[1]["layer1.0.bn1.num_batches_tracked"]) == 2


def test_func_and_forward_mode() -> None:
    plain, fused = (model.eval() for model in pair())
    x, tangent = images(2), images(2, seed=4)
    found = []
    for model in (plain, fused):
        parameters = dict(model.named_parameters())

        def loss(p: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, p, (x,)).square().sum()

        grads = torch.func.grad(loss)(parameters)
        out, jvp = torch.func.jvp(model, (x,), (tangent,))
        mapped = torch.func.vmap(model)(x[:, None])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            forward = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
        assert forward.any()
        found.append([*grads.values(), out, jvp, mapped, forward])
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.equal(got, want)


def test_double_backward() -> None:
    """A gradient penalty."""
    results = []
    for model in pair():
        x = images(2).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append({f"grad {n}": p.grad for n, p in model.named_parameters()})
        results[-1]["grad x"] = x.grad
    assert_close(results[1], results[0], 1e-8)


def test_inference_mode() -> None:
    plain, fused = (model.eval() for model in pair())
    with torch.inference_mode():
        want, got = plain(images()), fused(images())
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    fused.train()
    step(fused, images())


def test_same_bits_from_run_to_run() -> None:
    _, fused = pair()
    fused.float()
    first = step(copy.deepcopy(fused), images().float())
    second = step(copy.deepcopy(fused), images().float())
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


# Tracers and compilers.


def composed_graph(text: str) -> bool:
    return "fused_bottleneck::" not in text and "fused_bottleneck." not in text


@pytest.mark.slow
def test_compile() -> None:
    torch.compiler.reset()
    plain, fused = pair()
    fb.fuse(fused, stem=True)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable:
        from torch._dynamo.backends.common import aot_autograd

        def compiler(g: torch.fx.GraphModule, i: object) -> Callable:
            from functorch.compile import make_boxed_func

            graphs.append(" ".join(str(n.target) for n in g.graph.nodes))
            return make_boxed_func(g.forward)

        return aot_autograd(fw_compiler=compiler)(graph, inputs)

    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    got = {n.replace("_orig_mod.", ""): t for n, t in step(compiled, images()).items()}
    assert_close(got, step(plain, images()), FLOAT64)
    assert graphs[0].count("bottleneck_forward.default") == 5
    torch.compiler.reset()


@pytest.mark.slow
def test_fuse_after_compile() -> None:
    """The compiled model notices the new classes."""
    torch.compiler.reset()
    plain, model = small_resnet().eval(), small_resnet().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = compiled(images())
    fb.fuse(compiled, strict=True)
    assert len(blocks_of(model)) == 5
    torch.testing.assert_close(compiled(images()), want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plain(images()), want, rtol=1e-10, atol=1e-10)
    torch.compiler.reset()


def test_fx() -> None:
    plain, fused = (model.eval() for model in pair())
    graphs = [torch.fx.symbolic_trace(model) for model in (plain, fused)]
    nodes = [[(n.op, str(n.target)) for n in g.graph.nodes] for g in graphs]
    assert nodes[1] == nodes[0]
    torch.testing.assert_close(graphs[1](images()), plain(images()), rtol=1e-10, atol=1e-10)


def test_feature_extraction() -> None:
    load("torchvision")
    from torchvision.models import feature_extraction
    from torchvision.models._utils import IntermediateLayerGetter

    plain, fused = (model.eval() for model in pair())
    names = feature_extraction.get_graph_node_names
    assert names(fused) == names(plain)
    nodes = ["layer1.0.conv2", "layer2.0", "layer3.0.add", "layer4"]
    found = [
        feature_extraction.create_feature_extractor(m, nodes)(images()) for m in (plain, fused)
    ]
    found += [
        IntermediateLayerGetter(m, {"layer2": "a", "layer4": "b"})(images()) for m in (plain, fused)
    ]
    for want, got in (found[:2], found[2:]):
        assert list(got) == list(want)
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_export() -> None:
    plain, fused = (model.eval() for model in pair())
    program = torch.export.export(fused, (images(),))
    assert composed_graph(str(program.graph))
    want = plain(images())
    torch.testing.assert_close(program.module()(images()), want, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(dynamo: bool) -> None:
    """The same operators as the plain model's, and no other domain."""
    onnx = load("onnx")
    load("onnxscript")
    operators = []
    for model in pair():
        file = io.BytesIO()
        model.float().eval()
        torch.onnx.export(model, (images().float(),), file, dynamo=dynamo, verbose=False)
        file.seek(0)
        graph = onnx.load(file).graph
        operators.append(sorted((node.domain, node.op_type) for node in graph.node))
    assert operators[1] == operators[0]
    assert {domain for domain, _ in operators[1]} == {""}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["script", "trace"])
def test_jit(method: str) -> None:
    plain, fused = (model.eval() for model in pair())
    fb.fuse(fused, stem=True)
    jit = torch.jit.script(fused) if method == "script" else torch.jit.trace(fused, images())
    assert "fused_bottleneck::" not in str(jit.inlined_graph)
    torch.testing.assert_close(jit(images()), plain(images()), rtol=1e-10, atol=1e-10)
    assert len(blocks_of(fused)) == 5
    file = in_memory(lambda f: torch.jit.save(jit, f))
    want = plain(images())
    torch.testing.assert_close(torch.jit.load(file)(images()), want, rtol=1e-10, atol=1e-10)
    with pytest.warns(UserWarning, match="nothing to fuse"):
        fb.fuse(jit)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quantization_tools() -> None:
    """They replace children, add hooks, or trace: what they make of a fused model is the same."""
    from torch.ao import quantization
    from torch.ao.quantization import quantize_fx

    mapping = quantization.get_default_qconfig_mapping()
    outs = []
    for model in pair():
        model.float().eval()
        fused = quantization.fuse_modules(
            copy.deepcopy(model), [["layer1.0.conv1", "layer1.0.bn1"], ["conv1", "bn1"]]
        )
        prepared = quantize_fx.prepare_fx(model, mapping, (images().float(),))
        outs.append([fused(images().float()), prepared(images().float())])
    torch.testing.assert_close(outs[1][0], outs[0][0], rtol=1e-4, atol=1e-4)
    assert torch.equal(outs[1][1], outs[0][1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph() -> None:
    plain, fused = (model.cuda().float() for model in pair())
    x = images(8, 64).float().cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            fused(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    fused.load_state_dict(plain.state_dict())
    fused.zero_grad(set_to_none=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused(x).square().sum().backward()
    fused.load_state_dict(plain.state_dict())
    fused.zero_grad(set_to_none=False)
    graph.replay()
    plain(x).square().sum().backward()
    for got, want in zip(fused.parameters(), plain.parameters(), strict=True):
        assert relative(got.grad, want.grad) < 1e-2


# Wrappers.


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed = torch.distributed
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_distributed_data_parallel(process_group: None) -> None:
    """Fused before or after wrapping."""
    plain, fused = pair()
    before = nn.parallel.DistributedDataParallel(fused)
    after = fb.fuse(nn.parallel.DistributedDataParallel(small_resnet()), strict=True)
    want = step(plain, images())
    for model in (before, after):
        assert len(blocks_of(model)) == 5
        got = {n.replace("module.", ""): t for n, t in step(model, images()).items()}
        assert_close(got, want, FLOAT64)


def test_data_parallel() -> None:
    """Without GPUs it calls the module itself."""
    plain, fused = pair()
    wrapped = fb.fuse(nn.DataParallel(fb.unfuse(fused)), strict=True)
    torch.testing.assert_close(wrapped(images()), plain(images()), rtol=1e-10, atol=1e-10)


def test_sync_batch_norm_conversion_finds_the_norms() -> None:
    _, fused = pair()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    count = sum(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert count == len(list(norms(small_resnet())))


# Bad input: nn's own errors, and the same state after them.


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(2, 4, 33, 33, dtype=torch.float64),
        lambda: torch.randn(2, 3, 33, 33),
        lambda: torch.randn(1, 3, 8, 8, dtype=torch.float64),
        lambda: None,
    ],
    ids=["channels", "dtype", "one value per channel", "None"],
)
def test_bad_input(make: Callable[[], object]) -> None:
    x = make()
    outcomes = []
    models = pair()
    for model in models:
        with pytest.raises((RuntimeError, TypeError, ValueError)) as error:
            model(x)
        outcomes.append((error.type, str(error.value)))
    assert outcomes[1] == outcomes[0]
    for got, want in zip(models[1].buffers(), models[0].buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = pair()
    monkeypatch.setenv(checks.DISABLE_VARIABLE, "1")
    assert all("is set" in str(reason) for reason in reasons(copy.deepcopy(fused), images()))
    want, got = step(plain, images()), step(fused, images())
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_no_warnings() -> None:
    """fuse says nothing about a model that it can fuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fb.fuse(small_resnet())
        fb.fuse(nn.Sequential(Bottleneck(16, 4)))
