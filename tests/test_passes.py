"""The C++ passes (csrc/) against oracles in plain torch.

A pass rounds after every operation (nothing is contracted to fma), so the elementwise ones must
agree with torch's operations in the accumulation dtype to the last bit, and with float64 up to a
few roundings. Sums may differ by their order: at most by the roundings of their terms.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from op_helpers import LEVELS, as_images, assert_fence, fenced, pack, run_child, unpack
from test_pool import outputs as pooling_outputs
from torch import Tensor

from fused_bottleneck import extension
from fused_bottleneck.algebra import accumulation_dtype

pytestmark = pytest.mark.skipif(not extension.load(), reason=extension.reason())
passes = torch.ops.fused_bottleneck

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    *itertools.product([1, 2, 5], [1, 3, 7, 17, 64, 100, 256]),
    *[(1000, 3), (1000, 64), (1000, 256), (4099, 1), (4099, 7), (4099, 17), (4099, 100)],
]

# Per pass: which tensors it writes and which it returns.
WRITES = {
    "channel_moments": [],
    "bn_apply_": ["out"],
    "residual_relu_": ["out", "mask"],
    "mask_grad_": ["g"],
    "masked_add_": ["out"],
    "bn_backward_reduce_": ["g"],
    "bn_backward_": ["out"],
    "masked_bn_backward_reduce": [],
    "masked_bn_backward_": ["out"],
}
RETURNS = {
    "channel_moments": ["mean", "m2"],
    "mask_grad_": ["sum_g"],
    "bn_backward_reduce_": ["sum_g", "sum_g_xhat"],
    "masked_bn_backward_reduce": ["sum_g", "sum_g_xhat"],
}
# Variants of a pass: the optional arguments to leave out; relu is False if it is.
CASES: dict[str, tuple[str, list[str]]] = {
    "channel_moments": ("channel_moments", []),
    "bn_apply": ("bn_apply_", []),
    "bn_apply, no option": ("bn_apply_", ["beta", "centre", "relu"]),
    "residual_relu": ("residual_relu_", []),
    "residual_relu, product": ("residual_relu_", ["mean", "scale"]),
    "residual_relu, no residual": ("residual_relu_", ["residual"]),
    "mask_grad": ("mask_grad_", []),
    "masked_add": ("masked_add_", []),
    "bn_backward_reduce": ("bn_backward_reduce_", []),
    "bn_backward_reduce, no option": ("bn_backward_reduce_", ["addend", "shift", "beta"]),
    "bn_backward": ("bn_backward_", []),
    "bn_backward, fixed": ("bn_backward_", ["k0", "k1"]),
    "masked_bn_backward_reduce": ("masked_bn_backward_reduce", []),
    "masked_bn_backward": ("masked_bn_backward_", []),
}
# What a GPU never needs: its tails take the gram way.
CPU_ONLY = {"masked_bn_backward_reduce", "masked_bn_backward"}
over_cases = pytest.mark.parametrize("case", CASES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

Arguments = dict[str, Tensor | bool | None]
Change = Callable[[Tensor], Tensor | None]


def arguments(case: str, dtype: torch.dtype, shape: tuple[int, int], seed: int = 0) -> Arguments:
    """Random arguments of a pass, by name, in the order of its schema."""
    op, left_out = CASES[case]
    rows, channels = shape
    generator = torch.Generator().manual_seed(seed)
    matrices = {"y", "out", "residual", "grad", "addend", "grad_out", "g", "value"}

    def value(name: str) -> Tensor | bool | None:
        if name == "relu":
            return name not in left_out
        if name in left_out:
            return None
        if name in WRITES[op] and name != "mask":
            return torch.full(shape, 7.0, dtype=dtype)
        if name == "mask":
            bits = torch.randint(0, 2, (rows, channels), dtype=torch.uint8, generator=generator)
            return pack(bits)
        if name in matrices:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).to(dtype)
        vector = torch.randn(channels, generator=generator, dtype=torch.float64)
        return vector.to(accumulation_dtype(dtype))

    names = [argument.name for argument in getattr(passes, op).default._schema.arguments]
    return {name: value(name) for name in names}


def call(case: str, args: Arguments) -> dict[str, Tensor]:
    """What the pass writes and returns, by name; args are left as they are."""
    op = CASES[case][0]
    own = {k: v.clone() if k in WRITES[op] else v for k, v in args.items()}
    result = getattr(passes, op)(**own)
    returned = (result,) if isinstance(result, Tensor) else (result or ())
    outputs = dict(zip(RETURNS.get(op, []), returned, strict=True))
    return {name: own[name] for name in WRITES[op]} | outputs


def oracle(case: str, args: Arguments, compute: torch.dtype) -> dict[str, Tensor]:
    """The elementwise results in dtype compute; the gate of a relu always in the accumulation's."""
    op = CASES[case][0]
    a = {k: v.to(compute) if isinstance(v, Tensor) and k != "mask" else v for k, v in args.items()}
    zero = torch.zeros((), dtype=compute)

    def plus(v: Tensor, *names: str) -> Tensor:
        for name in names:
            v = v if a[name] is None else v + a[name]
        return v

    if op == "bn_apply_":
        v = plus((a["y"] - a["mean"]) * a["scale"], "beta")
        v = torch.where(v <= 0, zero, v) if a["relu"] else v
        return {"out": v if a["centre"] is None else v - a["centre"]}
    if op == "residual_relu_":
        v = a["y"] if a["mean"] is None else (a["y"] - a["mean"]) * a["scale"]
        v = plus(v, "shift", "residual")
        return {"out": torch.where(v <= 0, zero, v), "mask": pack(~(v <= 0))}
    if op == "mask_grad_":
        return {"g": masked(args).to(compute)}
    if op == "masked_add_":
        return {"out": a["value"] + masked(args).to(compute)}
    if op == "bn_backward_reduce_":
        acc = accumulation_dtype(args["y"].dtype)
        z = (args["y"].to(acc) - args["mean"]) * args["scale"]
        z = z if args["beta"] is None else z + args["beta"]
        return {"g": torch.where(z <= 0, zero, plus(a["grad"], "addend", "shift"))}
    if op in ("bn_backward_", "masked_bn_backward_"):
        g = a["g"] if op == "bn_backward_" else masked(args).to(compute)
        if a["k0"] is None:
            return {"out": a["scale"] * g}
        return {"out": a["scale"] * (g - a["k0"] - (a["y"] - a["mean"]) * a["k1"])}
    return {}


