"""The stages on CPU in float32 and bfloat16 with this library's own products.

* 1x1 convolutions (csrc/cpu/products.cpp, pixel_products.cpp): a block of pixels goes from its
  operand through the product to its epilogue inside a core's L2 cache.
* 3x3 convolutions of stride 1 and 2 in float32 (csrc/cpu/winograd.cpp): Winograd's F(2x2, 3x3) for
  stride 1, with 2.25 times fewer multiplications and a smaller error; a normalisation and ReLU
  before it are applied to what it loads. It spreads what is not finite over a tile, so it serves
  batch statistics only: they spread it over the whole channel anyway. In bfloat16 oneDNN's take as
  long as this would in float32, and this in bfloat16 would round what is larger than the result.

What these cannot take (channels that are no multiple of 16, other kernels) goes the way of
``CpuStages``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import algebra
from .algebra import FoldBackward, Folded, FoldForward, OperandGrad
from .cpu import CpuStages, products_fit, workspace_bytes
from .operands import (
    Activation,
    ConvGrad,
    Geometry,
    MaskedGrad,
    pixels,
    strided,
)
from .pass_stages import TailSource, operand_key
from .rules import needs_double, uses_winograd
from .scratch import result_empty
from .stages import (
    ConvTerm,
    FoldedTerm,
    GradSums,
    InputTerm,
    Moments,
    Operand,
    covariance,
)

_passes = torch.ops.fused_bottleneck

_LARGE_MATRIX = 2**16  # elements
WINOGRAD_GEOMETRIES = (Geometry((1, 1), (1, 1)), Geometry((2, 2), (1, 1)))
Prologue = tuple[Tensor | None, ...]  # none, or mean, scale and beta of a normalisation and ReLU


def _is_product(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is one product over (strided) pixels."""
    pointwise = weight.shape[2:] == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1
    return pointwise and products_fit(*weight.shape[:2])


