"""The algebra around the normalisations, one launch per junction where this library's ops are.

As torch operations it is four launches a narrow normalisation forward and three backward, and a
dozen a tail unit each way, as Triton kernels two and three. With one each, 11 and 20 launches
remain of an identity block's 18 and 26 with the Triton kernels.
"""

import torch
from torch import Tensor

from .algebra import BnBackward, FoldBackward, Folded, FoldForward, OperandGrad
from .stages import BnForward, GradSums, Moments, Stages

_passes = torch.ops.fused_bottleneck


def _rows(weight: Tensor) -> Tensor:
    """The weight of a 1x1 convolution as a contiguous matrix."""
    return weight.flatten(1).contiguous()


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

    def fold(
        self,
        weight: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centre: Tensor,
        mean_d: Tensor,
        cov: Tensor,
    ) -> FoldForward:
        if not self.has_junctions:
            return super().fold(weight, gamma, beta, bias, eps, centre, mean_d, cov)
        folded, weight_cov, reported, vectors = _passes.fold(
            _rows(weight), cov, gamma, beta, bias, eps, centre, mean_d
        )
        (mean, var), (invstd, offset, shift) = reported.unbind(), vectors.unbind()
        return FoldForward(Folded(folded, shift), mean, var, invstd, offset, weight_cov)

    def folded_weight(self, weight: Tensor, gamma: Tensor | None, invstd: Tensor) -> Tensor:
        if not self.has_junctions:
            return super().folded_weight(weight, gamma, invstd)
        return _passes.folded_weight(_rows(weight), gamma, invstd)

    def fold_backward(
        self,
        weight: Tensor,
        gamma: Tensor | None,
        invstd: Tensor,
        offset: Tensor,
        centre: Tensor,
        mean_d: Tensor | None,
        weight_cov: Tensor | None,
        a: Tensor,
        s: Tensor,
        sum_g: Tensor,
        count: int,
    ) -> FoldBackward:
        arguments = gamma, invstd, offset, centre, mean_d, weight_cov, a, s, sum_g, count
        if not self.has_junctions:
            return super().fold_backward(weight, *arguments)
        dweight, grads, b, shift = _passes.fold_backward(_rows(weight), *arguments)
        dgamma, dbias = grads.unbind()
        known = OperandGrad(a, None, None) if mean_d is None else OperandGrad(a, b, shift)
        return FoldBackward(dweight, dgamma, dbias, known)
