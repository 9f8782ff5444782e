"""Which way a product goes, by its shape: from arithmetic, or from measurements as stated."""

from collections.abc import Sequence

import torch


def uses_gram(device: str, pixels: int, channels: int, width: int) -> bool:
    """Whether a tail unit ``[pixels, channels] -> [pixels, width]`` takes the gram way (tail.py).

    On CPU arithmetic decides: the gram way where it costs fewer multiply-adds. Elsewhere memory
    does, and the gram way always moves less of it.
    """
    if device != "cpu":
        return True
    gram = 2 * pixels * channels + 3 * width * channels
    return gram < pixels * width


_WINOGRAD_PIXELS = 512
_WINOGRAD_PIXELS_PER_THREAD = 768


def _output_pixels(shape: Sequence[int]) -> int:
    return shape[0] * shape[2] * shape[3]


def uses_winograd(shape: Sequence[int], stride: int) -> bool:
    """Whether a 3x3 convolution on CPU with that output ``[N, C, H, W]`` goes Winograd's way.

    It pays for transforming the weight with every pixel. Measured against oneDNN, stride 1: 0.55
    of its time from 3,136 pixels on, 0.9 for 784; stride 2: 0.8 to 0.95.
    """
    return _output_pixels(shape) >= _WINOGRAD_PIXELS * stride**2


def uses_winograd_weight_grad(shape: Sequence[int]) -> bool:
    """Whether its weight's gradient does: every thread has float64 sums for every position.

    Measured against oneDNN: 0.7 of its time from 1,568 pixels a thread on, 1.2 for 392.
    """
    return _output_pixels(shape) >= _WINOGRAD_PIXELS_PER_THREAD * torch.get_num_threads()
