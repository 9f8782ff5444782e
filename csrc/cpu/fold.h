// The interface between the folds of fold.cpp and their kernels (fold_impl.h); plain data only, as
// in kernels.h. float32, sums in double; channels in multiples of kChannelMultiple.
#pragma once

#include <cstdint>

namespace fused_bottleneck::cpu {

// A normalisation with batch statistics, folded into a weight [rows, channels]; see
// algebra.fold_product. A vector is [rows] but for the operand's variances, centre and mean_d
// [channels]. gamma, beta and bias may be null.
struct Fold {
  int64_t channels;
  const float *weight, *weight_cov;
  const float *variances, *centre, *mean_d;
  const float *gamma, *beta, *bias;
  double eps;
  float *folded, *mean, *var, *invstd, *offset, *shift;
};

// Its gradients, see algebra.fold_backward: from s = g^T d [rows, channels], which becomes the
// weight's; dgamma, and factors = -scale invstd dgamma / count.
struct FoldBackward {
  int64_t channels, count;
  const float *weight, *gamma, *invstd, *offset, *mean_d, *weight_cov, *sum_g;
  float *s, *dgamma, *factors;
};

// sums[c] -= coefficients[row] * matrix[row][c], over all rows, for channels [begin, end).
struct SubtractRows {
  int64_t rows, channels;
  const float *matrix, *coefficients;
  double* sums;
};

// For rows [begin, end) unless it says channels; those in multiples of kChannelMultiple.
struct FoldKernels {
  // Returns the largest ratio of what a variance would be, did the operand's channels not go
  // together, to what it is.
  double (*fold)(const Fold&, int64_t begin, int64_t end);
  void (*fold_backward)(const FoldBackward&, int64_t begin, int64_t end);
  void (*subtract_rows)(const SubtractRows&, int64_t begin, int64_t end);
};

namespace isa_avx2 {
extern const FoldKernels fold_kernels;
}
namespace isa_avx512 {
extern const FoldKernels fold_kernels;
}

}  // namespace fused_bottleneck::cpu
