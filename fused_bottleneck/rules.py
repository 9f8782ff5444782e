"""Which way a product goes, by its shape: from arithmetic, or from measurements as stated."""

import platform
from collections.abc import Sequence
from functools import cache

import torch

from . import extension

# What the passes over an element of a wide output take, in multiply-adds of a product: measured at
# 14x14 and 7x7, float32, two threads.
_PASSES = 150
_WORTH_OF_GRAM = 1.1  # it keeps less for backward
# S = g^T D is rounded once, what it stands for in the plain block at every pixel, which averages.
# Where channels go together (tests/test_numerics.py) the error of grad x over the plain block's was
# 1.8 to 2.3 with 168 pixels, 1.2 with 784, 1.0 with 3136.
_GRAM_PIXELS = 1024


def uses_gram(
    device: str, dtype: torch.dtype, pixels: int, channels: int, width: int, kept: float
) -> bool:
    """Whether a tail unit ``[pixels, channels] -> [pixels, width]`` takes the gram way (tail.py).

    On CPU arithmetic decides, counted in multiply-adds: half a symmetric product over the pixels,
    and one with [channels, channels] coefficients; two of the weight with such; against computing
    what is not kept of the output once more and the passes over it. What leads to a variance is in
    float64, at 0.4 of the rate, but in this library's products (see ``needs_double``). Not
    counted: there the second of the weight is half a product, and both are float32 where the rest
    is bfloat16, at half the rate. Time of a step in bfloat16 the other way over that in the one
    chosen, batch 16, two threads: conv3 1.1 at 28x28, 1.02 at 14x14, 1.17 at 7x7; a downsample 1.0
    to 28x28, 1.1 to 14x14, 1.4 to 7x7.
    Elsewhere memory decides, and the gram way always moves less of it. Few pixels never take it on
    CPU: it would be less accurate; in 16 bits their own rounding is larger.

    kept: the part of the output that there is room for (``images_to_keep``). It counts with this
    library's products only, where it was measured.
    """
    if device != "cpu":
        return True
    if pixels < _GRAM_PIXELS and dtype.itemsize > 2:
        return False
    own = own_products(dtype)
    cost = 1 if own else 2.5
    gram = (0.5 * cost + 1) * pixels * channels**2 + (cost + 1) * width * channels**2
    again = 1 - kept if own else 1
    return gram < _WORTH_OF_GRAM * (again * channels + _PASSES) * pixels * width


def own_products(dtype: torch.dtype) -> bool:
    """Whether a block in that dtype on CPU runs on this library's 1x1 products.

    In bfloat16 not where the CPU has AMX: oneDNN's convolutions take it, with several times the
    rate of AVX512-BF16 (by arithmetic, not measured). Time of a step in bfloat16 with oneDNN's
    products and passes around them over that with these, batch 16, two threads: 1.4 to 1.6 at
    56x56, 1.2 to 1.3 down to 14x14, 1.1 to 1.2 at 7x7.
    """
    return extension.has_products(dtype) and not (dtype == torch.bfloat16 and _has_amx())


def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()


_MOST_KEPT_PERCENT = 55


def images_to_keep(images: int, image: int, kept: int, plain: int) -> int:
    """Of how many images of a wide output to keep their part, where backward needs the output.

    As of many as leave the block at a given part of the bytes that the plain one keeps; those of
    the others are computed again, which takes as long as the convolution does.

    image: bytes of an image of that output. kept, plain: bytes that the block keeps without it, and
    that the plain block keeps.
    """
    spare = plain * _MOST_KEPT_PERCENT // 100 - kept
    return max(0, min(images, spare // image))


MOST_CANCELLATION = 16


def needs_double(cancellation: float) -> bool:
    """Whether variances from a covariance in float32 are differences of much larger terms.

    cancellation: the largest ratio of what one would be, did the operand's channels not go
    together, to what it is. Rounding leaves an error of some 1e-7 of the former.
    """
    return cancellation > MOST_CANCELLATION


@cache
def convolution_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """In which dtype convolutions of tensors in that dtype are to run.

    Float32 for a 16-bit dtype that a CPU has no instructions for: oneDNN emulates it there. Time of
    a block in it over that in float32: 2.8 for bfloat16 with AVX-512, 27 for float16.
    """
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if _has_instructions(dtype) else torch.float32


def _has_instructions(dtype: torch.dtype) -> bool:
    onednn, cpu = torch.ops.mkldnn, torch.cpu
    try:
        if dtype == torch.float16:
            return onednn._is_mkldnn_fp16_supported()
        if not onednn._is_mkldnn_bf16_supported():
            return False
        if platform.machine() not in ("x86_64", "AMD64"):
            return True
        # What oneDNN calls supported includes its emulation on AVX-512.
        return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    except AttributeError:  # a torch without oneDNN, or without these words for it
        return False


def unit_pays(kernel: Sequence[int], groups: int) -> bool:
    """Whether to fuse a conv+BN+ReLU that ``fuse(stem=True)`` comes across.

    Training step on CPU, float32, two threads, time of eager over fused: 3x3 with stride 1 0.9 to
    1.3 (1.2 and more from 128 channels on), a 7x7 stem 1.1, strided or dilated 0.9 to 1.2; but 1x1
    0.7 to 1.0, grouped 0.7 to 1.2. The memory kept is much the same, as the next module keeps the
    ReLU's output where this one does not; less where that is a max pooling, fused too.
    """
    return groups == 1 and max(kernel) > 1


LEAST_READS_TO_WRITE = 2  # a large one has every operand computed on load, to measure that


def writes_operand(reads: int) -> bool:
    """Whether a GPU product's operand is written once and read plain, not computed on load.

    reads: how many times products load an element: once for each tap of a convolution and block of
    the other operand's channels. To compute one on load takes 0.3 to 0.5 instructions of a warp
    each time (0.6 ps on a GPU with 132 multiprocessors that issues at two thirds of its rate) and
    keeps products from running asynchronously; to write it and read it instead takes 4
    bytes (1 ps).
    By arithmetic on compiled kernels (benchmarks.kernel_report), not yet by measurement.
    """
    return reads >= LEAST_READS_TO_WRITE


_WINOGRAD_PIXELS = 160
_WINOGRAD_CHANNELS = 128


def uses_winograd(output: Sequence[int]) -> bool:
    """Whether a 3x3 convolution on CPU with that output ``[N, C, H, W]`` goes Winograd's way.

    So do the gradients of its input and weight. With every pixel it pays for transforming the
    weight, and with a weight of few channels always, as only then a block runs as one op
    (cpu_block.py). Time against oneDNN's, two threads, down to 784 pixels: stride 1 0.6 to 0.75,
    its weight's gradient 0.4 to 0.75; stride 2 0.8 to 0.95, 0.45 to 0.7. Of a block's step, against
    the other way: 512 channels, 196 and 392 pixels 0.8, 98 pixels 1.05; 64 channels, 49 to 392
    pixels 0.55 to 0.7.
    """
    n, channels, h, w = output
    return n * h * w >= _WINOGRAD_PIXELS or channels <= _WINOGRAD_CHANNELS
