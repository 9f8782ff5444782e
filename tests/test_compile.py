"""torch.compile keeps the block fused; export, FX and jit see the composed graph."""

import copy
from collections.abc import Iterator

import pytest
import torch
from helpers import Case, Result, in_dtype, norms_of, run
from torch import Tensor, nn

from fused_bottleneck import FusedBottleneck, FusedConvBNReLU

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

CASES = {
    "identity": Case(size=(3, 6, 5)),
    "downsample": Case(channels=6, stride=2, downsample="conv", size=(3, 7, 6)),
    "pool": Case(channels=6, stride=2, downsample="pool", size=(3, 7, 6)),
}
over_cases = pytest.mark.parametrize("case", CASES)
# A compiler sees the op, and nothing of what computes it.
in_one_implementation = pytest.mark.parametrize("backend", ["extension"], indirect=True)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fused_block(case: str) -> FusedBottleneck:
    block = CASES[case].module(FusedBottleneck)
    assert block.why_not_fused(CASES[case].input()) is None
    return block


def assert_same(got: Result, want: Result, tolerance: float = 1e-11) -> None:
    """All tensors; the names under which a compiled module lists them differ."""
    ours = {n.replace("_orig_mod.", ""): t for n, t in got.tensors().items()}
    for name, tensor in want.tensors().items():
        torch.testing.assert_close(ours[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


COMPILED = {
    "aot_eager": [(case, mode) for case in CASES for mode in ("train", "eval", "frozen")],
    # Behind the same graphs, and slow: each case and each mode once.
    "inductor": [("identity", "frozen"), ("downsample", "train"), ("pool", "eval")],
}


@in_one_implementation
@pytest.mark.parametrize(
    ("compiler", "case", "mode"), [(c, *row) for c, rows in COMPILED.items() for row in rows]
)
def test_fullgraph(compiler: str, case: str, mode: str) -> None:
    """Outputs, gradients, running statistics over two steps; no graph break."""
    block = fused_block(case).train(mode != "eval")
    if mode == "frozen":
        block.bn2.eval()
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend=compiler)
    for seed in range(2):
        x = CASES[case].input(seed)
        assert_same(run(compiled, x), run(block, x))
    for got, want in zip(norms_of(compiled).values(), norms_of(block).values(), strict=True):
        assert torch.equal(got.num_batches_tracked, want.num_batches_tracked)


@in_one_implementation
def test_compiled_graph_holds_the_op() -> None:
    """Fused inside too: not the convolutions, but the one op."""
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def compiler(g: torch.fx.GraphModule, i: object) -> object:
            targets.extend(str(n.target) for n in g.graph.nodes)
            return make_boxed_func(g.forward)

        return aot_autograd(fw_compiler=compiler)(graph, inputs)

    block = fused_block("downsample")
    run(torch.compile(block, fullgraph=True, backend=backend), CASES["downsample"].input())
    assert any("bottleneck_forward" in t for t in targets)
    assert any("bottleneck_backward" in t for t in targets)
    assert not any("convolution" in t for t in targets)


@in_one_implementation
@over_cases
def test_dynamic_batch(case: str) -> None:
    block = fused_block(case)
    compiled = torch.compile(
        copy.deepcopy(block), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n in (3, 5, 2):
        x = CASES[case].input().repeat(2, 1, 1, 1)[:n]
        assert_same(run(compiled, x), run(block, x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_layouts(layout: torch.memory_format) -> None:
    block = fused_block("identity")
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True)
    x = CASES["identity"].input().contiguous(memory_format=layout)
    got, want = run(compiled, x), run(block, x)
    assert_same(got, want)
    assert got.out.stride() == want.out.stride()


@in_one_implementation
def test_compiled_network() -> None:
    """Inductor hands over gradients in layouts of its own."""
    torch.manual_seed(0)
    stem = FusedConvBNReLU(3, 16, 3, padding=1, bias=False)
    blocks = [CASES["identity"].module(FusedBottleneck, seed) for seed in range(2)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    model = nn.Sequential(stem, *blocks, head).double()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    x = torch.randn(4, 3, 8, 7, dtype=torch.float64)
    assert_same(run(compiled, x), run(model, x), 1e-10)


def test_compiled_autocast() -> None:
    block = in_dtype(fused_block("downsample"), torch.float32)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    x = CASES["downsample"].input().float()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = run(compiled, x), run(block, x)
    assert got.out.dtype == want.out.dtype == torch.bfloat16
    assert_same(got, want, 1e-2)


def test_compiled_inference() -> None:
    block = fused_block("downsample").eval()
    x = CASES["downsample"].input()
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-11, atol=1e-11)


# Other tracers.


@over_cases
@pytest.mark.parametrize("training", [True, False])
def test_export(case: str, training: bool) -> None:
    block = fused_block(case).train(training)
    x = CASES[case].input()
    program = torch.export.export(copy.deepcopy(block), (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("fused_bottleneck" in t for t in targets)
    assert sum("conv2d" in t for t in targets) >= 3
    if not training:
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-10, atol=1e-10)


@over_cases
def test_fx(case: str) -> None:
    """symbolic_trace finds the children, as on the plain block."""
    block = fused_block(case).eval()
    x = CASES[case].input()
    traced = torch.fx.symbolic_trace(block)
    called = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert called[:7] == ["conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3"]
    torch.testing.assert_close(traced(x), block(x), rtol=1e-10, atol=1e-10)
    unit = FusedConvBNReLU(6, 4, 3).double().eval()
    traced = torch.fx.symbolic_trace(unit)
    called = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert called == ["conv", "bn", "relu"]


@over_cases
def test_jit_trace(case: str) -> None:
    block = fused_block(case).eval()
    x = CASES[case].input()
    traced = torch.jit.trace(block, x)
    assert "fused_bottleneck::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), block(x), rtol=1e-10, atol=1e-10)


@over_cases
def test_jit_script(case: str) -> None:
    block = fused_block(case).eval()
    x: Tensor = CASES[case].input()
    scripted = torch.jit.script(block)
    assert "fused_bottleneck::" not in str(scripted.inlined_graph)
    torch.testing.assert_close(scripted(x), block(x), rtol=1e-10, atol=1e-10)


def test_jit_of_the_unit() -> None:
    unit = FusedConvBNReLU(6, 4, 3, 2, 1).double().eval()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(unit)(x), unit(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.jit.trace(unit, x)(x), unit(x), rtol=1e-10, atol=1e-10)
