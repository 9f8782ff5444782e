"""The rules that choose by dtype and shape (fused_bottleneck/rules.py)."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fused_bottleneck import extension, rules, tail_plan
from fused_bottleneck.operands import Geometry
from fused_bottleneck.stages import conv2d, conv2d_backward

SIXTEEN_BITS = [torch.bfloat16, torch.float16]
over_dtypes = pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)


@pytest.fixture
def no_instructions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that has none for 16-bit numbers."""
    monkeypatch.setattr(rules, "_has_instructions", lambda dtype: False)
    rules.convolution_dtype.cache_clear()
    yield
    rules.convolution_dtype.cache_clear()


@over_dtypes
@pytest.mark.usefixtures("no_instructions")
def test_convolutions_without_instructions_are_float32_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in [(2, 16, 5, 6), (8, 16, 3, 3), (2, 8, 3, 3)]
    )
    geometry = Geometry((2, 2), (1, 1))
    wide = [t.float() for t in (grad, x, weight)]
    assert torch.equal(conv2d(x, weight, geometry), conv2d(*wide[1:], geometry).to(dtype))
    grads = conv2d_backward(grad, x, weight, geometry, (True, True))
    for actual, expected in zip(grads, conv2d_backward(*wide, geometry, (True, True)), strict=True):
        assert torch.equal(actual, expected.to(dtype))
    assert conv2d_backward(grad, x, weight, geometry, (True, False))[1] is None


@over_dtypes
@pytest.mark.usefixtures("no_instructions")
def test_other_devices_and_dtypes_are_taken_as_they_are(dtype: torch.dtype) -> None:
    assert rules.convolution_dtype("cpu", dtype) == torch.float32
    assert rules.convolution_dtype("cuda", dtype) == dtype
    for wide in (torch.float32, torch.float64):
        assert rules.convolution_dtype("cpu", wide) == wide


@pytest.mark.parametrize("supported", [True, False])
def test_emulation_is_no_instruction(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    """OneDNN says that it supports bfloat16 wherever AVX-512 is."""
    monkeypatch.setattr(rules.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    expected = supported and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert rules._has_instructions(torch.bfloat16) == expected


def test_bfloat16_is_left_to_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert rules.own_products(torch.float32) == extension.has_products()
        assert rules.own_products(torch.bfloat16) == (
            extension.has_products(torch.bfloat16) and not amx
        )
    assert not rules.own_products(torch.float64)
    assert not rules.own_products(torch.float16)


@pytest.mark.parametrize(
    ("kept", "images"), [(5500, 0), (6000, 0), (5401, 0), (5400, 1), (5100, 4), (4000, 8), (0, 8)]
)
def test_images_to_keep(kept: int, images: int) -> None:
    """Of 8 with 100 bytes each: none above 0.55 of 10,000 bytes, never more than there are."""
    assert rules.images_to_keep(8, 100, kept, 10_000) == images


# channels in, width, stride, image size, dtype, and of conv3 and the downsample of how many of 16
# images the output is kept, None in the gram way.
PLANS = [
    *[(256, 64, 1, 56, torch.float32, [None]), (512, 128, 1, 28, torch.float32, [None])],
    *[(1024, 512, 2, 14, torch.float32, [0, 13]), (2048, 512, 1, 7, torch.float32, [10])],
    *[(512, 256, 2, 28, torch.float32, [None, 12]), (256, 128, 2, 56, torch.float32, [None, None])],
    *[(1024, 256, 1, 14, torch.float32, [None]), (64, 64, 1, 56, torch.float32, [None, None])],
    (2048, 512, 1, 7, torch.bfloat16, [10]),
]


@pytest.mark.skipif(not extension.has_products(), reason="the rule counts this library's products")
@pytest.mark.parametrize(("channels", "width", "stride", "size", "dtype", "images"), PLANS)
@pytest.mark.parametrize("group", [None, "ranks"])
def test_plans_of_blocks(
    channels: int,
    width: int,
    stride: int,
    size: int,
    dtype: torch.dtype,
    images: list[int | None],
    group: str | None,
) -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.empty((), dtype=dtype).expand(shape)

    x, y1 = tensor(16, channels, size, size), tensor(16, width, size, size)
    y2 = tensor(16, width, size // stride, size // stride)
    weights = [tensor(4 * width, k, 1, 1) for k in (width, channels)[: len(images)]]
    batch = [True for _ in weights]
    plans = tail_plan.tail_plans(weights, batch, x, y1, y2, group)
    if group is not None:
        images = [None for _ in images]
    assert [plan.gram for plan in plans] == [kept is None for kept in images]
    assert [plan.images for plan in plans] == [kept or 0 for kept in images]


def test_fixed_statistics_need_no_covariance() -> None:
    x, weight = torch.empty(4, 64, 8, 8), torch.empty(64, 16, 1, 1)
    y = torch.empty(4, 16, 8, 8)
    (plan,) = tail_plan.tail_plans([weight], [False], x, y, y, None)
    assert (plan.gram, plan.folded, plan.centred, plan.images) == (False, True, True, 0)


def test_few_pixels_take_no_covariance() -> None:
    def uses_gram(device: str, dtype: torch.dtype, pixels: int) -> bool:
        return rules.uses_gram(device, dtype, pixels, 64, 256, 0)

    assert uses_gram("cpu", torch.float32, 1024)
    assert not uses_gram("cpu", torch.float32, 1023)
    assert not uses_gram("cpu", torch.float64, 1023)
    assert uses_gram("cpu", torch.bfloat16, 1023)
    assert uses_gram("cuda", torch.float32, 1023)
