"""The machine's peaks, measured in the run that uses them, and the time they allow at best.

A stage cannot be faster than moving its bytes at the rate of a copy, nor than doing its operations
at the best rate of any product: its floor is the larger of the two times, and a plan's floor the
sum over its stages (Williams et al. 2009, "Roofline").

Only operations with pixels count. A library may leave out those with padding, as oneDNN does: its
convolution of 512 channels at 7x7 takes no longer per operation with a pixel than without padding,
and counted with padding its rate was above what the multiply-add units of the CPU can do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.harness import measure, timer_for
from benchmarks.traffic import Cost, pixel_share

COPY_BYTES = 256 * 2**20  # beyond any last-level cache
# Rows and columns of the square matrices whose product is timed: large enough for the best rate.
PRODUCT_SIZES = {"cpu": 2048, "cuda": 8192}
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
    """Bytes per second of a copy (read plus write), operations per second of a convolution and of
    a matrix product."""

    copy_bandwidth: float
    convolution_rate: float
    product_rate: float = 0.0

    @property
    def operation_rate(self) -> float:
        """The best rate of operations that any product reached."""
        return max(self.convolution_rate, self.product_rate)


def floor_seconds(cost: Cost, peaks: Peaks) -> float:
    """The least time that a stage of this cost takes."""
    return max(cost.moved / peaks.copy_bandwidth, cost.operations / peaks.operation_rate)


def plan_floor(
    costs: Mapping[str, Cost], peaks: Peaks, stages: Iterable[str] | None = None
) -> float:
    """The least time of `stages`, of all if None, one after the other."""
    names = costs if stages is None else stages
    return sum(floor_seconds(costs[name], peaks) for name in names)


def measure_peaks(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    rounds: int,
    *,
    copy_bytes: int = COPY_BYTES,
    product_size: int | None = None,
    convolutions: Sequence[tuple[int, int, int, int]] = CONVOLUTIONS,
) -> Peaks:
    """The rates of a large copy, a square product and the fastest of `convolutions`."""
    size = PRODUCT_SIZES[device.type] if product_size is None else product_size
    return Peaks(
        copy_bandwidth=_copy_bandwidth(device, copy_bytes, rounds),
        convolution_rate=max(
            _convolution_rate(device, dtype, batch, rounds, *convolution)
            for convolution in convolutions
        ),
        product_rate=_product_rate(device, dtype, size, rounds),
    )


def _copy_bandwidth(device: torch.device, size: int, rounds: int) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = measure({"copy": lambda: target.copy_(source)}, rounds, 2, timer_for(device))
    return 2 * size / timings["copy"].q20


def _product_rate(device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timings = measure({"product": lambda: a @ b}, rounds, 2, timer_for(device))
    return 2.0 * size**3 / timings["product"].q20


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
    flops *= pixel_share(size, kernel, 1, kernel // 2)
    return flops / min(timing.q20 for timing in timings.values())
