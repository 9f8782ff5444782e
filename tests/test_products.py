"""The fused 1x1 products (csrc/ops.cpp) against oracles in plain torch.

The criterion is that of the blocks: an output's error against float64 may be eager's (aten's
convolution and float32 operations on the same data) times EAGER_FACTOR, plus the floor. In
bfloat16 operands are exact and sums float32, so that only what is stored is rounded. Everything
that a product reads or writes lies between NaN, and so do its outputs and workspace at first.
"""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_criterion, relative_error
from op_helpers import (
    LEVELS,
    as_images,
    assert_fence,
    fenced,
    pack,
    run_child,
    unpack,
    unwritten,
)
from test_passes import assert_moments
from tolerances import BFLOAT16_STORED, SAME_FORMULA
from torch import Tensor
from torch.nn.grad import conv2d_weight

from fused_bottleneck import extension

pytestmark = pytest.mark.skipif(
    not extension.has_products(), reason=extension.reason() or "no products for this CPU"
)
ops = torch.ops.fused_bottleneck

# Per variant: the operator and the optional arguments to leave out.
SINGLE_CASES: dict[str, tuple[str, list[str]]] = {
    "product": ("product_", []),
    "add": ("product_add_", []),
    "add, no shift": ("product_add_", ["shift"]),
    "moments": ("product_moments_", []),
    "residual_relu": ("product_residual_relu_", ["a2", "weight2"]),
    "residual_relu, no residual": ("product_residual_relu_", ["a2", "weight2", "residual"]),
    "residual_relu, two": ("product_residual_relu_", ["residual"]),
    "residual_relu, two and residual": ("product_residual_relu_", []),
    "masked_add": ("product_masked_add_", []),
    "bn_backward_reduce": ("product_bn_backward_reduce_", []),
    "bn_backward_reduce, plain": ("product_bn_backward_reduce_", ["addend", "shift", "beta"]),
    "masked_products": ("masked_products_", []),
    "transposed_product": ("transposed_product", []),
    "gram": ("gram", []),
    "gram_in_double": ("gram_in_double", []),
}
_PAIRS = ", bfloat16"
# One variant of each operator in bfloat16, where this CPU has the instruction.
PAIR_CASES = {
    case + _PAIRS: SINGLE_CASES[case]
    for case in [
        *["product", "add", "moments", "residual_relu, two and residual", "masked_add"],
        *["bn_backward_reduce", "masked_products", "transposed_product", "gram"],
    ]
    if extension.has_products(torch.bfloat16)
}
CASES = SINGLE_CASES | PAIR_CASES
RETURNS = {
    "product_moments_": ["mean", "m2"],
    "product_bn_backward_reduce_": ["sum_g", "sum_g_xhat"],
    "masked_products_": ["sum_g", "s"],
    "transposed_product": ["s"],
    "gram": ["sum_d", "s"],
    "gram_in_double": ["sum_d", "s"],
}
GRAMS = ("gram", "gram_in_double")
# Which of rows P, depth K and channels C an argument has; the second product's depth is C.
SIZES = {"a": "PK", "weight": "KC", "weight2": "CC"} | dict.fromkeys(
    ["shift", "mean", "invstd", "scale", "beta"], "C"
)
OWN_SIZES = {
    "masked_products_": {"grad_out": "PK", "mask": "PK"},
    "gram": {"d": "PK"},
    "gram_in_double": {"d": "PK"},
}
# Rows and channels in the tails of every tiling, and above the 512 channels of a block.
ROWS = [1, 7, 12, 13, 100]
CHANNELS = [
    *[(16, 16), (32, 48), (80, 16), (16, 80), (144, 48), (48, 144), (144, 80)],
    *[(528, 32), (32, 528), (528, 528)],
]
SHAPES = [
    *((p, k, c) for p in ROWS for k, c in CHANNELS),
    *[(997, 80, 144), (997, 528, 48), (5000, 144, 32), (5000, 48, 80), (5000, 16, 528)],
]
# A single row, an odd one behind the pairs, and more than a block.
PAIR_SHAPES = [*itertools.product([1, 13, 100], [16, 80, 528], [16, 48, 528]), (997, 528, 144)]
over_cases = pytest.mark.parametrize("case", CASES)

Arguments = dict[str, Tensor | None]
Outputs = dict[str, Tensor]


