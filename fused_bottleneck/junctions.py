"""The algebra around the narrow normalisations, one kernel per junction where there are any.

As torch operations it is four launches a normalisation forward and three backward: with one each,
12 and 22 launches remain of an identity block's 18 and 26 with the Triton kernels.
"""

import torch
from torch import Tensor

from .algebra import BnBackward
from .stages import BnForward, GradSums, Moments, Stages

_passes = torch.ops.fused_bottleneck


class JunctionStages(Stages):
    """Stages whose coefficients come from this library's ops, where they are there."""

    has_junctions = True

    def bn_forward(
        self,
        moments: Moments,
        gamma: Tensor | None,
        beta: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> BnForward:
        if not self.has_junctions:
            return super().bn_forward(moments, gamma, beta, bias, eps)
        invstd, scale, shift, reported = _passes.bn_coefficients(
            *moments, gamma, beta, bias, eps
        ).unbind()
        return BnForward(invstd, scale, shift, reported)

    def bn_backward(
        self, scale: Tensor, invstd: Tensor, sums: GradSums, count: int, batch: bool
    ) -> BnBackward:
        if not self.has_junctions or not batch:
            return super().bn_backward(scale, invstd, sums, count, batch)
        return BnBackward(scale, *_passes.bn_backward_coefficients(invstd, *sums, count).unbind())
