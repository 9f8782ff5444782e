"""Block sizes: the analytical default of each stage and shape, and what tuning tries."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Config:
    """A kernel's blocks, in the terms of its product ``[m, k] x [k, n]``.

    Products with a row per pixel have pixels on m; products over pixels have channels on m and n,
    pixels on k, and ``rows`` pixels per partial result.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    rows: int = 0


def blocks(size: int, block: int) -> int:
    """How many blocks cover size."""
    return -(-size // block)


# The reduce kernels: parts per step of a channel (block_m), elements of a product (block_n).
REDUCE = Config(block_m=1024, block_n=256, block_k=0, num_warps=4, num_stages=1)
# The covariance of the combined parts; the elementwise kernels.
COVARIANCE = Config(block_m=16, block_n=64, block_k=0, num_warps=4, num_stages=1)
POINTWISE = Config(block_m=64, block_n=64, block_k=0, num_warps=4, num_stages=1)
# A convolution's weight gradient takes up to that many taps of a row in one program.
MOST_TAPS = 3


_forced: Config | None = None


@contextmanager
def forced(config: Config) -> Iterator[None]:
    """Every stage with this configuration, whatever its sizes: for tests and tuning."""
    global _forced
    previous, _forced = _forced, config
    try:
        yield
    finally:
        _forced = previous


def choose(stage: str, m: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """The configuration of a stage for its product's sizes."""
    if _forced is not None:
        return _forced
    return _default(stage, m, n, k, dtype)


def _up_to(size: int, most: int) -> int:
    """The smallest power of two >= size, between 16 and most."""
    return max(16, min(most, 1 << (size - 1).bit_length()))


@lru_cache(maxsize=4096)
def _default(stage: str, m: int, n: int, k: int, dtype: torch.dtype) -> Config:
    return Config(128, _up_to(n, 128), 64, 8, 3, 2048)
