"""The stages of the program: meaning, formula and plain PyTorch implementation of each.

``Stages`` is the oracle of every other implementation and the fallback where there is none. The
ten stages of DESIGN are eight methods here, as two pairs differ in their operands only:

====  ==============  ===================================================================
F1    conv_forward    y1 = conv1(x), moments of y1
F2    conv_forward    y2 = conv2(relu(BN1(y1))), moments of y2
F3    gram            mean and covariance of the centred operand D
F4    tail_forward    out = relu(sum of D Wf^T + shift + residual), its bit mask
B1    tail_wgrad      S = g^T D, column sums of g
B2    tail_dgrad      g2 = (g A + D B + c) * [a2 > 0], its two sums
B3    conv_dgrad      g1 = conv2^T(dy2) * [a1 > 0], its two sums
B4    conv_wgrad      dW2 from dy2 and a1
B5    conv_wgrad      dW1 from dy1 and x
B6    input_dgrad     dx = conv1^T(dy1) + g, or + the downsample's g A + D B + c
====  ==============  ===================================================================

and others serve the standalone conv+BN+ReLU unit: ``activation``, ``relu_backward`` and
``conv_backward``; with a max pooling behind it ``pooled`` and ``pooled_reduce``.

Activations are ``[N, C, H, W]`` in channels_last memory; vectors and statistics are in the
accumulation dtype. Products over pixels (gram, tail_wgrad) are taken in the accumulation dtype:
what they feed is differences of large sums.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import algebra
from .algebra import FoldBackward, Folded, FoldForward, OperandGrad, accumulation_dtype
from .operands import (
    NO_TAP,
    POINTWISE,
    Activation,
    ConvGrad,
    Geometry,
    MaskedGrad,
    Normalised,
    Pool,
    PooledGrad,
    StridedInput,
    matrix,
    pixels,
)
from .rules import convolution_dtype

if TYPE_CHECKING:
    from .units import Unit, UnitGrads

Operand = Activation | StridedInput


class Moments(NamedTuple):
    """Mean and biased variance per channel, ``[C]`` each."""

    mean: Tensor
    var: Tensor


class GradSums(NamedTuple):
    """``sum(g)`` and ``sum(g * xhat)`` per channel: dbeta and dgamma."""

    g: Tensor
    g_xhat: Tensor


class BnForward(NamedTuple):
    """What follows from a normalisation's batch moments: invstd, scale, beta (None for zero) and
    the mean that the running statistics see, ``[C]`` each."""

    invstd: Tensor
    scale: Tensor
    beta: Tensor | None
    reported: Tensor


class FoldedTerm(NamedTuple):
    """One product ``D weight^T + shift`` of the tail: operand and folded convolution."""

    operand: Operand
    folded: Folded


class InputTerm(NamedTuple):
    """A folded downsample's part of grad_x: ``g a + D b + shift`` at the strided pixels."""

    operand: StridedInput
    coefficients: OperandGrad
    grad: MaskedGrad


class ConvTerm(NamedTuple):
    """A convolution's part of grad_x: the gradient of its output, weight and geometry."""

    grad: ConvGrad
    weight: Tensor
    geometry: Geometry


def pack_bits(live: Tensor) -> Tensor:
    """Pack booleans ``[Q, W]`` into uint8 ``[Q, ceil(W/8)]``, channel 8j+k at bit k of byte j."""
    q, w = live.shape
    padded = torch.zeros(q, -(-w // 8) * 8, dtype=torch.uint8, device=live.device)
    padded[:, :w] = live
    weights = 2 ** torch.arange(8, device=live.device)
    return (padded.view(q, padded.shape[1] // 8, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, channels: int) -> Tensor:
    """The inverse of ``pack_bits``: booleans ``[Q, channels]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, :, None] >> shifts) & 1).flatten(1)[:, :channels].bool()


def _window_starts(pool: Pool, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows ``[H', 1]`` and columns ``[W']`` where the windows of an output of that size start."""
    h, w = (
        torch.arange(count) * stride - padding
        for count, stride, padding in zip(size[2:], pool.stride, pool.padding, strict=True)
    )
    return h[:, None], w


def taps_of(places: Tensor, width: int, pool: Pool) -> Tensor:
    """Which element of its window, row by row, each place ``row * width + column`` of a pooling's
    result is, uint8."""
    top, left = (t.to(places.device) for t in _window_starts(pool, places.shape))
    row = (places // width - top) // pool.dilation[0]
    column = (places % width - left) // pool.dilation[1]
    return (row * pool.kernel[1] + column).to(torch.uint8)


def places_of(taps: Tensor, width: int, pool: Pool) -> Tensor:
    """The inverse of ``taps_of``."""
    top, left = (t.to(taps.device) for t in _window_starts(pool, taps.shape))
    row = top + taps.long() // pool.kernel[1] * pool.dilation[0]
    return row * width + left + taps.long() % pool.kernel[1] * pool.dilation[1]


_GRAM_ROWS = 256
_GRAM_ROWS_PER_CHANNEL = 4


def gram_sums(d: Tensor) -> tuple[Tensor, Tensor]:
    """Column sums ``[K]`` and ``d^T d`` ``[K, K]`` of a matrix ``[P, K]``, in float64.

    A variance comes of them that may be small against its terms, as far as the channels go
    together: what float32 loses there the plain block, which squares after subtracting, does not.
    In 16 bits products are exact in float32, and short blocks of rows are summed in it.
    """
    if d.dtype.itemsize > 2:
        d = d.double()
        return d.sum(0), d.t() @ d
    d = d.float()
    rows = max(_GRAM_ROWS, _GRAM_ROWS_PER_CHANNEL * d.shape[1])
    whole = d.shape[0] // rows * rows
    blocks = d[:whole].view(-1, rows, d.shape[1])
    total = torch.bmm(blocks.transpose(1, 2), blocks).sum(0, dtype=torch.float64)
    rest = d[whole:]
    return d.sum(0, dtype=torch.float64), total + (rest.t() @ rest)


def covariance(sum_d: Tensor, s: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean ``[K]`` and biased covariance ``[K, K]`` of count rows, from ``gram_sums``, in place."""
    mean = sum_d.div_(count)
    return mean, s.div_(count).addr_(mean, mean, alpha=-1)


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def conv2d(x: Tensor, weight: Tensor, geometry: Geometry = POINTWISE) -> Tensor:
    """A convolution without bias, ``[N, C, H, W]`` to ``[N, W, H', W']``."""
    stride, padding, dilation, groups = geometry
    dtype = convolution_dtype(x.device.type, x.dtype)
    x_wide, weight_wide = x.to(dtype), weight.to(dtype)
    y = torch.conv2d(x_wide, weight_wide, None, stride, padding, dilation, groups)
    return y.to(x.dtype)


def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Any, Any]:
    """Gradients (input, weight) of ``conv2d``; one that is not needed is None."""
    stride, padding, dilation, groups = geometry
    dtype = convolution_dtype(x.device.type, x.dtype)
    grads = torch.ops.aten.convolution_backward(
        grad.to(dtype),
        x.to(dtype),
        weight.to(dtype),
        None,
        stride,
        padding,
        dilation,
        False,
        (0, 0),
        groups,
        (*needs, False),
    )
    grad_x, grad_weight = (t if t is None else t.to(x.dtype) for t in grads[:2])
    return grad_x, grad_weight


def _sample(t: Tensor) -> Tensor:
    """At most 16 images of t at 4 x 4 places: no border or first image speaks for the others."""
    images, _, height, width = t.shape
    return t[:: -(-images // 16), :, :: -(-height // 4), :: -(-width // 4)]


def output_dtype(
    terms: Sequence[FoldedTerm], residuals: Sequence[Tensor | Normalised]
) -> torch.dtype:
    """The compute dtype, in which the tail's output is."""
    if terms:
        return terms[0].folded.weight.dtype
    first = residuals[0]
    return (first if isinstance(first, Tensor) else first.y).dtype


def _grad_sums(g: Tensor, y: Tensor, mean: Tensor, invstd: Tensor) -> GradSums:
    """``sum(g)`` and ``sum(g * xhat)`` over the pixels, in mean's dtype."""
    rows = matrix(g).to(mean.dtype)
    xhat = (matrix(y).to(mean.dtype) - mean) * invstd
    return GradSums(rows.sum(0), (rows * xhat).sum(0))


class Stages:
    """The plain PyTorch stages. One instance serves one run of a program, as a context manager."""

    def __enter__(self) -> "Stages":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    # The block's programs as a whole, where an implementation has them so.

    def whole_forward(
        self, x: Tensor, shortcut: Tensor | None, units: "Sequence[Unit]", channels_last: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
        """``program.bottleneck_forward`` in one call, with the same results, without a group; None:
        line by line."""
        return None

    def whole_backward(
        self,
        grad: MaskedGrad,
        x: Tensor,
        units: "Sequence[Unit]",
        saved: Sequence[Tensor],
        needs_x: bool,
        needs_weight: Sequence[bool],
        identity: bool,
        channels_last: bool,
    ) -> "tuple[Tensor | None, list[UnitGrads]] | None":
        """The gradients of x and of the parameters likewise."""
        return None

    # Operands, materialised.

    def _normalised(self, act: Activation | Normalised) -> Tensor:
        """``(y - mean) * scale + beta`` in the accumulation dtype."""
        z = (act.y.to(act.mean.dtype) - _per_channel(act.mean)) * _per_channel(act.scale)
        return z if act.beta is None else z + _per_channel(act.beta)

    def _live(self, act: Activation) -> Tensor:
        """Where the ReLU passes a gradient: everywhere but at values <= 0 (NaN passes)."""
        return ~(self._normalised(act) <= 0)

    def _operand(self, operand: Operand | Tensor) -> Tensor:
        """The operand as a tensor in the compute dtype."""
        if isinstance(operand, Tensor):
            return operand
        if isinstance(operand, StridedInput):
            value = operand.view()
            if operand.centre is not None:
                value = value.to(operand.centre.dtype) - _per_channel(operand.centre)
            return value.to(operand.x.dtype).contiguous(memory_format=torch.channels_last)
        value = torch.relu(self._normalised(operand))
        if operand.centre is not None:
            value = value - _per_channel(operand.centre)
        return value.to(operand.y.dtype)

    def _conv_grad(self, grad: ConvGrad) -> Tensor:
        """dy as a tensor in the compute dtype."""
        if isinstance(grad.g, PooledGrad):
            dy = self._unpooled(grad.g, grad.y, grad.scale.dtype)
        else:
            g = grad.g if isinstance(grad.g, Tensor) else self._masked(grad.g)
            dy = g.to(grad.scale.dtype)
        if grad.k0 is not None and grad.k1 is not None:
            centred = grad.y.to(grad.mean.dtype) - _per_channel(grad.mean)
            dy = dy - _per_channel(grad.k0) - centred * _per_channel(grad.k1)
        return (dy * _per_channel(grad.scale)).to(grad.y.dtype)

    def _masked(self, grad: MaskedGrad) -> Tensor:
        """g as a tensor in the compute dtype."""
        live = unpack_bits(grad.mask, grad.grad_out.shape[1])
        n, c, h, w = grad.grad_out.shape
        live = live.view(n, h, w, c).permute(0, 3, 1, 2)
        return torch.where(live, grad.grad_out, 0)

    def _unpooled(self, grad: PooledGrad, y: Tensor, dtype: torch.dtype) -> Tensor:
        """g as a tensor like y in that dtype."""
        live = grad.taps != NO_TAP
        places = torch.where(live, places_of(grad.taps, y.shape[3], grad.pool), 0).flatten(2)
        values = torch.where(live, grad.grad_out, 0).to(dtype).flatten(2)
        g = values.new_zeros(*y.shape[:2], y.shape[2] * y.shape[3])
        return g.scatter_add_(2, places, values).view(y.shape)

    def _moments(self, y: Tensor) -> Moments:
        """Two-pass mean and biased variance of the stored values, per channel."""
        var, mean = torch.var_mean(matrix(y).to(accumulation_dtype(y.dtype)), 0, correction=0)
        return Moments(mean, var)

    # Forward.

    def channels_last(self, t: Tensor) -> Tensor:
        """t in channels_last memory; t itself where it is already."""
        return t.contiguous(memory_format=torch.channels_last)

    def centre(self, source: Tensor | Activation) -> Tensor:
        """A constant near the channel means of the source, ``[C]``: those of a sample of it.

        Rounded to the compute dtype, so that ``source - centre`` is nearly exact. Any constant is
        right; a near one keeps the covariance free of cancellation.
        """
        if isinstance(source, Tensor):
            sample = _sample(source)
        else:
            sample = Stages._operand(self, source._replace(y=_sample(source.y)))
        mean = sample.mean((0, 2, 3), dtype=torch.float64)
        return mean.to(sample.dtype).to(accumulation_dtype(sample.dtype))

    def conv(self, source: Tensor | Activation, weight: Tensor, geometry: Geometry) -> Tensor:
        """``conv(source)``, with zero padding after the prologue."""
        y = conv2d(self._operand(source), weight, geometry)
        return y.contiguous(memory_format=torch.channels_last)

    def kept(self, y: Tensor) -> Tensor:
        """A copy of images to keep for backward, in channels_last memory."""
        return y.clone(memory_format=torch.channels_last)

    def conv_again(
        self, source: Tensor | Activation, weight: Tensor, geometry: Geometry, kept: Tensor
    ) -> Tensor:
        """``conv(source)``, of which the first images were kept; not in their memory."""
        return torch.cat([kept, self.conv(source, weight, geometry)[kept.shape[0] :]])

    def conv_forward(
        self, source: Tensor | Activation, weight: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Moments]:
        """F1, F2: ``y = conv(source)`` and its moments."""
        y = self.conv(source, weight, geometry)
        return y, self._moments(y)

    def bn_forward(
        self,
        moments: Moments,
        gamma: Tensor | None,
        beta: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> BnForward:
        """F1 to F2, F2 to F3: the coefficients of a normalisation with batch statistics.

        The convolution's bias is not in the moments; the mean that is reported has it.
        """
        invstd = algebra.inverse_std(moments.var, eps)
        # A new tensor even without a bias: the mean itself is kept for backward.
        reported = moments.mean.clone() if bias is None else moments.mean + bias
        shift = None if beta is None else beta.to(invstd.dtype)
        return BnForward(invstd, algebra.bn_scale(gamma, invstd), shift, reported)

    def bn_backward(
        self, scale: Tensor, invstd: Tensor, sums: GradSums, count: int, batch: bool
    ) -> algebra.BnBackward:
        """B2 to B3, B3 to B5: the coefficients of a normalisation's gradient."""
        return algebra.bn_backward_coefficients(scale, invstd, *sums, count, batch)

    def activation(self, act: Activation, channels_last: bool) -> Tensor:
        """``relu((y - mean) * scale + beta) - centre`` as a fresh tensor."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return self._operand(act).contiguous(memory_format=layout)

    def pooled(self, act: Activation, pool: Pool, channels_last: bool) -> tuple[Tensor, Tensor]:
        """The largest activation of each window, and which it is: taps of ``PooledGrad``.

        Of equal ones the first; of NaNs the last, as in torch.
        """
        value = self._operand(act)
        out, places = F.max_pool2d(value, *pool, return_indices=True)
        taps = torch.where(out <= 0, NO_TAP, taps_of(places, value.shape[3], pool))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return out.contiguous(memory_format=layout), self.channels_last(taps)

    def gram(self, operand: Operand) -> tuple[Tensor, Tensor]:
        """F3: mean ``[K]`` and biased covariance ``[K, K]`` of the operand's rows.

        In float64; of the Triton kernels in the accumulation dtype.
        """
        d = self._operand(operand)
        return covariance(*self._gram_sums(d), pixels(d))

    def _gram_sums(self, d: Tensor) -> tuple[Tensor, Tensor]:
        return gram_sums(matrix(d))

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
        """F3 to F4: fold a normalisation with batch statistics into a weight ``[W, K, 1, 1]``."""
        return algebra.fold_forward(weight.flatten(1), cov, gamma, beta, bias, eps, centre, mean_d)

    def tail_forward(
        self,
        terms: Sequence[FoldedTerm],
        residuals: Sequence[Tensor | Normalised],
        channels_last: bool,
    ) -> tuple[Tensor, Tensor]:
        """F4: ``out = relu(sum of D Wf^T + shift + residuals)``, the mask of its live elements.

        Of terms and residuals (``[N, W, H', W']``; the y of a normalised one may be overwritten)
        together there are two. Returns out ``[N, W, H', W']`` and mask uint8 ``[Q, ceil(W/8)]``.
        """
        values = [
            conv2d(self._operand(operand), folded.weight[:, :, None, None])
            + _per_channel(folded.shift)
            for operand, folded in terms
        ]
        values += [r if isinstance(r, Tensor) else self._normalised(r) for r in residuals]
        first, second = values
        value = first + second
        mask = pack_bits(matrix(~(value <= 0)))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        dtype = output_dtype(terms, residuals)
        return torch.relu(value).to(dtype).contiguous(memory_format=layout), mask

    # Backward.

    def folded_weight(self, weight: Tensor, gamma: Tensor | None, invstd: Tensor) -> Tensor:
        """The coefficient a of the operand's gradient: ``round(gamma invstd W)`` ``[W, K]``."""
        matrix_w = weight.flatten(1).to(invstd.dtype)
        return algebra.folded_weight(matrix_w, algebra.bn_scale(gamma, invstd), weight.dtype)

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
        """B1 to B2: from ``S = g^T D`` and sum_g over count pixels.

        mean_d and weight_cov None: fixed statistics.
        """
        return algebra.fold_backward(
            weight.flatten(1),
            gamma,
            invstd,
            offset,
            centre,
            mean_d,
            weight_cov,
            a,
            s,
            sum_g,
            count,
        )

    def tail_wgrad(
        self, grad: MaskedGrad, operands: Sequence[Operand], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """B1: column sums of g ``[W]``, and ``S = g^T D`` ``[W, K]`` for each operand.

        weights: each operand's gradient coefficient a, which B2 and B6 are to multiply g with. It
        does not depend on S, so that an implementation may take g a in the same pass over g.
        """
        g = matrix(self._masked(grad))
        acc = accumulation_dtype(g.dtype)
        g = g.to(acc if g.dtype.itemsize == 2 else torch.float64)  # in 16 bits products are exact
        products = [g.t() @ matrix(self._operand(d)).to(g.dtype) for d in operands]
        return g.sum(0).to(acc), [s.to(acc) for s in products]

    def _operand_grad(self, g: Tensor, operand: Operand, grad: OperandGrad) -> Tensor:
        """``g a + D b + shift`` in the accumulation dtype."""
        value = conv2d(g, grad.a.t()[:, :, None, None]).to(accumulation_dtype(g.dtype))
        if grad.b is not None and grad.shift is not None:
            value = value + conv2d(self._operand(operand), grad.b.t()[:, :, None, None])
            value = value + _per_channel(grad.shift)
        return value

    def _through_relu(
        self, grad: Tensor, act: Activation, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        """g = grad * [a > 0] rounded to the compute dtype, and its two sums."""
        g = torch.where(self._live(act), grad, 0).to(act.y.dtype)
        return g, _grad_sums(g, act.y, act.mean, invstd)

    def masked_reduce(self, grad: MaskedGrad, y: Tensor, mean: Tensor, invstd: Tensor) -> GradSums:
        """B1 of the product way: ``sum(g)`` and ``sum(g * xhat)``, over the pixels of y."""
        return _grad_sums(self._masked(grad), y, mean, invstd)

    def relu_backward(
        self, grad_out: Tensor, act: Activation, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        """The unit's B2: ``g = grad_out * [a > 0]`` and its two sums."""
        return self._through_relu(grad_out, act, invstd)

    def pooled_reduce(self, grad: PooledGrad, y: Tensor, mean: Tensor, invstd: Tensor) -> GradSums:
        """The unit's B2 below a pooling: ``sum(g)`` and ``sum(g * xhat)``, over the pixels of y."""
        g = self.channels_last(self._unpooled(grad, y, mean.dtype))
        return _grad_sums(g, y, mean, invstd)

    def conv_backward(
        self,
        grad: ConvGrad,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        needs: tuple[bool, bool],
        channels_last: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The unit's B5 and B6: the gradients of x and of the weight, None for what needs leaves
        out."""
        grad_x = grad_weight = None
        if needs[1]:
            grad_weight = self.conv_wgrad(grad, x, weight, geometry)
        if needs[0]:
            term = ConvTerm(grad, weight, geometry)
            grad_x = self.input_dgrad(term, x, None, None, channels_last)
        return grad_x, grad_weight

    def tail_dgrad(
        self, grad: MaskedGrad, act: Activation, coefficients: OperandGrad, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        """B2: ``g2 = (g A + D B + c) * [a2 > 0]`` ``[N, M, H', W']`` and its two sums."""
        value = self._operand_grad(self._masked(grad), act, coefficients)
        return self._through_relu(value, act, invstd)

    def conv_dgrad(
        self, grad: ConvGrad, weight: Tensor, geometry: Geometry, act: Activation, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        """B3: ``g1 = conv^T(dy) * [a1 > 0]`` ``[N, C, H, W]`` and its two sums."""
        value, _ = conv2d_backward(self._conv_grad(grad), act.y, weight, geometry, (True, False))
        return self._through_relu(value, act, invstd)

    def conv_wgrad(
        self, grad: ConvGrad, source: Tensor | Activation, weight: Tensor, geometry: Geometry
    ) -> Tensor:
        """B4, B5: the gradient of the weight, from dy and the convolution's input."""
        dy = self._conv_grad(grad)
        return conv2d_backward(dy, self._operand(source), weight, geometry, (False, True))[1]

    def masked_grad(self, grad: MaskedGrad) -> Tensor:
        """``g = grad_out * bit`` as a fresh tensor: the gradient of a given shortcut."""
        return self._masked(grad)

    def _conv_input_grad(self, term: ConvTerm, x: Tensor) -> Tensor:
        """``conv^T(dy)`` ``[N, C, H, W]``."""
        dy = self._conv_grad(term.grad)
        return conv2d_backward(dy, x, term.weight, term.geometry, (True, False))[0]

    def input_dgrad(
        self,
        conv: ConvTerm,
        x: Tensor,
        identity: MaskedGrad | None,
        downsample: InputTerm | ConvTerm | None,
        channels_last: bool,
    ) -> Tensor:
        """B6: ``grad_x = conv^T(dy)``, plus g (identity) or the downsample's part."""
        grad_x = self._conv_input_grad(conv, x)
        if isinstance(downsample, ConvTerm):
            grad_x = grad_x + self._conv_input_grad(downsample, x)
        elif downsample is not None:
            operand, coefficients, grad = downsample
            term = self._operand_grad(self._masked(grad), operand, coefficients)
            operand._replace(x=grad_x).view().add_(term)
        elif identity is not None:
            grad_x = grad_x + self._masked(identity)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return grad_x.contiguous(memory_format=layout)


class EmptyStages(Stages):
    """The stages on no pixels: one rank's, where statistics are over several. Means are zero."""

    def _moments(self, y: Tensor) -> Moments:
        zeros = y.new_zeros(y.shape[1], dtype=accumulation_dtype(y.dtype))
        return Moments(zeros, zeros)

    def centre(self, source: Tensor | Activation) -> Tensor:
        t = source if isinstance(source, Tensor) else source.y
        return t.new_zeros(t.shape[1], dtype=accumulation_dtype(t.dtype))

    def gram(self, operand: Operand) -> tuple[Tensor, Tensor]:
        channels = self._operand(operand).shape[1]
        zeros = operand[0].new_zeros(channels + 1, channels, dtype=torch.float64)
        return zeros[0], zeros[1:]
