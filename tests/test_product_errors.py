"""What the fused 1x1 products refuse, and that the message names the operator and the argument."""

from collections.abc import Callable

import pytest
import torch
from op_helpers import run_child
from test_products import CASES, arguments, call, ops, over_cases
from torch import Tensor

from fused_bottleneck import extension

pytestmark = pytest.mark.skipif(
    not extension.has_products(), reason=extension.reason() or "no products for this CPU"
)

Change = Callable[[Tensor], Tensor | None]
MATRIX = r"expected {} to be float32 \[10, C\], C a multiple of 16, contiguous"
ERRORS: list[tuple[str, str, Change, str]] = [
    ("product", "a", lambda t: t.double(), MATRIX.format("a") + r".* got float64 \[10, 32\]"),
    ("product", "a", lambda t: t[:, :20].clone(), MATRIX.format("a") + r".*float32 \[10, 20\]"),
    ("product", "a", lambda t: t[0], r"expected a to be .*got float32 \[32\]"),
    ("product", "a", lambda t: t[:0], r"expected a to be .*got float32 \[0, 32\]"),
    ("product", "a", lambda t: t.t().contiguous().t(), "a to be .*not contiguous, strides"),
    ("product", "weight", lambda t: t.half(), r"weight to be float32 \[32, 48\].*got float16"),
    ("product", "weight", lambda t: t[1:], r"weight to be .*got float32 \[31, 48\]"),
    ("product", "weight", lambda t: t[0], r"weight to be \[K, C\].*got float32 \[48\]"),
    ("product", "weight", lambda t: t[:, :40], r"weight to be \[K, C\], C a multiple of 16, got"),
    ("product", "out", lambda t: t[1:], r"out to be float32 \[10, 48\].*got float32 \[9, 48\]"),
    ("product", "out", lambda t: t.double(), r"out to be float32 .*got float64"),
    ("product", "out", lambda t: t.t().contiguous().t(), "out to be .*not contiguous, strides"),
    ("product", "workspace", lambda t: t[:64], r"workspace to have at least \d+ bytes, got \d+"),
    ("product", "workspace", lambda t: t.char(), "workspace to be uint8"),
    ("product", "workspace", lambda t: t[None], "workspace to be uint8"),
    ("product", "workspace", lambda t: t.repeat(2)[::2], "workspace to be .*not contiguous"),
    ("add", "addend", lambda t: t[1:], r"addend to be .*got float32 \[9, 48\]"),
    ("add", "shift", lambda t: t.double(), r"shift to be float32 \[48\].*got float64"),
    ("moments", "workspace", lambda t: t[:64], "workspace to have at least"),
    ("residual_relu, two", "a2", lambda t: None, "a2 and weight2 to be given together"),
    ("residual_relu, two", "weight2", lambda t: None, "a2 and weight2 to be given together"),
    ("residual_relu, two", "a2", lambda t: t[1:], r"a2 to be .*got float32 \[9, 48\]"),
    ("residual_relu, two", "weight2", lambda t: t[:, :16], r"weight2 to be .*float32 \[48, 16\]"),
    ("residual_relu, two", "workspace", lambda t: t[:64], "workspace to have at least"),
    ("residual_relu", "residual", lambda t: t.double(), "residual to be .*got float64"),
    ("residual_relu", "mask", lambda t: t[1:], r"mask to be uint8 \[10, 6\].*got uint8 \[9, 6\]"),
    ("residual_relu", "shift", lambda t: t[::2], "shift to be .*not contiguous"),
    ("masked_add", "mask", lambda t: t.bool(), r"mask to be uint8 \[10, 6\].*got Bool"),
    ("masked_add", "grad_out", lambda t: t[1:], r"grad_out to be .*got float32 \[9, 48\]"),
    ("bn_backward_reduce", "y", lambda t: t[1:], r"y to be .*got float32 \[9, 48\]"),
    ("bn_backward_reduce", "invstd", lambda t: t[1:], r"invstd to be .*got float32 \[47\]"),
    ("bn_backward_reduce", "g", lambda t: t.half(), "g to be float32 .*got float16"),
    ("masked_products", "mask", lambda t: t[:, 1:].clone(), r"mask to be uint8 \[10, 4\]"),
    ("masked_products", "d", lambda t: t[1:], r"d to be .*got float32 \[9, 48\]"),
    ("masked_products", "workspace", lambda t: t[:64], "workspace to have at least"),
    ("transposed_product", "b", lambda t: t[1:], r"b to be .*got float32 \[9, 48\]"),
    ("transposed_product", "b", lambda t: t[:, :8].clone(), r"b to be .*multiple of 16"),
    ("transposed_product", "workspace", lambda t: t[:64], "workspace to have at least"),
    *(
        (f"{case}, bfloat16", name, change, message)
        for case, name, change, message in [
            ("product", "weight", lambda t: t.float(), r"weight to be bfloat16 .*got float32"),
            ("residual_relu, two and residual", "a2", lambda t: t.float(), "a2 to be bfloat16"),
            ("moments", "out", lambda t: t.float(), "out to be bfloat16 .*got float32"),
            ("masked_products", "d", lambda t: t.float(), r"d to be bfloat16 \[10, C\]"),
        ]
        if f"{case}, bfloat16" in CASES
    ),
    ("gram_in_double", "d", lambda t: t.bfloat16(), MATRIX.format("d") + ".*got bfloat16"),
    ("gram", "d", lambda t: t.double(), MATRIX.format("d") + ".*got float64"),
    ("gram", "workspace", lambda t: t[:64], "workspace to have at least"),
    ("gram_in_double", "d", lambda t: t.double(), MATRIX.format("d") + ".*got float64"),
    ("gram_in_double", "workspace", lambda t: t[:64], "workspace to have at least"),
]