def written(op: str) -> list[str]:
    """The arguments that the operator writes, the workspace too."""
    schema = getattr(ops, op).default._schema
    return [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]


def dtype_of(case: str) -> torch.dtype:
    """Of matrices and weights; vectors are float32."""
    return torch.bfloat16 if case.endswith(_PAIRS) else torch.float32


def arguments(case: str, shape: tuple[int, int, int], seed: int = 0) -> Arguments:
    """Arguments by name in the schema's order: values of order one, weights keep that size."""
    op, left_out = CASES[case]
    p, k, c = shape
    generator = torch.Generator().manual_seed(seed)

    def value(name: str) -> Tensor | None:
        if name in left_out:
            return None
        if name == "workspace":
            depth = k if op != "product_residual_relu_" or "a2" in left_out else k + c
            size = ops.product_workspace(p, depth, k if op in GRAMS else c)
            return unwritten(torch.empty(size, dtype=torch.uint8))
        letters = OWN_SIZES.get(op, {}).get(name) or SIZES.get(name, "PC")
        size = [{"P": p, "K": k, "C": c}[letter] for letter in letters]
        if name == "mask":
            bits = torch.randint(0, 2, size, dtype=torch.uint8, generator=generator)
            return unwritten(pack(bits)) if name in written(op) else pack(bits)
        t = torch.randn(size, generator=generator)
        if name.startswith("weight"):
            t /= size[0] ** 0.5
        if len(letters) > 1:
            t = t.to(dtype_of(case))
        return unwritten(t) if name in written(op) else t

    return {a.name: value(a.name) for a in getattr(ops, op).default._schema.arguments}


def call(case: str, args: Arguments) -> Outputs:
    """What the operator writes and returns, by name; args stay as they are, the memory around
    everything too."""
    op = CASES[case][0]
    own = {
        name: fenced(t) if t is not None and t.is_contiguous() else t for name, t in args.items()
    }
    result = getattr(ops, op)(**own)
    returned = (result,) if isinstance(result, Tensor) else (result or ())
    for name, t in own.items():
        if t is not None and t.is_contiguous():
            assert_fence(t)
            if name not in written(op):
                torch.testing.assert_close(t, args[name], rtol=0, atol=0, equal_nan=True)
    outputs = {n: own[n] for n in written(op) if n != "workspace"}
    return outputs | dict(zip(RETURNS.get(op, []), returned, strict=True))


def image(matrix: Tensor) -> Tensor:
    """Rows as the pixels of one image, in channels_last memory."""
    return matrix.view(1, matrix.shape[0], 1, -1).permute(0, 3, 1, 2)


def product(a: Tensor, weight: Tensor) -> Tensor:
    """a weight; in float32 as eager has it, by a convolution."""
    if a.dtype == torch.float64:
        return a @ weight
    out = F.conv2d(image(a), weight.t()[:, :, None, None])
    return out.permute(0, 2, 3, 1).reshape(len(a), -1)


def transposed(a: Tensor, b: Tensor) -> Tensor:
    """a^T b; in float32 as eager has it, by a convolution's weight gradient."""
    if a.dtype == torch.float64:
        return a.t() @ b
    return conv2d_weight(image(b), (a.shape[1], b.shape[1], 1, 1), image(a)).flatten(1)


def formula(case: str, args: Arguments, dtype: torch.dtype) -> Outputs:
    """The outputs but the mask, in dtype; the gate of a relu in backward always in float32."""
    op = CASES[case][0]
    a = {k: v if v is None or v.dtype == torch.uint8 else v.to(dtype) for k, v in args.items()}

    def plus(v: Tensor, *names: str) -> Tensor:
        for name in names:
            v = v if a[name] is None else v + a[name]
        return v

    def masked() -> Tensor:
        return a["grad_out"].where(unpack(a["mask"], a["grad_out"].shape[1]), 0)

    if op in ("transposed_product", *GRAMS):
        if "b" in a:
            return {"s": transposed(a["a"], a["b"])}
        return {"sum_d": a["d"].sum(0), "s": transposed(a["d"], a["d"])}
    if op == "masked_products_":
        g = masked()
        return {"out": product(g, a["weight"]), "sum_g": g.sum(0), "s": transposed(g, a["d"])}
    v = product(a["a"], a["weight"])
    if op == "product_moments_":
        mean = v.mean(0)
        return {"out": v, "mean": mean, "m2": (v - mean).square().sum(0)}
    if op == "product_residual_relu_":
        v = v if a["a2"] is None else v + product(a["a2"], a["weight2"])
        v = plus(v, "shift", "residual")
        return {"out": torch.where(v <= 0, 0, v)}
    if op == "product_bn_backward_reduce_":
        z = (args["y"] - args["mean"]) * args["scale"]
        z = z if args["beta"] is None else z + args["beta"]
        g = torch.where(z <= 0, 0, plus(v, "addend", "shift"))
        xhat = (a["y"] - a["mean"]) * a["invstd"]
        return {"g": g, "sum_g": g.sum(0), "sum_g_xhat": (g * xhat).sum(0)}
    if op == "product_masked_add_":
        return {"out": v + masked()}
    return {"out": plus(v, "addend", "shift") if op == "product_add_" else v}


def assert_mask(outputs: Outputs) -> None:
    """Live elements are positive or NaN, the others exactly zero."""
    if "mask" in outputs:
        assert torch.equal(outputs["mask"], pack(~(outputs["out"] <= 0)))


@pytest.mark.parametrize("case", SINGLE_CASES)
def test_error_is_eagers(case: str) -> None:
    for seed, shape in enumerate(SHAPES):
        args = arguments(case, shape, seed)
        outputs = call(case, args)
        assert_mask(outputs)
        expected = formula(case, args, torch.float64)
        eager = formula(case, args, torch.float32)
        assert outputs.keys() - {"mask"} == expected.keys()
        rows = [{n: relative_error(t[n], expected[n]) for n in expected} for t in (outputs, eager)]
        try:
            assert_criterion(rows[:1], rows[1:], torch.float32)
        except AssertionError as error:
            raise AssertionError(f"{shape}: {error}") from None


@pytest.mark.parametrize("case", PAIR_CASES)
def test_bfloat16_rounds_what_it_stores(case: str) -> None:
    """And nothing else; moments and sums behind a ReLU are those of what is stored."""
    for seed, shape in enumerate(PAIR_SHAPES):
        args = arguments(case, shape, seed)
        outputs = call(case, args)
        assert_mask(outputs)
        expected = formula(case, args, torch.float64)
        if "mean" in outputs:
            assert_moments(outputs["out"], outputs.pop("mean"), outputs.pop("m2"))
        if "g" in outputs:
            g = outputs["g"].double()
            xhat = (args["y"] - args["mean"]) * args["invstd"]
            expected |= {"sum_g": g.sum(0), "sum_g_xhat": (g * xhat).sum(0)}
        for name in outputs.keys() - {"mask"}:
            stored = outputs[name].dtype == torch.bfloat16
            limit = BFLOAT16_STORED if stored else SAME_FORMULA[torch.float32]
            assert relative_error(outputs[name], expected[name]) <= limit, (shape, name)


def test_result_dtypes() -> None:
    for case, (op, _) in CASES.items():
        for name, t in call(case, arguments(case, (7, 16, 32))).items():
            wide = torch.float64 if op in GRAMS else torch.float32
            own = dtype_of(case) if name in ("out", "g") else wide
            assert t.dtype == (torch.uint8 if name == "mask" else own), (case, name)


def test_gram_is_summed_in_double() -> None:
    for shape in [(1, 16, 16), (100, 528, 16), (997, 80, 16), (5000, 144, 16)]:
        args = arguments("gram_in_double", shape)
        expected = formula("gram_in_double", args, torch.float64)["s"]
        assert relative_error(call("gram_in_double", args)["s"], expected) < 1e-14


@pytest.mark.parametrize("offset", [1e3, -1e4])
def test_moments_of_a_large_mean(offset: float) -> None:
    """Deviations of 1 around the offset: E[v^2] - E[v]^2 would have no digit left in float32."""
    args = arguments("moments", (5000, 32, 48))
    args["a"][:, 0], args["weight"][0] = offset, 1
    args["a"][:, 1], args["weight"][1] = torch.linspace(-5, 5, 5000), 1
    outputs = call("moments", args)
    assert_moments(outputs["out"], outputs["mean"], outputs["m2"])


