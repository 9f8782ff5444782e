"""Every tolerance of the tests, with its argument. None is ever loosened to make a test pass.

Errors are norms of differences over norms of the float64 reference: single elements say little, as
a ReLU whose argument is near zero may open or close on a rounding.
"""

import torch

# Both sides compute in float64, u = 1.1e-16. The longest chain is three normalisations forward and
# backward; each divides by a standard deviation of order one and sums a few hundred terms, so
# that 1e-13 is typical. 1e-10 leaves room for small deviations and is far below any formula error.
FLOAT64 = 1e-10

# A gradient this much smaller than the largest one is a difference of large terms (that of a
# weight in its own direction vanishes before batch statistics): it is compared relative to
# FLOAT64_SMALL times the largest gradient, an absolute 1e-12 at order one.
FLOAT64_SMALL = 1e-2


def float64_offset(ratio: float) -> float:
    """Tolerance where a mean is ratio deviations from zero.

    The normalised value loses a factor ratio of u when the mean is subtracted, and a gradient of
    a weight multiplies that by the mean again; a hundred times that for the number of terms.
    """
    return max(FLOAT64, 100 * ratio**2 * 2.0**-53)


# In lower precision too a much smaller gradient than the largest is a difference of large terms,
# and the floor (not eager's part of the limit) is relative to this part of the largest.
SMALL_GRADIENT = 1e-3

# A constant channel has invstd = 1/sqrt(eps) = 316, which multiplies rounding noise once on the
# way forward and once on the way back.
FLOAT64_DEGENERATE = 1e-9

# The same formula in the same dtype with another order of summation, n terms: sqrt(n) u, and n is
# below 1e4 in the tests; ten times that.
SAME_FORMULA = {
    torch.float64: 1e-13,
    torch.float32: 6e-5,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}

# A tensor that is summed in float32 and stored in bfloat16: an element is rounded by at most half a
# unit of its last place, 2^-8 of itself.
BFLOAT16_STORED = 2.0**-8 + SAME_FORMULA[torch.float32]

# An element of a product of matrices in float32, relative to the product of their absolute values:
# every term is rounded to u = 2^-24, of a sum of two tf32 numbers for an operand to 2^-22 (two
# times 11 bits and a sign), and the sums of up to 100 terms to ten u more.
FLOAT32_PRODUCT = 2 * 2.0**-22 + 10 * 2.0**-24

# The criterion in lower precision: error <= EAGER_FACTOR * (eager's error) + FLOOR, in the mean
# over several seeds (helpers.assert_criterion).
EAGER_FACTOR = 1.1


# A floor, as eager may happen to be exact: two unit roundoffs of the dtype (its eps). One is the
# rounding that the stored result has anyway, one that of an operand rounded once (the centred
# operand, the folded weight) where eager rounds another tensor. In float32 the sums round as well:
# sqrt(n) units each for n = 64 terms that are added one after the other, which is four eps.
FLOORS = {
    torch.float64: FLOAT64,
    torch.float32: 4 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}

# Statistics kept for backward besides x, y1, y2 and the mask. Vectors of the accumulation dtype:
# per normalisation at most mean, invstd, scale, the centre of its operand and two more. Matrices:
# per folded 1x1 convolution its operand's covariance and the folded weight.
SAVED_VECTORS_PER_UNIT = 6
SAVED_MEMORY_RATIO = 0.55

# Losses of 20 training steps in float32 against float64, relative to the first loss. Roundings
# flip single ReLUs, each of which moves a loss by about a thousandth in a small network (measured
# for plain torch: up to 2e-3); statistics that are not updated, or a gradient left out, move it
# by a tenth and more.
LOSS_CURVE = 1e-2
