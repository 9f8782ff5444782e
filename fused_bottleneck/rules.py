"""Which way a product goes, by its shape: from arithmetic, or from measurements as stated."""

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


_WINOGRAD_TILES = 128
_WINOGRAD_TILES_PER_THREAD = 192


def uses_winograd(tiles: int) -> bool:
    """Whether a 3x3 convolution on CPU over so many 2x2 tiles goes Winograd's way.

    It pays for transforming the weight with every tile: measured, 0.55 of oneDNN's time for 784
    tiles and more, 0.9 for 256.
    """
    return tiles >= _WINOGRAD_TILES


def uses_winograd_weight_grad(tiles: int) -> bool:
    """Whether its weight's gradient does: every thread has 16 float64 sums per weight pair.

    Measured, 0.7 of oneDNN's time for 392 tiles a thread, 1.2 for 128.
    """
    return tiles >= _WINOGRAD_TILES_PER_THREAD * torch.get_num_threads()