def test_gate_is_the_forward_relus() -> None:
    """At relu's kink, where the roundings of bn_apply_ decide what is live."""
    args = arguments("bn_backward_reduce", (997, 16, 48))
    kink = args["mean"] - args["beta"] / args["scale"]
    args["y"] = (kink * (1 + 1e-7 * torch.randn(997, 1))).contiguous()
    out = torch.empty_like(args["y"])
    ops.bn_apply_(*(args[n] for n in ("y", "mean", "scale", "beta")), None, True, out)
    g = call("bn_backward_reduce", args)["g"]
    assert 0.01 < (g != 0).float().mean() < 0.99
    assert torch.equal(out > 0, g != 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda w: w.t().contiguous().t(),
    "strided": lambda w: w.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3],
    "columns": lambda w: torch.cat([w, w], 1)[:, w.shape[1] :],
    "expanded": lambda w: w[:1].expand(w.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@over_cases
def test_weight_of_any_strides(case: str, layout: str) -> None:
    for shape in [(13, 80, 144), (7, 528, 48), (12, 48, 528)]:
        args = arguments(case, shape)
        for name in {"weight", "weight2"} & {n for n, t in args.items() if t is not None}:
            args[name] = LAYOUTS[layout](args[name])
            outputs = call(case, args)
            expected = call(case, args | {name: args[name].contiguous()})
            assert all(torch.equal(outputs[n], t) for n, t in expected.items())


@over_cases
def test_a_matrix_may_be_the_pixels_of_images(case: str) -> None:
    op = CASES[case][0]
    args = arguments(case, (70, 48, 80))
    expected = call(case, args)
    result = getattr(ops, op)(**as_images(args, "weight", "weight2"))
    returned = (result,) if isinstance(result, Tensor) else (result or ())
    got = {name: args[name] for name in expected if name in args}
    got |= dict(zip(RETURNS.get(op, []), returned, strict=True))
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@over_cases
def test_output_may_be_a_matrix_of_the_epilogue(case: str) -> None:
    args = arguments(case, (100, 48, 80))
    expected = call(case, args)
    for name in ("addend", "residual", "y", *(["grad_out"] if case == "masked_add" else [])):
        if args.get(name) is None:
            continue
        own = {n: t.clone() if t is not None else None for n, t in args.items()}
        output = "g" if "g" in own else "out"
        own[output] = own[name]
        result = getattr(ops, CASES[case][0])(**own)
        assert torch.equal(own[output], expected[output])
        for given, wanted in zip(result or (), ("sum_g", "sum_g_xhat"), strict=False):
            assert torch.equal(given, expected[wanted])


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")], ids=str)
@over_cases
def test_nan_and_inf_reach_only_their_outputs(case: str, special: float) -> None:
    """One element of one argument; the gate and relu let NaN through, the mask has it as live."""
    tolerance = dict.fromkeys(["rtol", "atol"], SAME_FORMULA[dtype_of(case)])
    shape = (100, 48, 80)
    for name in arguments(case, shape):
        args = arguments(case, shape)
        if args[name] is None or name in written(CASES[case][0]) or name == "mask":
            continue
        args[name].view(-1)[args[name].numel() // 2 + 21] = special
        outputs = call(case, args)
        assert_mask(outputs)
        for output, expected in formula(case, args, torch.float64).items():
            actual = outputs[output].double()
            torch.testing.assert_close(
                actual, expected, **tolerance, equal_nan=True, msg=f"{output} of special {name}"
            )


@pytest.mark.parametrize("case", ["masked_add", "masked_products"])
def test_masked_gradient_is_not_read_as_a_number(case: str) -> None:
    """NaN where the mask is 0 counts as 0."""
    args = arguments(case, (100, 48, 80))
    bits = unpack(args["mask"], args["grad_out"].shape[1])
    clean = call(case, args | {"grad_out": args["grad_out"].where(bits, 0)})
    dirty = call(case, args | {"grad_out": args["grad_out"].where(bits, float("nan"))})
    assert all(torch.equal(dirty[n], t) for n, t in clean.items())


@over_cases
def test_same_bits_twice(case: str) -> None:
    """Whatever the workspace holds."""
    args = arguments(case, (997, 144, 80))
    expected = call(case, args)
    dirty = torch.randint(0, 256, args["workspace"].shape, dtype=torch.uint8)
    for workspace in (args["workspace"], torch.zeros_like(dirty), dirty):
        outputs = call(case, args | {"workspace": workspace})
        assert all(torch.equal(outputs[n], t) for n, t in expected.items())


def assert_close(actual: Outputs, expected: Outputs) -> None:
    """Equal to rounding; a mask's bits may differ where relu's argument is near zero."""
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        if t.dtype == torch.uint8:
            assert (actual[name] != t).float().mean() < 1e-3, name
        else:
            assert relative_error(actual[name], t) <= SAME_FORMULA[torch.float32], name


READS_TO_THE_END = """
import ctypes, mmap, torch
from fused_bottleneck import extension

assert extension.load()
ops, libc, page = torch.ops.fused_bottleneck, ctypes.CDLL(None), mmap.PAGESIZE

def guarded(rows, channels):
    size = rows * channels * 4
    memory = mmap.mmap(-1, (size // page + 2) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    end = address + (size // page + 1) * page
    assert libc.mprotect(ctypes.c_void_p(end), page, 0) == 0
    return torch.frombuffer(memory, dtype=torch.float32, count=rows * channels,
                            offset=end - size - address).view(rows, channels).normal_()

a, b = guarded(392, 1024), guarded(392, 1024)
for threads in range(1, 10):
    torch.set_num_threads(threads)
    workspace = torch.empty(ops.product_workspace(392, 1024, 1024), dtype=torch.uint8)
    s = ops.transposed_product(a, b, workspace)
    torch.testing.assert_close(s, a.t() @ b, rtol=0, atol=1e-3)
"""


@pytest.mark.slow
def test_nothing_is_read_behind_the_last_row() -> None:
    """However many threads share the channels: the page after the operands must not be touched."""
    subprocess.run([sys.executable, "-c", READS_TO_THE_END], check=True)


@over_cases
def test_one_and_two_threads_agree(case: str) -> None:
    for shape in [(1, 16, 16), (13, 528, 528), (5000, 80, 144)]:
        expected = call(case, arguments(case, shape))
        torch.set_num_threads(2)
        outputs = call(case, arguments(case, shape))  # more threads need a larger workspace
        torch.set_num_threads(1)
        assert_close(outputs, expected)


def all_outputs() -> dict[str, object]:
    """Every case on fixed inputs, and the instruction set that ran."""
    shapes = [(p, k, c) for p in (1, 13, 100) for k, c in CHANNELS] + [(997, 80, 144)]
    outputs: dict[str, object] = {
        f"{case} {shape} {name}": value
        for case, shape in itertools.product(SINGLE_CASES, shapes)
        for name, value in call(case, arguments(case, shape)).items()
    }
    return outputs | {"capability": ops.cpu_capability()}


@pytest.mark.slow
def test_instruction_sets_agree(tmp_path: Path) -> None:
    code = (
        "import sys, torch, test_products, test_winograd as w; torch.set_num_threads(1);"
        "torch.save(w.all_outputs() | test_products.all_outputs(), sys.argv[1])"
    )
    found = []
    for level in ("avx2", "avx512"):
        file = tmp_path / level
        child = run_child(code, str(file), FUSED_BOTTLENECK_CPU_CAPABILITY=level)
        assert child.returncode == 0, child.stderr
        found.append(torch.load(file))
    best = LEVELS.index(found[-1].pop("capability"))
    assert found[0].pop("capability") == "avx2"
    assert best >= LEVELS.index("avx2")
    assert_close(*found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("level", "dtype", "message"),
    [
        ("default", torch.float32, "products need AVX2"),
        ("avx2", torch.bfloat16, "products of bfloat16 need AVX512-BF16, got avx2"),
    ],
)
def test_level_without_products(level: str, dtype: torch.dtype, message: str) -> None:
    code = (
        "import torch; from fused_bottleneck import extension; ops = torch.ops.fused_bottleneck;"
        f"print(extension.has_products({dtype}), ops.cpu_capability());"
        f"t = torch.ones(16, 16, dtype={dtype});"
        "ops.product_(t, t, t.clone(), torch.empty(2**20, dtype=torch.uint8))"
    )
    child = run_child(code, FUSED_BOTTLENECK_CPU_CAPABILITY=level)
    assert child.stdout.split() == ["False", level]
    assert child.returncode == 1
    assert "RuntimeError" in child.stderr
    assert message in child.stderr


@over_cases
def test_opcheck(case: str) -> None:
    args = arguments(case, (5, 16, 32))
    torch.library.opcheck(getattr(ops, CASES[case][0]).default, tuple(args.values()))
