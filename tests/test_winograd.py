"""The 3x3 convolutions by Winograd's filtering (csrc/ops.cpp) against aten's in float64.

The criterion is that of test_products.py. For the gradient of the input with stride 2, whose
elements are sums of at most four products, Winograd's differences cost up to twice aten's error;
that is below the floor.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import channels_last, relative_error
from op_helpers import assert_fence, fenced, unwritten
from tolerances import EAGER_FACTOR, FLOORS, SAME_FORMULA
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fused_bottleneck import extension
from fused_bottleneck.cpu_products import CpuProductStages
from fused_bottleneck.operands import Activation, ConvGrad, Geometry

pytestmark = pytest.mark.skipif(
    not extension.has_products(), reason=extension.reason() or "no products for this CPU"
)
ops = torch.ops.fused_bottleneck

# What is computed, and the stride.
CASES = list(itertools.product(["conv", "input_grad", "weight_grad"], [1, 2]))
over_cases = pytest.mark.parametrize(("kind", "stride"), CASES)

# Images [N, H, W], C and K: part of a tile, odd and even sizes, tails of tiles and channels.
IMAGES = [
    *[(1, 1, 1), (3, 1, 1), (2, 1, 5), (1, 4, 1), (2, 2, 13), (1, 3, 2), (2, 7, 7), (1, 8, 6)],
    *[(2, 14, 15), (1, 29, 28), (9, 7, 7), (3, 13, 11)],
]
CHANNELS = [(16, 16), (32, 48), (80, 16), (16, 144), (144, 32)]
SHAPES = [
    *((*image, c, k) for image in IMAGES for c, k in CHANNELS),
    *[(2, 7, 7, 528, 32), (2, 7, 7, 16, 528), (1, 5, 6, 528, 528), (8, 14, 14, 48, 80)],
]
Shape = tuple[int, int, int, int, int]
Arguments = dict[str, Tensor | int | bool]


def arguments(kind: str, stride: int, shape: Shape, seed: int = 0) -> Arguments:
    """Arguments by name in the schema's order: values of order one, also of what comes out."""
    n, h, w, c, k = shape
    small = (n, -(-h // stride), -(-w // stride))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, h, w, c, generator=generator)
    grad = torch.randn(*small, k, generator=generator)
    transposed = kind == "input_grad"
    output, depth = ((n, h, w, c), k) if transposed else ((*small, k), c)
    size = ops.winograd_workspace(*output[:3], depth, output[3], stride, transposed)
    workspace = unwritten(torch.empty(size, dtype=torch.uint8))
    if kind == "weight_grad":
        return {"grad": grad, "x": x, "stride": stride, "workspace": workspace}
    return {
        "x": grad if transposed else x,
        "weight": torch.randn(k, c, 3, 3, generator=generator) / (9 * depth) ** 0.5,
        "stride": stride,
        "transposed": transposed,
        "out": unwritten(torch.empty(output)),
        "workspace": workspace,
    }


def operator(kind: str) -> Callable[..., Tensor | None]:
    return ops.winograd_weight_grad if kind == "weight_grad" else ops.winograd_conv_


def call(kind: str, args: Arguments) -> Tensor:
    """The result; args stay as they are, the memory around them too."""
    fences = [n for n, t in args.items() if isinstance(t, Tensor) and t.is_contiguous()]
    own = args | {name: fenced(args[name]) for name in fences}
    result = operator(kind)(**own)
    for name in fences:
        assert_fence(own[name])
        if name not in ("out", "workspace"):
            torch.testing.assert_close(own[name], args[name], rtol=0, atol=0, equal_nan=True)
    return own["out"] if result is None else result


def nchw(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2)


def aten(kind: str, args: Arguments, dtype: torch.dtype) -> Tensor:
    """The same by aten's convolutions in channels_last memory."""
    a = {n: t.to(dtype) if isinstance(t, Tensor) else t for n, t in args.items()}
    options = {"stride": args["stride"], "padding": 1}
    if kind == "conv":
        return F.conv2d(nchw(a["x"]), a["weight"], **options).permute(0, 2, 3, 1)
    if kind == "input_grad":
        size = nchw(args["out"]).shape
        grad = conv2d_input(size, a["weight"], nchw(a["x"]), **options)
        return grad.permute(0, 2, 3, 1)
    size = (args["grad"].shape[3], args["x"].shape[3], 3, 3)
    return conv2d_weight(nchw(a["x"]), size, nchw(a["grad"]), **options).permute(0, 2, 3, 1)


@over_cases
def test_error_is_eagers(kind: str, stride: int) -> None:
    for seed, shape in enumerate(SHAPES):
        args = arguments(kind, stride, shape, seed)
        result, expected = call(kind, args), aten(kind, args, torch.float64)
        assert result.dtype == torch.float32
        assert result.shape == expected.shape
        error = relative_error(result, expected)
        eager = relative_error(aten(kind, args, torch.float32), expected)
        assert error <= EAGER_FACTOR * eager + FLOORS[torch.float32], (shape, error, eager)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "taps swapped": lambda w: w.transpose(2, 3),
    "strided": lambda w: w.repeat_interleave(2, 0).repeat_interleave(3, 3)[::2, :, :, ::3],
    "expanded": lambda w: w[:1].expand(w.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kind", "stride"), CASES[:4])
def test_weight_of_any_strides(kind: str, stride: int, layout: str) -> None:
    args = arguments(kind, stride, (2, 5, 4, 80, 48))
    args["weight"] = LAYOUTS[layout](args["weight"])
    expected = call(kind, args | {"weight": args["weight"].contiguous()})
    assert torch.equal(call(kind, args), expected)


@over_cases
def test_nan_stays_near_its_pixel(kind: str, stride: int) -> None:
    """A tile may spread it, but it reaches all that aten's does, and no other image or channel."""
    args = arguments(kind, stride, (3, 14, 15, 32, 48))
    clean = call(kind, args)
    args["x"][1, 4, 5, 7] = float("nan")
    result = call(kind, args)
    assert result[aten(kind, args, torch.float64).isnan()].isnan().all()
    if kind == "weight_grad":
        others = torch.arange(32) != 7
        assert torch.equal(result[..., others], clean[..., others])
        return
    rows, columns = (4, 5) if kind == "conv" else (4 * stride, 5 * stride)
    reach = 4 * (stride if kind == "input_grad" else 1)
    near = torch.zeros(result.shape[:3], dtype=torch.bool)
    near[1, max(rows - reach, 0) : rows + reach, max(columns - reach, 0) : columns + reach] = True
    assert torch.equal(result[~near], clean[~near])


@over_cases
def test_same_bits_twice(kind: str, stride: int) -> None:
    """Whatever the workspace holds."""
    args = arguments(kind, stride, (4, 14, 13, 48, 80))
    expected = call(kind, args)
    dirty = torch.randint(0, 256, args["workspace"].shape, dtype=torch.uint8)
    for workspace in (args["workspace"], torch.zeros_like(dirty), dirty):
        assert torch.equal(call(kind, args | {"workspace": workspace}), expected)


@over_cases
def test_one_and_two_threads_agree(kind: str, stride: int) -> None:
    for shape in [(1, 1, 1, 16, 16), (3, 7, 8, 528, 32), (8, 14, 14, 48, 80)]:
        expected = call(kind, arguments(kind, stride, shape))
        torch.set_num_threads(2)
        result = call(kind, arguments(kind, stride, shape))  # threads may need more workspace
        torch.set_num_threads(1)
        assert relative_error(result, expected) <= SAME_FORMULA[torch.float32]


def all_outputs() -> dict[str, Tensor]:
    """Every case on fixed inputs, for test_products.test_instruction_sets_agree."""
    shapes = [*SHAPES[::3], *SHAPES[-4:]]
    return {
        f"{kind} {stride} {shape}": call(kind, arguments(kind, stride, shape))
        for (kind, stride), shape in itertools.product(CASES, shapes)
    }


@over_cases
def test_opcheck(kind: str, stride: int) -> None:
    args = arguments(kind, stride, (2, 3, 4, 16, 32))
    torch.library.opcheck(operator(kind).default, tuple(args.values()))


Change = Callable[..., object]
IMAGE = r"expected {} to be float32 \[N, H, W, C\], C a multiple of 16, contiguous.*, got {}"
ERRORS: list[tuple[str, str, Change, str]] = [
    ("conv", "x", lambda t: t.double(), IMAGE.format("x", "float64")),
    ("conv", "x", lambda t: t[0], IMAGE.format("x", r"float32 \[5, 6, 16\]")),
    ("conv", "x", lambda t: t[:0], IMAGE.format("x", r"float32 \[0, 5, 6, 16\]")),
    ("conv", "x", lambda t: t[..., :8].clone(), IMAGE.format("x", r"float32 \[2, 5, 6, 8\]")),
    ("conv", "x", lambda t: t.transpose(1, 2), "expected x to be .*not contiguous, strides"),
    ("conv", "weight", lambda t: t.half(), r"weight to be float32 \[32, 16, 3, 3\].*got float16"),
    ("conv", "weight", lambda t: t[1:], r"weight to be .*got float32 \[31, 16, 3, 3\]"),
    ("conv", "weight", lambda t: t[:, :, 1:], r"weight to be .*got float32 \[32, 16, 2, 3\]"),
    ("conv", "weight", lambda t: t[0], r"weight to be .*got float32 \[16, 3, 3\]"),
    ("conv", "stride", lambda s: 3, "expected stride to be 1 or 2, got 3"),
    ("conv", "stride", lambda s: 0, "expected stride to be 1 or 2, got 0"),
    ("conv", "stride", lambda s: 2, r"expected out to be .*\[2, 3, 3, 32\].*got .*\[2, 5, 6, 32"),
    ("conv", "out", lambda t: t[1:], r"expected out to be .*\[2, 5, 6, 32\].*got .*\[1, 5, 6"),
    ("conv", "out", lambda t: t.bfloat16(), "expected out to be float32.*got bfloat16"),
    ("conv", "out", lambda t: t.transpose(1, 2), "expected out to be .*not contiguous, strides"),
    ("conv", "workspace", lambda t: t[1:], r"workspace to have at least \d+ bytes, got \d+"),
    ("conv", "workspace", lambda t: t.char(), "workspace to be uint8"),
    ("input_grad", "weight", lambda t: t[:, 1:], r"weight to be .*got float32 \[32, 15, 3, 3\]"),
    ("input_grad", "stride", lambda s: -1, "expected stride to be 1 or 2, got -1"),
    ("input_grad", "workspace", lambda t: t[1:], "workspace to have at least"),
    ("weight_grad", "grad", lambda t: t.double(), IMAGE.format("grad", "float64")),
    ("weight_grad", "grad", lambda t: t[1:], r"expected grad to be .*got .*\[1, 5, 6, 32\]"),
    ("weight_grad", "x", lambda t: t.double(), IMAGE.format("x", "float64")),
    ("weight_grad", "stride", lambda s: 3, "expected stride to be 1 or 2, got 3"),
    ("weight_grad", "workspace", lambda t: t[:9], "workspace to have at least"),
]


@pytest.mark.parametrize(("kind", "name", "change", "message"), ERRORS)
def test_error_names_the_argument(kind: str, name: str, change: Change, message: str) -> None:
    args = arguments(kind, 1, (2, 5, 6, 16, 32))
    args[name] = change(args[name])
    op = "winograd_weight_grad" if kind == "weight_grad" else "winograd_conv_"
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
        operator(kind)(**args)


@pytest.mark.parametrize("shift", [0, 1, -1])
@pytest.mark.parametrize("kind", ["conv", "input_grad"])
def test_overlap_is_an_error(kind: str, shift: int) -> None:
    args = arguments(kind, 1, (1, 5, 6, 16, 16))
    memory = torch.randn(7, 6, 16)
    args["out"], args["x"] = memory[None, 1:6], memory[None, 1 + shift : 6 + shift]
    with pytest.raises(RuntimeError, match="winograd_conv_: expected out to be separate from x"):
        operator(kind)(**args)


@pytest.mark.parametrize("stride", [0, 3])
def test_workspace_of_another_stride_is_an_error(stride: int) -> None:
    with pytest.raises(RuntimeError, match=r"winograd_workspace: .*stride to be 1 or 2, got \d"):
        ops.winograd_workspace(1, 3, 3, 16, 16, stride, False)


@pytest.mark.parametrize("affine", [True, False], ids=["beta", "no beta"])
@pytest.mark.parametrize("kind", ["conv", "weight_grad"])
@pytest.mark.parametrize("stride", [1, 2])
def test_prologue_is_the_activation_bit_for_bit(kind: str, stride: int, affine: bool) -> None:
    """Also at the border: padding comes after it, whatever it makes of zero."""
    args = arguments(kind, stride, (3, 7, 10, 48, 32))
    channels = args["x"].shape[3]
    generator = torch.Generator().manual_seed(1)
    mean, scale, beta = (torch.randn(channels, generator=generator) for _ in range(3))
    prologue = {"mean": mean, "scale": scale, "beta": beta if affine else None}
    normalised = (args["x"] - mean) * scale + (beta if affine else 0)
    result = call(kind, args | prologue)
    expected = call(kind, args | {"x": normalised.relu()})
    assert torch.equal(result, expected)


def test_input_gradients_have_a_prologue_of_the_output_channels() -> None:
    args = arguments("input_grad", 1, (1, 5, 6, 16, 32))
    scaled = call("input_grad", args | {"mean": torch.zeros(32), "scale": torch.ones(32)})
    assert torch.equal(scaled, call("input_grad", args | {"x": args["x"].relu()}))


@pytest.mark.parametrize("kind", ["conv", "weight_grad"])
@pytest.mark.parametrize(
    ("prologue", "message"),
    [
        ({"mean": torch.zeros(16)}, "expected mean and scale together"),
        ({"beta": torch.zeros(16)}, "beta with them only"),
        ({"mean": torch.zeros(8), "scale": torch.zeros(16)}, r"expected mean to be .*\[16\]"),
        (
            {"mean": torch.zeros(16), "scale": torch.zeros(16).double()},
            r"expected scale to be .*float64",
        ),
    ],
)
def test_wrong_prologue_is_an_error(kind: str, prologue: dict[str, Tensor], message: str) -> None:
    args = arguments(kind, 1, (1, 5, 6, 16, 32))
    with pytest.raises(RuntimeError, match=message):
        operator(kind)(**args, **prologue)


def test_activation_is_not_written_to_memory() -> None:
    """Neither for a 3x3 convolution nor for the gradient of its weight."""
    y, g, conv = (channels_last(torch.randn(2, channels, 16, 16)) for channels in (16, 32, 32))
    weight = torch.randn(32, 16, 3, 3)
    act = Activation(y, *torch.randn(3, 16))
    batch = [torch.zeros(32), torch.ones(32), torch.zeros(32), torch.zeros(32)]
    geometry = Geometry((1, 1), (1, 1))
    with CpuProductStages() as stages:
        out, _ = stages.conv_forward(act, weight, geometry)
        grad = stages.conv_wgrad(ConvGrad(g, conv, *batch), act, weight, geometry)
        assert ("Activation", id(y)) not in stages._materialised
    mean, scale, beta = (t.view(-1, 1, 1) for t in act[1:4])
    source = ((y - mean) * scale + beta).relu()
    expected = F.conv2d(source, weight, padding=1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    expected = conv2d_weight(source, weight.shape, g, padding=1)
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)