@pytest.mark.parametrize(("case", "name", "change", "message"), ERRORS)
def test_error_names_the_argument(case: str, name: str, change: Change, message: str) -> None:
    args = arguments(case, (10, 32, 48))
    args[name] = change(args[name])
    with pytest.raises(RuntimeError, match=f"{CASES[case][0]}: .*{message}"):
        getattr(ops, CASES[case][0])(**args)


# What an output may only be separate from; every other input is covered by the exact same memory.
OVERLAPS = {
    "product": ["a"],
    "add": ["a", "addend"],
    "moments": ["a"],
    "residual_relu": ["a", "residual"],
    "residual_relu, two": ["a", "a2"],
    "masked_add": ["a", "grad_out"],
    "bn_backward_reduce": ["a", "addend", "y"],
    "masked_products": ["d", "grad_out"],
}


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize(
    ("case", "source"), [(c, n) for c, names in OVERLAPS.items() for n in names]
)
def test_partial_overlap_is_an_error(case: str, source: str, shift: int) -> None:
    args = arguments(case, (32, 32, 32))
    output = "g" if "g" in args else "out"
    memory = torch.randn(34, 32)
    args[output], args[source] = memory[1:33], memory[1 + shift : 33 + shift]
    with pytest.raises(RuntimeError, match=f"expected {output} to be separate .*{source}, got"):
        getattr(ops, CASES[case][0])(**args)


@over_cases
def test_output_in_an_operand_is_an_error_or_right(case: str) -> None:
    """The product needs all of a row, or all of the weight, while it writes."""
    names = [n for n, t in arguments(case, (16, 16, 16)).items() if t is not None]
    output = "g" if "g" in names else "out"
    for name in {"a", "a2", "d", "weight", "weight2"} & set(names if output in names else []):
        args = arguments(case, (528, 528, 528))
        expected = call(case, args)[output]
        args[output] = args[name]
        try:
            getattr(ops, CASES[case][0])(**args)
        except RuntimeError:
            continue  # the same message as of a partial overlap
        assert torch.equal(args[output], expected), name


def test_workspace_of_no_pixels_is_an_error_or_nothing() -> None:
    """In a child, as an empty batch must not end the process."""
    code = """
import test_products as t
for op, *sizes in [
    ("product_workspace", 0, 16, 16),
    ("product_workspace", -1, 16, 16),
    ("product_workspace", 1, -16, 16),
    ("product_workspace", 1, 16, 0),
    ("winograd_workspace", 0, 3, 3, 16, 16, 1, False),
    ("winograd_workspace", 1, 0, 3, 16, 16, 1, False),
    ("winograd_workspace", -1, 3, 3, 16, 16, 2, True),
]:
    try:
        assert getattr(t.ops, op)(*sizes) >= 0, (op, sizes)
    except RuntimeError as error:
        assert op in str(error), error
"""
    child = run_child(code)
    assert child.returncode == 0, (child.returncode, child.stderr)
