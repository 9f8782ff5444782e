"""The machine's peaks, measured in the run that uses them: copy bandwidth, convolution rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.harness import measure, timer_for

COPY_BYTES = 256 * 2**20  # beyond any last-level cache
# (channels in, channels out, kernel, image size) of products in ResNet-50 that run fastest.
CONVOLUTIONS = (
    (64, 256, 1, 56),
    (64, 64, 3, 56),
    (128, 128, 3, 28),
    (256, 256, 3, 14),
    (512, 512, 3, 7),
    (1024, 256, 1, 14),
    (2048, 512, 1, 7),
)


@dataclass(frozen=True)
class Peaks:
    """Bytes per second of a copy (read plus write), operations per second of a convolution."""

    copy_bandwidth: float
    convolution_rate: float


def measure_peaks(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    rounds: int,
    *,
    copy_bytes: int = COPY_BYTES,
    convolutions: Sequence[tuple[int, int, int, int]] = CONVOLUTIONS,
) -> Peaks:
    """The rates of a large copy and of the fastest of `convolutions`, timed over `rounds`."""
    return Peaks(
        copy_bandwidth=_copy_bandwidth(device, copy_bytes, rounds),
        convolution_rate=max(
            _convolution_rate(device, dtype, batch, rounds, *convolution)
            for convolution in convolutions
        ),
    )


def _copy_bandwidth(device: torch.device, size: int, rounds: int) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = measure({"copy": lambda: target.copy_(source)}, rounds, 2, timer_for(device))
    return 2 * size / timings["copy"].q20


def _convolution_rate(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    rounds: int,
    in_channels: int,
    out_channels: int,
    kernel: int,
    size: int,
) -> float:
    """Operations per second of one forward convolution, in the faster of the two layouts."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    conv = conv.to(device, dtype)
    x = torch.randn(batch, in_channels, size, size, device=device, dtype=dtype)
    x_last = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        timings = measure(
            {"contiguous": lambda: conv(x), "channels_last": lambda: conv(x_last)},
            rounds,
            2,
            timer_for(device),
        )
    flops = 2.0 * batch * size**2 * in_channels * out_channels * kernel**2
    return flops / min(timing.q20 for timing in timings.values())