def masked(args: Arguments) -> Tensor:
    return torch.where(unpack(args["mask"], args["grad_out"].shape[1]), args["grad_out"], 0)


def sum_terms(args: Arguments, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms of the column sums, from the g that was stored, if it was."""
    g = outputs["g"] if "g" in outputs else masked(args)
    terms = {"sum_g": g.double()}
    if "invstd" in args:
        terms["sum_g_xhat"] = g.double() * (args["y"].double() - args["mean"]) * args["invstd"]
    return terms


def assert_right(case: str, args: Arguments, outputs: dict[str, Tensor]) -> None:
    """All outputs against the oracles: bits in the accumulation dtype, distance in float64."""
    op = CASES[case][0]
    dtype = next(v.dtype for v in args.values() if isinstance(v, Tensor))
    eps = torch.finfo(accumulation_dtype(dtype)).eps
    exact = oracle(case, args, accumulation_dtype(dtype))
    far = oracle(case, args, torch.float64)
    for name, expected in exact.items():
        assert torch.equal(outputs[name], expected.to(outputs[name].dtype)), (case, name)
    for name in exact.keys() - {"mask"}:
        # The arguments are of order 10, so are the terms that cancel.
        bounds = {"rtol": torch.finfo(dtype).eps, "atol": 128 * eps}
        torch.testing.assert_close(outputs[name].double(), far[name], **bounds)
    if "sum_g" in outputs:
        for name, terms in sum_terms(args, outputs).items():
            assert outputs[name].dtype == accumulation_dtype(dtype)
            error = (outputs[name].double() - terms.sum(0)).abs()
            assert (error <= 8 * eps * terms.abs().sum(0)).all(), (case, name)
    if op == "channel_moments":
        assert_moments(args["y"], outputs["mean"], outputs["m2"])


def assert_moments(y: Tensor, mean: Tensor, m2: Tensor) -> None:
    eps = torch.finfo(mean.dtype).eps
    expected = y[0].double() + (y.double() - y[0].double()).mean(0)
    deviations = y.double() - expected
    squares = deviations.square().sum(0)
    # The mean itself rounds once; what is summed up is the deviations.
    bound = eps * expected.abs() + 8 * eps * deviations.abs().mean(0)
    assert ((mean.double() - expected).abs() <= bound).all()
    # The means of tiles, which Chan's formula subtracts, are rounded to double.
    rounded_means = 4 * torch.finfo(torch.float64).eps * expected.abs() * deviations.abs().sum(0)
    assert ((m2.double() - squares).abs() <= 32 * eps * squares + rounded_means).all()


@over_dtypes
@over_cases
def test_pass_agrees_with_the_oracle(case: str, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        args = arguments(case, dtype, shape, seed)
        assert_right(case, args, call(case, args))


@pytest.mark.parametrize("shape", [(3, 1500), (70, 513), (20000, 8)])
@over_cases
def test_pass_agrees_across_channel_blocks_and_chunks(case: str, shape: tuple[int, int]) -> None:
    args = arguments(case, torch.float32, shape)
    assert_right(case, args, call(case, args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [1e3, 1e4, -1e4])
def test_moments_of_a_large_mean(dtype: torch.dtype, offset: float) -> None:
    """Deviations of 1 around the offset: E[y^2] - E[y]^2 would have no digit left in float32."""
    y = (torch.randn(5000, 33, dtype=torch.float64) + offset).to(dtype)
    mean, m2 = passes.channel_moments(y)
    assert_moments(y, mean, m2)
    # A drift along the rows, so that the tiles' means differ: Chan's term between them.
    y = (y.double() + torch.linspace(-5, 5, 5000)[:, None]).to(dtype)
    assert_moments(y, *passes.channel_moments(y))


def test_moments_of_constant_channels() -> None:
    """0.1 times 3 x 512 rows is not exact, so the mean that a tile subtracts is off by a bit."""
    y = torch.linspace(-1e4, 1e4, 999).expand(1537, -1).contiguous()
    mean, m2 = passes.channel_moments(y)
    assert torch.equal(mean, y[0])
    assert (m2 >= 0).all()
    assert (m2 <= 1537 * (1e-7 * y[0]).square() * 1e-6).all()


@over_dtypes
def test_moments_of_nan_and_inf(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    y = torch.randn(1000, 5).to(dtype)
    y[700, 1], y[10, 2], y[3, 3], y[900, 3], y[0, 4] = nan, inf, inf, -inf, -inf
    mean, m2 = passes.channel_moments(y)
    expected = torch.tensor([0, nan, inf, nan, -inf], dtype=mean.dtype)
    assert torch.equal(mean.nan_to_num(9, 8, 7)[1:], expected.nan_to_num(9, 8, 7)[1:])
    assert mean[0].isfinite()
    assert m2.isnan().tolist() == [False, True, True, True, True]


@over_dtypes
@pytest.mark.parametrize("case", [case for case in CASES if case != "channel_moments"])
def test_nan_and_inf_flow(case: str, dtype: torch.dtype) -> None:
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0], dtype=dtype)
    args = arguments(case, dtype, (130, 37))
    for name, value in args.items():
        written = name in WRITES[CASES[case][0]]
        if isinstance(value, Tensor) and value.dtype == dtype and not written:
            where = torch.randperm(value.numel())[: value.numel() // 4]
            value.view(-1)[where] = special.repeat(len(where))[: len(where)]
    outputs = call(case, args)
    for name, expected in oracle(case, args, accumulation_dtype(dtype)).items():
        expected = expected.to(outputs[name].dtype)
        torch.testing.assert_close(outputs[name], expected, rtol=0, atol=0, equal_nan=True)
    if "sum_g" in outputs:
        for name, terms in sum_terms(args, outputs).items():
            total = terms.sum(0).to(outputs[name].dtype)
            torch.testing.assert_close(outputs[name], total, rtol=1e-3, atol=1e-3, equal_nan=True)


@over_dtypes
@over_cases
def test_output_may_be_an_input(case: str, dtype: torch.dtype) -> None:
    op = CASES[case][0]
    for output, source in itertools.product(
        {"out", "g"} & set(WRITES[op]),
        ["y", "residual", "grad", "addend", "grad_out", "value", "g"],
    ):
        args = arguments(case, dtype, (70, 37))
        if source == output or args.get(source) is None:
            continue
        expected = call(case, args)
        args[output] = args[source]
        result = getattr(passes, op)(**args)
        assert torch.equal(args[output], expected[output])
        if isinstance(result, Tensor):
            assert torch.equal(result, expected["sum_g"])


@over_cases
def test_a_matrix_may_be_the_pixels_of_images(case: str) -> None:
    op = CASES[case][0]
    args = arguments(case, torch.float32, (70, 37))
    expected = call(case, args)
    result = getattr(passes, op)(**as_images(args))
    returned = (result,) if isinstance(result, Tensor) else (result or ())
    got = {name: args[name] for name in WRITES[op]}
    got |= dict(zip(RETURNS.get(op, []), returned, strict=True))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@over_cases
def test_contiguous_images_are_an_error(case: str) -> None:
    args = as_images(arguments(case, torch.float32, (70, 37)))
    for name, value in args.items():
        if isinstance(value, Tensor) and value.dim() == 4:
            wrong = args | {name: value.contiguous()}
            with pytest.raises(
                RuntimeError, match=rf"expected {name} .*channels_last.*2, 37, 5, 7"
            ):
                getattr(passes, CASES[case][0])(**wrong)


def test_forward_relu_and_backward_gate_are_the_same_bits() -> None:
    y, mean, scale, beta, _ = list(arguments("bn_apply", torch.float32, (4099, 100)).values())[:5]
    y = ((mean - beta / scale) * (1 + 1e-7 * torch.randn(4099, 1))).contiguous()  # relu's kink
    out, g = torch.empty_like(y), torch.empty_like(y)
    passes.bn_apply_(y, mean, scale, beta, None, True, out)
    ones = torch.ones_like(y)
    passes.bn_backward_reduce_(ones, None, None, y, mean, mean, scale, beta, g)
    assert 0.01 < g.mean() < 0.99
    assert torch.equal(out > 0, g > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_16_bit_dtype(dtype: torch.dtype) -> None:
    y = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)
    zeros, out = torch.zeros(256), torch.empty_like(y)
    for scale in [1.0, 0.1, 3.0, 2.0**-16, 2.0**14]:
        passes.bn_apply_(y, zeros, torch.full((256,), scale), None, None, False, out)
        expected = (y.float() * scale).to(dtype)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@over_cases
@pytest.mark.usefixtures("restore_threads")
def test_same_bits_for_any_number_of_threads(case: str) -> None:
    args = arguments(case, torch.float32, (12345, 67))
    torch.set_num_threads(1)
    expected = call(case, args)
    for threads in [1, 2, 3, 7]:
        torch.set_num_threads(threads)
        for name, value in call(case, args).items():
            assert torch.equal(value, expected[name]), (name, threads)


def all_outputs() -> dict[str, object]:
    """Every pass, variant and dtype on fixed inputs, and the instruction set that ran."""
    shapes = [(5, 7), (130, 100), (700, 64)]
    outputs: dict[str, object] = {
        f"{case} {dtype} {shape} {name}": value
        for case, dtype, shape in itertools.product(CASES, DTYPES, shapes)
        for name, value in call(case, arguments(case, dtype, shape)).items()
    }
    return outputs | pooling_outputs() | {"capability": passes.cpu_capability()}


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits(tmp_path: Path) -> None:
    code = "import sys, torch, test_passes; torch.save(test_passes.all_outputs(), sys.argv[1])"
    found = {}
    for level in LEVELS:
        file = tmp_path / level
        child = run_child(code, str(file), FUSED_BOTTLENECK_CPU_CAPABILITY=level)
        assert child.returncode == 0, child.stderr
        found[level] = torch.load(file)
    best = LEVELS.index(found[LEVELS[-1]]["capability"])
    for asked, level in enumerate(LEVELS):
        assert found[level].pop("capability") == LEVELS[min(asked, best)]
        for name, value in found[level].items():
            torch.testing.assert_close(
                value, found["default"][name], rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.slow
def test_unknown_instruction_set_is_an_error() -> None:
    code = "import torch, test_passes as t; t.passes.channel_moments(torch.ones(2, 2))"
    child = run_child(code, FUSED_BOTTLENECK_CPU_CAPABILITY="sse9")
    assert child.returncode != 0
    assert "expected default, avx2, avx512 or avx512_bf16, got 'sse9'" in child.stderr


@over_cases
def test_opcheck(case: str) -> None:
    """In bfloat16, whose accumulation dtype the fake kernels must know."""
    args = arguments(case, torch.bfloat16, (5, 12))
    torch.library.opcheck(getattr(passes, CASES[case][0]).default, tuple(args.values()))


def test_opcheck_transpose() -> None:
    torch.library.opcheck(passes.transpose_.default, (torch.ones(2, 3, 4), torch.ones(2, 4, 3)))


@pytest.mark.parametrize("op", ["advise_huge_pages_", "discard_pages_"])
def test_opcheck_pages(op: str) -> None:
    torch.library.opcheck(getattr(passes, op).default, (torch.ones(3),))


def test_passes_compile() -> None:
    def normalise(y: Tensor) -> Tensor:
        assert extension.loaded()
        mean, m2 = passes.channel_moments(y)
        out = torch.empty_like(y)
        passes.bn_apply_(y, mean, (m2 / y.shape[0] + 1e-5).rsqrt(), None, None, True, out)
        return out

    y = torch.randn(50, 9)
    compiled = torch.compile(normalise, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(y), normalise(y))


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder in which the loader will look, as if for the first time."""
    monkeypatch.delenv("FUSED_BOTTLENECK_NO_EXTENSION", raising=False)
    monkeypatch.setattr(extension, "_loaded", None)
    monkeypatch.setattr(extension, "_warned", False)
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("broken", "message"), [(False, "there is no _C"), (True, "_C.abi3.so: file too short")]
)
def test_missing_library_warns_once_with_the_reason(
    unloaded: Path, broken: bool, message: str
) -> None:
    if broken:
        (unloaded / "_C.abi3.so").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match=f"without its C.. extension.*{message}") as caught:
        assert [extension.loaded(), extension.loaded()] == [False, False]
    assert len(caught) == 1
    assert "build_ext --inplace" in str(caught[0].message)


