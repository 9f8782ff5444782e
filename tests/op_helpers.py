"""What the tests of the C++ operators share: masks, fenced memory, child processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEVELS = ["default", "avx2", "avx512", "avx512_bf16"]

# Elements on both sides of a fenced tensor; odd, so that no vector load is aligned by chance.
_FENCE = 67


def pack(bits: Tensor) -> Tensor:
    """Mask bytes of a 0/1 matrix: channel 8j + k is bit k of byte j."""
    rows, channels = bits.shape
    padded = torch.zeros(rows, -(-channels // 8) * 8, dtype=torch.uint8)
    padded[:, :channels] = bits
    return (padded.view(rows, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(
        -1, dtype=torch.uint8
    )


def unpack(mask: Tensor, channels: int) -> Tensor:
    bits = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :channels].bool()


def unwritten(t: Tensor) -> Tensor:
    """t filled with what shows when it is read: NaN, or in bytes all ones (NaN as float32)."""
    return t.fill_(255 if t.dtype == torch.uint8 else float("nan"))


def fenced(t: Tensor) -> Tensor:
    """A copy of a contiguous tensor between unwritten memory: reads beyond it give NaN."""
    memory = unwritten(torch.empty(t.numel() + 2 * _FENCE, dtype=t.dtype))
    inside = memory[_FENCE:-_FENCE].view(t.shape)
    return inside.copy_(t)


def assert_fence(t: Tensor) -> None:
    """Nothing was written beyond a fenced tensor."""
    memory = t._base
    assert memory is not None
    for side in (memory[:_FENCE], memory[-_FENCE:]):
        assert (side == 255).all() if t.dtype == torch.uint8 else side.isnan().all()


def run_child(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent
    path = os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def as_images(args: dict[str, Any], *others: str) -> dict[str, Any]:
    """Arguments with 70 rows, those of their matrices that are no mask or one of the others as the
    pixels of two 5 x 7 images, in the same memory."""
    return {
        name: value.view(2, 5, 7, -1).permute(0, 3, 1, 2)
        if isinstance(value, Tensor) and value.dim() == 2 and name not in ("mask", *others)
        else value
        for name, value in args.items()
    }
