"""Each formula of algebra.py against float64 autograd of the plain operations."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_bottleneck
from fused_bottleneck import algebra

Q, K, W = 23, 5, 7
EPS = 1e-3
batch_or_fixed = pytest.mark.parametrize("batch", [True, False])


class Folded:
    """``z = BN(a weight^T)`` with autograd, and everything the formulas start from."""

    def __init__(self, batch: bool) -> None:
        def randn(*size: int) -> Tensor:
            return torch.randn(*size, dtype=torch.float64)

        self.batch = batch
        self.centre = randn(K)
        self.a = (randn(Q, K) + self.centre).requires_grad_()
        self.weight = randn(W, K).requires_grad_()
        self.gamma = (1 + randn(W) / 4).requires_grad_()
        self.beta = randn(W).requires_grad_()
        self.g = randn(Q, W)
        fixed = (randn(W), randn(W).exp())
        y = self.a @ self.weight.t()
        self.mean, self.var = (y.mean(0), y.var(0, correction=0)) if batch else fixed
        invstd = (self.var + EPS).rsqrt()
        self.z = (y - self.mean) * invstd * self.gamma + self.beta
        inputs = (self.a, self.weight, self.gamma, self.beta)
        grads = torch.autograd.grad(self.z, inputs, self.g)
        self.grad_a, self.grad_weight, self.grad_gamma, self.grad_beta = grads
        self.y, self.xhat = y.detach(), ((y - self.mean) * invstd).detach()
        self.d = (self.a - self.centre).detach()
        self.mean_d = self.d.mean(0) if batch else None
        centred = self.d - self.d.mean(0)
        self.cov = centred.t() @ centred / Q if batch else None
        self.w = self.weight.detach()
        self.invstd = invstd.detach()
        self.scale = (self.gamma * invstd).detach()
        self.s, self.sum_g = self.g.t() @ self.d, self.g.sum(0)
        fixed_mean = None if batch else self.mean
        self.offset = algebra.folded_offset(self.w, self.centre, self.mean_d, fixed_mean)


def assert_equal(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-12, atol=1e-12)


def test_accumulation_dtype() -> None:
    assert algebra.accumulation_dtype(torch.float64) == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert algebra.accumulation_dtype(dtype) == torch.float32


def test_scale_and_centre() -> None:
    var, gamma = torch.rand(W).double(), torch.randn(W)
    invstd = algebra.inverse_std(var, EPS)
    assert_equal(invstd, 1 / (var + EPS).sqrt())
    assert_equal(algebra.bn_scale(gamma, invstd), gamma.double() * invstd)
    assert_equal(algebra.bn_scale(None, invstd), invstd)
    assert_equal(algebra.relu_of_shift(gamma, invstd), gamma.clamp_min(0).double())
    assert not algebra.relu_of_shift(None, invstd).any()


@batch_or_fixed
def test_bn_backward(batch: bool) -> None:
    y = torch.randn(Q, W, dtype=torch.float64, requires_grad=True)
    g, gamma = torch.randn(Q, W).double(), torch.randn(W).double()
    mean, var = y.mean(0), y.var(0, correction=0)
    if not batch:
        mean, var = mean.detach(), var.detach()
    invstd = (var + EPS).rsqrt()
    xhat = (y - mean) * invstd
    (want,) = torch.autograd.grad(xhat * gamma, y, g)
    mean, invstd, xhat = mean.detach(), invstd.detach(), xhat.detach()
    scale = gamma * invstd
    sums = (g.sum(0), (g * xhat).sum(0))
    got = algebra.bn_backward_coefficients(scale, invstd, *sums, Q, batch)
    assert (got.k0 is None, got.k1 is None) == (not batch, not batch)
    k0, k1 = (got.k0, got.k1) if batch else (0.0, 0.0)
    assert_equal(got.scale * (g - k0 - (y.detach() - mean) * k1), want)


def test_folded_variance() -> None:
    case = Folded(True)
    assert case.cov is not None
    assert_equal(algebra.folded_variance(case.w, case.w @ case.cov), case.var)


def test_folded_variance_is_clamped() -> None:
    weight = torch.tensor([[1.0, 1.0]])
    cov = torch.tensor([[1.0, -1.1], [-1.1, 1.0]])
    assert not algebra.folded_variance(weight, weight @ cov).any()


@batch_or_fixed
def test_folded_offset(batch: bool) -> None:
    case = Folded(batch)
    assert_equal(case.invstd * (case.d @ case.w.t() + case.offset), case.xhat)


def test_folded_offset_of_large_means() -> None:
    """``weight centre - mean`` of nearly equal terms in float32: taken in float64."""
    weight, centre = torch.ones(1, K), torch.full((K,), 1e6)
    mean = torch.tensor([5e6 - 1])
    assert algebra.folded_offset(weight, centre, None, mean).item() == 1.0


@batch_or_fixed
def test_fold(batch: bool) -> None:
    case = Folded(batch)
    args = (case.w, case.scale, case.offset)
    folded = algebra.fold(*args, case.beta.detach(), case.mean_d, torch.float64)
    assert_equal(case.d @ folded.weight.t() + folded.shift, case.z)
    folded = algebra.fold(*args, None, case.mean_d, torch.float64)
    assert_equal(case.d @ folded.weight.t() + folded.shift + case.beta, case.z)


def test_fold_into_a_rounded_weight_keeps_the_mean() -> None:
    """The mean of the output is beta, though the folded weight is rounded to bfloat16."""
    case = Folded(True)
    args = (case.w, case.scale, case.offset, case.beta.detach(), case.mean_d)
    folded = algebra.fold(*args, torch.bfloat16)
    assert folded.weight.dtype == torch.bfloat16
    assert_equal((case.d @ folded.weight.double().t() + folded.shift).mean(0), case.beta)


@batch_or_fixed
def test_folded_gradients(batch: bool) -> None:
    case = Folded(batch)
    assert_equal(case.sum_g, case.grad_beta)
    dgamma = algebra.folded_dgamma(case.w, case.invstd, case.offset, case.s, case.sum_g)
    assert_equal(dgamma, case.grad_gamma)
    dweight = algebra.folded_dweight(
        case.scale,
        case.invstd,
        case.centre,
        case.mean_d,
        None if case.cov is None else case.w @ case.cov,
        case.s.clone(),
        case.sum_g,
        dgamma,
    )
    assert_equal(dweight, case.grad_weight)
    a = algebra.folded_weight(case.w, case.scale, torch.float64)
    got = algebra.folded_operand_grad(
        case.w, a, case.scale, case.invstd, case.mean_d, case.sum_g, dgamma, Q
    )
    assert (got.b is None, got.shift is None) == (not batch, not batch)
    grad_a = case.g @ got.a
    if got.b is not None and got.shift is not None:
        grad_a = grad_a + case.d @ got.b + got.shift
    assert_equal(grad_a, case.grad_a)


@pytest.mark.parametrize("split", [(23,), (14, 9), (5, 0, 18)], ids=str)
def test_synchronised_dweight(split: tuple[int, ...]) -> None:
    """Each part's own gradient, where the statistics are those of all parts together."""

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64)

    weight, gamma, a, g = randn(W, K), 1 + randn(W) / 4, randn(Q, K) + 1, randn(Q, W)
    parts = list(zip(a.split(split), g.split(split), strict=True))
    weights = [weight.clone().requires_grad_() for _ in parts]
    biases = [torch.zeros(W, dtype=torch.float64, requires_grad=True) for _ in parts]
    outputs = [x @ w.t() + b for (x, _), w, b in zip(parts, weights, biases, strict=True)]
    y = torch.cat(outputs)
    mean, invstd = y.mean(0), algebra.inverse_std(y.var(0, correction=0), EPS)
    xhat = (y - mean) * invstd
    (gamma * xhat).backward(g)
    invstd, dgamma = invstd.detach(), (g * xhat).sum(0).detach()
    for (x, own), w, b in zip(parts, weights, biases, strict=True):
        centre, fraction = randn(K), len(x) / Q
        d = x - centre
        local = d.mean(0) if len(x) else torch.zeros_like(centre)
        mean_d = a.mean(0) - centre
        weight_cov = weight @ (d.t() @ d / max(len(x), 1) - torch.outer(local, local))
        statistics = (mean_d, weight_cov, local - mean_d)
        sums = (own.t() @ d, own.sum(0), fraction * g.sum(0), fraction * dgamma)
        dweight, sum_dy = algebra.synchronised_dweight(
            weight, gamma * invstd, invstd, centre, *statistics, *sums
        )
        torch.testing.assert_close(dweight, w.grad)
        torch.testing.assert_close(sum_dy, b.grad)


SUFFIXES = ("py", "cpp", "cu", "cuh", "h")  # of files, not names in a module


def test_names_in_the_derivation_exist() -> None:
    """`module.function` in docs/algebra.md, of this package's modules."""
    text = (Path(__file__).parents[1] / "docs" / "algebra.md").read_text()
    names = re.findall(r"\b([a-z_]+)\.(_?[a-z]\w+)\b", text)
    modules = {path.stem for path in Path(fused_bottleneck.__file__).parent.glob("*.py")}
    found = [(module, name) for module, name in names if module in modules and name not in SUFFIXES]
    assert len(found) >= 8
    for module, name in found:
        assert hasattr(import_module(f"fused_bottleneck.{module}"), name), f"{module}.{name}"