@over_dtypes
@pytest.mark.usefixtures("restore_threads")
def test_transpose(dtype: torch.dtype) -> None:
    """Every value arrives, NaN and Inf too, and nothing around out is written."""
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0], dtype=dtype)
    sizes = [1, 3, 7, 8, 16, 17, 33, 64, 100]
    shapes = [(b, r, c) for b, r, c in itertools.product([1, 3], sizes, sizes)]
    for batch, rows, columns in [*shapes, (2, 1000, 513), (2, 64, 5000), (1, 3, 4099)]:
        x = torch.randn(batch, rows, columns).to(dtype)
        x.view(-1)[: len(special)] = special[: x.numel()]
        for threads in [1, 2]:
            torch.set_num_threads(threads)
            out = fenced(torch.full((batch, columns, rows), 7.0, dtype=dtype))
            assert passes.transpose_(fenced(x), out) is None
            assert_fence(out)
            torch.testing.assert_close(out, x.transpose(1, 2), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [256, 80, 100])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.usefixtures("restore_threads")
def test_transpose_past_the_caches(rows: int, offset: int) -> None:
    """Into a part of a result too large for them, in whole cache lines and across them."""
    batch, columns = 6, 26 * 2**20 // (4 * 5 * rows)
    memory = torch.full((batch * columns * rows + 32,), 7.0)
    start = -memory.data_ptr() % 64 // 4 + offset
    out = memory[start : start + batch * columns * rows].view(batch, columns, rows)
    x = torch.randn(batch - 2, rows, columns)
    torch.set_num_threads(2)
    passes.transpose_(x, out, 1)
    assert torch.equal(out[1:-1], x.mT)
    assert (out[0] == 7).all()
    assert (out[-1] == 7).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[0], r"expected x to be matrices \[B, R, C\].*got float32 \[3, 4\]"),
        ("x", lambda t: t.long(), r"expected x to be .*of float32, float64.*got Long \[2, 3, 4\]"),
        ("x", lambda t: t.mT, r"expected x to be .*not contiguous, strides"),
        ("x", lambda t: t[:0], r"expected x to have at least one row.*got float32 \[0, 3, 4\]"),
        ("out", lambda t: t.double(), r"out to be float32 \[2, 4, 3\].*got float64 \[2, 4, 3\]"),
        ("out", lambda t: t.mT, r"out to be float32 \[2, 4, 3\].*got float32 \[2, 3, 4\]"),
        ("out", lambda t: t[1:], r"out to have matrices 0 to 1, got float32 \[1, 4, 3\]"),
        ("out", lambda t: t[0], r"out to be float32 \[0, 4, 3\].*got float32 \[4, 3\]"),
        ("first", lambda _: 1, r"out to have matrices 1 to 2, got float32 \[2, 4, 3\]"),
        ("first", lambda _: -1, r"out to have matrices -1 to 0, got float32 \[2, 4, 3\]"),
    ],
)
def test_transpose_error_names_the_argument(name: str, change: Change, message: str) -> None:
    args = {"x": torch.zeros(2, 3, 4), "out": torch.zeros(2, 4, 3), "first": 0}
    args[name] = change(args[name])
    with pytest.raises(RuntimeError, match=f"transpose_: .*{message}"):
        passes.transpose_(**args)


def test_transpose_in_place_is_an_error() -> None:
    memory = torch.randn(25)
    for start in (0, 1):
        out = memory[start : start + 24].view(2, 4, 3)
        with pytest.raises(RuntimeError, match="transpose_: expected out to be separate from x"):
            passes.transpose_(memory[:24].view(2, 3, 4), out)


@pytest.mark.parametrize("shape", [(0,), (3, 5), (1500, 1024), (2**21 + 3,)])
def test_advise_huge_pages_changes_nothing(shape: tuple[int, ...]) -> None:
    t = torch.randn(shape)
    for view in [t, t[1:], t.t() if t.dim() == 2 else t]:
        before = view.clone()
        assert passes.advise_huge_pages_(view) is None
        assert torch.equal(view, before)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone is asked to")
def test_discard_pages_gives_memory_back() -> None:
    """The whole huge pages of the storage, whatever view is passed, and nothing beside them."""
    t = torch.ones(2**24)
    first = -t.data_ptr() % 2**21 // 4
    last = t.numel() - (t.data_ptr() + 2**26) % 2**21 // 4
    before = resident_bytes()
    passes.discard_pages_(t[7:9])
    assert abs(before - resident_bytes() - 4 * (last - first)) < 2**20
    assert (t[:first] == 1).all()
    assert (t[first:last] == 0).all()
    assert (t[last:] == 1).all()


