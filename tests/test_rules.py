"""The rules that choose by dtype and shape (fused_bottleneck/rules.py)."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fused_bottleneck import extension, rules, tail
from fused_bottleneck.operands import POINTWISE, Geometry
from fused_bottleneck.stages import conv2d, conv2d_backward
from fused_bottleneck.units import Unit

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


@pytest.mark.parametrize(
    ("kept", "images"), [(5500, 0), (6000, 0), (5401, 0), (5400, 1), (5100, 4), (4000, 8), (0, 8)]
)
def test_images_to_keep(kept: int, images: int) -> None:
    """Of 8 with 100 bytes each: none above 0.55 of 10,000 bytes, never more than there are."""
    assert rules.images_to_keep(8, 100, kept, 10_000) == images


IMAGES = [  # channels in, width, stride, image size, dtype, and of how many of 16 images
    *[(256, 64, 1, 56, torch.float32, [0]), (512, 128, 1, 28, torch.float32, [0])],
    *[(1024, 512, 2, 14, torch.float32, [0, 13]), (2048, 512, 1, 7, torch.float32, [10])],
    *[(512, 256, 2, 28, torch.float32, [0, 0]), (2048, 512, 1, 7, torch.bfloat16, [10])],
]


@pytest.mark.skipif(not extension.has_products(), reason="the rule counts this library's products")
@pytest.mark.parametrize(("channels", "width", "stride", "size", "dtype", "images"), IMAGES)
@pytest.mark.parametrize("group", [None, "ranks"])
def test_images_that_blocks_keep(
    channels: int,
    width: int,
    stride: int,
    size: int,
    dtype: torch.dtype,
    images: list[int],
    group: str | None,
) -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.empty((), dtype=dtype).expand(shape)

    def unit(k: int) -> Unit:
        return Unit(tensor(4 * width, k, 1, 1), None, None, POINTWISE, batch=True)

    x, y1 = tensor(16, channels, size, size), tensor(16, width, size, size)
    y2 = tensor(16, width, size // stride, size // stride)
    units = [unit(width)] + ([unit(channels)] if len(images) > 1 else [])
    expected = images if group is None else [0 for _ in images]
    assert tail.kept_images(units, x, y1, y2, group) == expected