def _is_winograd(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is one that Winograd's way can take."""
    fits = weight.shape[2:] == (3, 3) and products_fit(*weight.shape[:2])
    return fits and weight.dtype == torch.float32 and geometry in WINOGRAD_GEOMETRIES


def _single(parameter: Tensor | None) -> Tensor | None:
    """A parameter in float32."""
    if parameter is None or parameter.dtype == torch.float32:
        return parameter
    return parameter.float()


def _rows(weight: Tensor) -> Tensor:
    """A 1x1 weight as a contiguous matrix ``[W, K]`` in float32."""
    return weight.flatten(1).float().contiguous()


def _nhwc(t: Tensor) -> Tensor:
    """The ``[N, H, W, C]`` view of a ``[N, C, H, W]`` tensor."""
    return t.permute(0, 2, 3, 1)


class CpuProductStages(CpuStages):
    """``CpuStages`` with fused 1x1 products, for float32 and bfloat16; see ``Stages`` for what each
    computes.

    In bfloat16 the 3x3 convolutions stay oneDNN's. Coefficients are float32 and rounded where they
    become a weight."""

    def __init__(self) -> None:
        super().__init__()
        self._single_grams: dict[int, Tensor] = {}  # operands, by the id of their covariance

    def _lend_winograd(self, out: Tensor, depth: int, stride: int, transposed: bool) -> Tensor:
        """Memory for the 3x3 convolution with that output, or (transposed) the one that makes that
        gradient of its input, and for the gradient of its weight."""
        n, channels, h, w = out.shape
        sizes = n, h, w, depth, channels, stride, transposed
        return self._lend(workspace_bytes("winograd", torch.get_num_threads(), *sizes))

    def _matrix_product(self, a: Tensor, b: Tensor) -> Tensor:
        """Of contiguous matrices; by this library where it is large enough for that: twice as fast
        as a BLAS here."""
        if a.numel() < _LARGE_MATRIX or not products_fit(*a.shape, b.shape[1]):
            return a @ b
        out = a.new_empty(a.shape[0], b.shape[1])
        _passes.product_(a, b, out, self._lend_product(a, b.shape[1]))
        return out

    def _seen(self, source: Tensor | Activation, geometry: Geometry) -> Tensor:
        """The pixels that a 1x1 convolution sees, in channels_last memory."""
        operand = self._operand(source)
        if geometry.stride == (1, 1):
            return operand
        key = ("seen", id(operand))
        if key not in self._materialised:
            view = strided(operand, geometry.stride)
            self._materialised[key] = self._scratch(view).copy_(view)
        return self._materialised[key]

    # Forward.

    def _conv_into(
        self,
        source: Tensor | Activation,
        weight: Tensor,
        geometry: Geometry,
        out: Tensor,
        first: int,
    ) -> None:
        if not _is_product(weight, geometry):
            return super()._conv_into(source, weight, geometry, out, first)
        operand, out = self._seen(source, geometry)[first:], out[first:]
        workspace = self._lend_product(operand, weight.shape[0])
        _passes.product_(operand, weight.flatten(1).t(), out, workspace)

    def conv_forward(
        self, source: Tensor | Activation, weight: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Moments]:
        if _is_winograd(weight, geometry):
            x, prologue = self._on_load(source)
            height, width = geometry.output_size(x.shape[2], x.shape[3], (3, 3))
            shape = (x.shape[0], weight.shape[0], height, width)
            if uses_winograd(shape):
                out = result_empty(shape, x.dtype, True)
                self._winograd(x, prologue, weight, geometry.stride[0], False, out)
                return out, self._moments(out)
        if not _is_product(weight, geometry):
            return super().conv_forward(source, weight, geometry)
        operand = self._seen(source, geometry)
        n, _, h, w = operand.shape
        out = result_empty((n, weight.shape[0], h, w), operand.dtype, True)
        workspace = self._lend_product(operand, weight.shape[0])
        mean, m2 = _passes.product_moments_(operand, weight.flatten(1).t(), out, workspace)
        return out, Moments(mean, m2 / pixels(out))

    def _on_load(self, source: Tensor | Activation) -> tuple[Tensor, Prologue]:
        """What Winograd's transforms read, and the normalisation that they apply to it."""
        if isinstance(source, Tensor) or source.centre is not None:
            return self._operand(source), ()
        return source.y, (source.mean, source.scale, source.beta)

    def _winograd(
        self,
        x: Tensor,
        prologue: Prologue,
        weight: Tensor,
        stride: int,
        transposed: bool,
        out: Tensor,
    ) -> None:
        """``out = conv(x, weight)``, or the gradient of its input from x."""
        workspace = self._lend_winograd(out, x.shape[1], stride, transposed)
        arguments = _nhwc(x), weight, stride, transposed, _nhwc(out), workspace
        _passes.winograd_conv_(*arguments, *prologue)

    def gram(self, operand: Operand) -> tuple[Tensor, Tensor]:
        """In float32 to begin with: fold may ask for more of float32 operands."""
        d = self._operand(operand)
        if not products_fit(d.shape[1]):
            return super().gram(operand)
        mean_d, cov = self._covariance(d, _passes.gram)
        self._single_grams[id(cov)] = d
        return mean_d, cov

    def _covariance(
        self, d: Tensor, gram: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        return covariance(*gram(d, self._lend_product(d, d.shape[1])), pixels(d))

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
        d = self._single_grams.pop(id(cov), None)
        if d is not None:
            rows, single, mean = _rows(weight), cov.float(), mean_d.float()
            weight_cov = self._matrix_product(rows, single)
            affine = _single(gamma), _single(beta), _single(bias)
            matrix, reported, var, invstd, offset, shift, cancellation = _passes.fold_product(
                rows, weight_cov, single, *affine, eps, centre, mean
            )
            statistics = reported, var, invstd, offset
            if weight.dtype != torch.float32:
                scale = algebra.bn_scale(gamma, invstd)
                folded = algebra.fold(rows, scale, offset, beta, mean, weight.dtype)
                return FoldForward(folded, *statistics, weight_cov)
            if not needs_double(cancellation.item()):
                return FoldForward(Folded(matrix, shift), *statistics, weight_cov)
            mean_d, cov = self._covariance(d, _passes.gram_in_double)
        return super().fold(weight, gamma, beta, bias, eps, centre, mean_d, cov)

    def _has_value(self, source: TailSource) -> bool:
        return isinstance(source, FoldedTerm) and not products_fit(*source.folded.weight.shape)

    def _tail_images(
        self,
        first: TailSource,
        second: FoldedTerm | Tensor,
        shift: Tensor,
        i: int,
        j: int,
        out: Tensor,
        mask: Tensor,
    ) -> None:
        if not isinstance(first, FoldedTerm) or not products_fit(*first.folded.weight.shape):
            return super()._tail_images(first, second, shift, i, j, out, mask)
        terms: list[Tensor | None] = []
        operands = []
        residual = None
        for source in (first, second):
            if isinstance(source, FoldedTerm) and products_fit(*source.folded.weight.shape):
                operands.append(self._operand(source.operand)[i:j])
                terms += [operands[-1], source.folded.weight.t()]
            else:
                residual = self._value_chunk(source, i, j)
                terms += [None, None]
        depth = sum(operand.shape[1] for operand in operands)
        workspace = self._lend_product(out, depth)
        _passes.product_residual_relu_(*terms, shift, residual, out, mask, workspace)

    # Backward.

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
        if mean_d is None or weight_cov is None or not products_fit(weight.shape[1]):
            arguments = weight, gamma, invstd, offset, centre, mean_d, weight_cov, a, s, sum_g
            return super().fold_backward(*arguments, count)
        rows = _rows(weight)
        state = _single(gamma), invstd, offset, mean_d, weight_cov
        workspace = self._lend_product(rows, rows.shape[1])
        wide = a.float()
        grads = _passes.fold_backward_(rows, *state, wide, s, sum_g, count, workspace)
        dgamma, b, shift = grads
        if a.dtype != torch.float32:
            b = b.to(a.dtype)
            shift = algebra.operand_shift(wide, b, sum_g, mean_d, count)
        return FoldBackward(s, dgamma, torch.zeros_like(sum_g), OperandGrad(a, b, shift))

    def tail_wgrad(
        self, grad: MaskedGrad, operands: Sequence[Operand], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        if not all(products_fit(*a.shape) for a in weights):
            return super().tail_wgrad(grad, operands, weights)
        sum_g, products = grad.grad_out.new_empty(0), []
        for operand, a in zip(operands, weights, strict=True):
            d = self._operand(operand)
            kept = self._products[operand_key(operand)] = self._scratch(d)
            workspace = self._lend_product(d, a.shape[0])
            sum_g, s = _passes.masked_products_(grad.grad_out, grad.mask, d, a, kept, workspace)
            products.append(s)
        return sum_g, products

    def tail_dgrad(
        self, grad: MaskedGrad, act: Activation, coefficients: OperandGrad, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        if coefficients.b is None or not products_fit(act.y.shape[1]):
            return super().tail_dgrad(grad, act, coefficients, invstd)
        product = self._products[operand_key(act)]
        return self._product_reduce(
            self._operand(act), coefficients.b, product, coefficients.shift, act, invstd
        )

    def _product_reduce(
        self,
        a: Tensor,
        weight: Tensor,
        addend: Tensor | None,
        shift: Tensor | None,
        act: Activation,
        invstd: Tensor,
    ) -> tuple[Tensor, GradSums]:
        """``g = (a weight + addend + shift) * [act > 0]`` and its two sums."""
        g = self._scratch(act.y)
        sums = _passes.product_bn_backward_reduce_(
            a,
            weight,
            addend,
            shift,
            act.y,
            act.mean,
            invstd,
            act.scale,
            act.beta,
            g,
            self._lend_product(a, weight.shape[1]),
        )
        return g, GradSums(*sums)

    def conv_dgrad(
        self, grad: ConvGrad, weight: Tensor, geometry: Geometry, act: Activation, invstd: Tensor
    ) -> tuple[Tensor, GradSums]:
        if self._takes_winograd(grad, weight, geometry):
            g = self._scratch(act.y)
            self._winograd(self._conv_grad(grad), (), weight, geometry.stride[0], True, g)
            return g, self._reduce(g, None, None, act, invstd, g)
        if not _is_product(weight, geometry) or geometry.stride != (1, 1):
            return super().conv_dgrad(grad, weight, geometry, act, invstd)
        dy = self._conv_grad(grad)
        return self._product_reduce(dy, weight.flatten(1), None, None, act, invstd)

    def conv_wgrad(
        self, grad: ConvGrad, source: Tensor | Activation, weight: Tensor, geometry: Geometry
    ) -> Tensor:
        if self._takes_winograd(grad, weight, geometry):
            x, prologue = self._on_load(source)
            return self._winograd_weight_grad(
                self._conv_grad(grad), x, prologue, geometry.stride[0]
            )
        if not _is_product(weight, geometry):
            return super().conv_wgrad(grad, source, weight, geometry)
        dy, operand = self._conv_grad(grad), self._seen(source, geometry)
        workspace = self._lend_product(dy, operand.shape[1])
        return _passes.transposed_product(dy, operand, workspace).view_as(weight)

    def _takes_winograd(self, grad: ConvGrad, weight: Tensor, geometry: Geometry) -> bool:
        """Whether a gradient does; of batch statistics only, as its convolution."""
        winograd = grad.k0 is not None and _is_winograd(weight, geometry)
        return winograd and uses_winograd(grad.y.shape)

    def _winograd_weight_grad(
        self, dy: Tensor, x: Tensor, prologue: Prologue, stride: int
    ) -> Tensor:
        workspace = self._lend_winograd(dy, x.shape[1], stride, False)
        arguments = _nhwc(dy), _nhwc(x), stride, workspace
        return _passes.winograd_weight_grad(*arguments, *prologue).permute(0, 3, 1, 2)

    def _conv_input_grad_into(
        self, conv: ConvTerm, identity: MaskedGrad | None, grad_x: Tensor
    ) -> None:
        if not _is_product(conv.weight, conv.geometry) or conv.geometry.stride != (1, 1):
            return super()._conv_input_grad_into(conv, identity, grad_x)
        dy, weight = self._conv_grad(conv.grad), conv.weight.flatten(1)
        workspace = self._lend_product(dy, grad_x.shape[1])
        if identity is None:
            _passes.product_(dy, weight, grad_x, workspace)
        else:
            _passes.product_masked_add_(dy, weight, *identity, grad_x, workspace)

    def _add_conv_input_grad(self, grad_x: Tensor, conv: ConvTerm) -> None:
        if not _is_product(conv.weight, conv.geometry):
            return super()._add_conv_input_grad(grad_x, conv)
        target = strided(grad_x, conv.geometry.stride)
        dy, weight = self._conv_grad(conv.grad), conv.weight.flatten(1)
        value = self._scratch(target)
        _passes.product_(dy, weight, value, self._lend_product(dy, weight.shape[1]))
        target.add_(value)

    def _add_folded_input_grad(self, grad_x: Tensor, term: InputTerm) -> None:
        operand, coefficients, _ = term
        if coefficients.b is None or not products_fit(grad_x.shape[1]):
            return super()._add_folded_input_grad(grad_x, term)
        d, product = self._operand(operand), self._products[operand_key(operand)]
        value = self._scratch(d)
        workspace = self._lend_product(d, d.shape[1])
        _passes.product_add_(d, coefficients.b, product, coefficients.shift, value, workspace)
        operand._replace(x=grad_x).view().add_(value)