def test_discard_pages_leaves_small_memory() -> None:
    t = torch.ones(2**20 - 16)
    passes.discard_pages_(t)
    assert (t == 1).all()


def test_discard_pages_leaves_a_lazy_clone() -> None:
    t = torch.ones(2**22)
    clone = t._lazy_clone()
    passes.discard_pages_(t)
    assert (clone == 1).all()


ERRORS: list[tuple[str, str, Change, str]] = [
    ("channel_moments", "y", lambda t: t[0], r"expected y to be a matrix.*got float32 \[16\]"),
    ("channel_moments", "y", lambda t: t.long(), r"of float32, float64.*got Long \[10, 16\]"),
    ("channel_moments", "y", lambda t: t.t(), r"got float32 \[16, 10\], not contiguous, strides"),
    ("channel_moments", "y", lambda t: t[:0], r"at least one row.*got float32 \[0, 16\]"),
    ("channel_moments", "y", lambda t: t[:, :0].clone(), r"one channel, got float32 \[10, 0\]"),
    ("bn_apply", "mean", lambda t: t.double(), r"mean to be float32 \[16\].*got float64 \[16\]"),
    ("bn_apply", "scale", lambda t: t[1:], r"scale to be float32 \[16\].*got float32 \[15\]"),
    ("bn_apply", "beta", lambda t: t.bfloat16(), r"expected beta to be .*got bfloat16 \[16\]"),
    ("bn_apply", "centre", lambda t: t[None], r"expected centre to be .*got float32 \[1, 16\]"),
    ("bn_apply", "out", lambda t: t.half(), r"out to be float32 \[10, 16\].*got float16 \[10, 16"),
    ("residual_relu", "mean", lambda t: None, "mean and scale to be given together.*only scale"),
    ("residual_relu", "shift", lambda t: t[::2], r"shift to be .*got float32 \[8\], not contig"),
    ("residual_relu", "residual", lambda t: t[1:], r"residual to be .*got float32 \[9, 16\]"),
    ("residual_relu", "mask", lambda t: t.bool(), r"mask to be uint8 \[10, 2\].*got Bool \[10, 2"),
    ("residual_relu", "mask", lambda t: t[:, :1].clone(), r"mask to be .*got uint8 \[10, 1\]"),
    ("mask_grad", "mask", lambda t: t[1:], r"mask to be uint8 \[10, 2\].*got uint8 \[9, 2\]"),
    ("mask_grad", "g", lambda t: t.double(), r"g to be float32 \[10, 16\].*got float64"),
    ("masked_add", "value", lambda t: t.t(), r"expected value to be .*got float32 \[16, 10\], not"),
    ("masked_add", "grad_out", lambda t: t.half(), r"grad_out to be float32 .*got float16"),
    ("masked_add", "mask", lambda t: t[1:], r"mask to be uint8 \[10, 2\].*got uint8 \[9, 2\]"),
    ("masked_add", "out", lambda t: t[1:], r"out to be float32 \[10, 16\].*got float32 \[9, 16\]"),
    ("bn_backward_reduce", "scale", lambda t: t.double(), "scale to be float32.*got float64"),
    ("bn_backward_reduce", "addend", lambda t: t.half(), "addend to be float32.*got float16"),
    ("bn_backward_reduce", "y", lambda t: t[:, 1:], r"y to be float32 .*got float32 \[10, 15\]"),
    ("bn_backward_reduce", "invstd", lambda t: t[1:], r"invstd to be .*got float32 \[15\]"),
    ("bn_backward", "k1", lambda t: None, "k0 and k1 to be given together, got only k0"),
    ("bn_backward", "y", lambda t: t.double(), r"expected y to be float32 .*got float64"),
    ("masked_bn_backward_reduce", "mask", lambda t: t[1:], r"mask to be .*got uint8 \[9, 2\]"),
    ("masked_bn_backward_reduce", "y", lambda t: t[1:], r"y to be .*got float32 \[9, 16\]"),
    ("masked_bn_backward", "mask", lambda t: t.bool(), r"mask to be uint8 .*got Bool"),
    ("masked_bn_backward", "k1", lambda t: t[1:], r"k1 to be .*got float32 \[15\]"),
]


@pytest.mark.parametrize(("case", "name", "change", "message"), ERRORS)
def test_error_names_the_argument(case: str, name: str, change: Change, message: str) -> None:
    args = arguments(case, torch.float32, (10, 16))
    args[name] = change(args[name])
    with pytest.raises(RuntimeError, match=f"{CASES[case][0]}: .*{message}"):
        getattr(passes, CASES[case][0])(**args)


@pytest.mark.parametrize(
    ("case", "output", "source"),
    [
        ("bn_apply", "out", "y"),
        ("residual_relu", "out", "residual"),
        ("bn_backward_reduce", "g", "y"),
        ("masked_bn_backward", "out", "y"),
        ("masked_add", "out", "value"),
        ("masked_add", "out", "grad_out"),
    ],
)
def test_partial_overlap_is_an_error(case: str, output: str, source: str) -> None:
    args = arguments(case, torch.float32, (10, 16))
    memory = torch.randn(11, 16)
    args[output], args[source] = memory[:10], memory[1:]
    with pytest.raises(RuntimeError, match=f"expected {output} to be separate .*{source}, got"):
        getattr(passes, CASES[case][0])(**args)
