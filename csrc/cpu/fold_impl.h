// The kernels of fold.h, for one instruction set. Included by kernels_impl.h after products_impl.h.
#pragma once

#include <cmath>

#include "fold.h"

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

constexpr int kDoubles = kVector / 2;

FB_INLINE DoubleVector load_wide(const float* from) {
  return __builtin_convertvector((read<Value<float, kDoubles>>(from)), DoubleVector);
}

FB_INLINE double lanes_sum(DoubleVector v) {
  double lanes[kDoubles], total = 0;
  write(lanes, v);
  for (const double lane : lanes) total += lane;
  return total;
}

// The sum over channels of a * b.
FB_INLINE double dot(const float* a, const float* b, int64_t channels) {
  DoubleVector even{}, odd{};
  for (int64_t c = 0; c < channels; c += 2 * kDoubles) {
    even += load_wide(a + c) * load_wide(b + c);
    odd += load_wide(a + c + kDoubles) * load_wide(b + c + kDoubles);
  }
  return lanes_sum(even + odd);
}

// The sum over channels of a * a * b.
FB_INLINE double square_dot(const float* a, const float* b, int64_t channels) {
  DoubleVector total{};
  for (int64_t c = 0; c < channels; c += kDoubles) {
    const DoubleVector v = load_wide(a + c);
    total += v * v * load_wide(b + c);
  }
  return lanes_sum(total);
}

FB_INLINE float or_value(const float* vector, int64_t row, float value) {
  return vector == nullptr ? value : vector[row];
}

double fold(const Fold& p, int64_t begin, int64_t end) {
  double cancellation = 0;
  for (int64_t row = begin; row < end; ++row) {
    const float* weight = p.weight + row * p.channels;
    float* folded = p.folded + row * p.channels;
    const double product = dot(weight, p.weight_cov + row * p.channels, p.channels);
    const double var = product > 0 || std::isnan(product) ? product : 0;
    const double ratio = square_dot(weight, p.variances, p.channels) / var;
    if (ratio > cancellation) cancellation = ratio;
    const double mean_d = dot(weight, p.mean_d, p.channels);
    const double mean = mean_d + dot(weight, p.centre, p.channels);
    const float invstd = static_cast<float>(1 / std::sqrt(var + p.eps));
    const float scale = or_value(p.gamma, row, 1) * invstd;
    for (int64_t c = 0; c < p.channels; c += kVector)
      store(Float{}, folded + c, load(Float{}, weight + c) * scale);
    p.mean[row] = static_cast<float>(mean) + or_value(p.bias, row, 0);
    p.var[row] = static_cast<float>(var);
    p.invstd[row] = invstd;
    p.offset[row] = static_cast<float>(-mean_d);
    p.shift[row] = static_cast<float>(or_value(p.beta, row, 0) - dot(folded, p.mean_d, p.channels));
  }
  return cancellation;
}

void fold_backward(const FoldBackward& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * p.channels;
    const float invstd = p.invstd[row], sum_g = p.sum_g[row];
    const float scale = or_value(p.gamma, row, 1) * invstd;
    const double product = dot(p.s + at, p.weight + at, p.channels);
    const auto dgamma =
        static_cast<float>(invstd * (product + static_cast<double>(p.offset[row]) * sum_g));
    const float covariance = dgamma * invstd;
    for (int64_t c = 0; c < p.channels; c += kVector) {
      const FloatVector centred = load(Float{}, p.s + at + c) - load(Float{}, p.mean_d + c) * sum_g;
      store(Float{}, p.s + at + c,
            (centred - load(Float{}, p.weight_cov + at + c) * covariance) * scale);
    }
    p.dgamma[row] = dgamma;
    p.factors[row] = -scale * invstd * dgamma / static_cast<float>(p.count);
  }
}

void subtract_rows(const SubtractRows& p, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const double coefficient = p.coefficients[row];
    const float* from = p.matrix + row * p.channels;
    for (int64_t c = begin; c < end; c += kDoubles)
      write(p.sums + c, read<DoubleVector>(p.sums + c) - load_wide(from + c) * coefficient);
  }
}

const FoldKernels fold_kernels = {fold, fold_backward, subtract_rows};

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA
