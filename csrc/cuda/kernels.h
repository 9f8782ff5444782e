// The interface between the CUDA passes (checks, memory; passes.cpp,
// coefficients.cpp) and their
// kernels (*.cu): plain data, so that nvcc never reads torch's headers.
//
// A matrix is row-major [rows, channels] in the storage dtype; a vector is [channels] in the
// accumulation dtype (double for float64, float for the others), null where it is absent. `out` may
// be the same memory as an input matrix, element for element. What ops.cpp says about relu and its
// mask holds here.
//
// Reductions are cut into parts by the shape alone and no order depends on timing: same bits from
// run to run, and on every GPU.
#pragma once

#include <cstdint>

namespace fused_bottleneck::cuda {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// Where and on what a launch works.
struct Launch {
  void* stream;  // cudaStream_t
  Dtype dtype;   // of the matrices
  int64_t rows, channels;
};

// --- Passes (pointwise.cu) ---

struct BnApply {
  const void *y, *mean, *scale, *beta, *centre;
  bool relu;
  void* out;
};
void launch_bn_apply(const Launch&, const BnApply&);

struct ResidualRelu {
  const void *y, *mean, *scale, *shift;
  const void* residual;  // matrix or null
  void* out;
  uint8_t* mask;
};
void launch_residual_relu(const Launch&, const ResidualRelu&);

struct MaskedAdd {
  const void *value, *grad_out;
  const uint8_t* mask;
  void* out;
};
void launch_masked_add(const Launch&, const MaskedAdd&);

struct BnBackward {
  const void *g, *y, *mean, *scale;
  const void *k0, *k1;  // both null: y is not read
  void* out;
};
void launch_bn_backward(const Launch&, const BnBackward&);

// --- Reductions (reductions.cu) ---

// Doubles [2, channels, parts] of workspace that a reduction over such a matrix needs.
int64_t reduction_parts(int64_t rows, int64_t channels);

struct ChannelMoments {
  const void* y;
  double* partial;
  void *mean, *m2;
};
void launch_channel_moments(const Launch&, const ChannelMoments&);

struct MaskGrad {
  const void* grad_out;
  const uint8_t* mask;
  void* g;
  double* partial;  // [1, channels, parts]
  void* sum_g;
};
void launch_mask_grad(const Launch&, const MaskGrad&);

struct BnBackwardReduce {
  const void* grad;
  const void* addend;  // matrix or null
  const void *shift, *y, *mean, *invstd, *scale, *beta;
  void* g;
  double* partial;
  void *sum_g, *sum_g_xhat;
};
void launch_bn_backward_reduce(const Launch&, const BnBackwardReduce&);

// --- Coefficients (coefficients.cu); launch.dtype is that of the weight, or of the vectors ---

// A parameter of a normalisation, of any floating dtype; null where it is absent.
struct Parameter {
  const void* data;
  Dtype dtype;
};

// rows = 1; coefficients [4, channels]: see ops.cpp.
struct BnCoefficients {
  const void *mean, *var;
  Parameter gamma, beta, bias;
  double eps;
  void* coefficients;
};
void launch_bn_coefficients(const Launch&, const BnCoefficients&);

// rows = 1; coefficients [2, channels].
struct BnBackwardCoefficients {
  const void *invstd, *sum_g, *sum_g_xhat;
  int64_t count;
  void* coefficients;
};
void launch_bn_backward_coefficients(const Launch&, const BnBackwardCoefficients&);

// Of a weight [rows, channels] = [W, K].
struct FoldedWeight {
  const void* weight;
  Parameter gamma;
  const void* invstd;
  void* folded;
};
void launch_folded_weight(const Launch&, const FoldedWeight&);

// --- Junctions of the tail (junctions.cu), of a weight [rows, channels] = [W, K] ---

// cov [K, K] is in the accumulation dtype or in double; reported [2, W], vectors [3, W].
struct Fold {
  const void *weight, *cov;
  bool is_cov_double;
  Parameter gamma, beta, bias;
  double eps;
  const void *centre, *mean_d;
  double* partial;
  void *folded, *weight_cov, *reported, *vectors;
};
// Doubles of `partial`.
int64_t fold_partials(int64_t width, int64_t channels);
void launch_fold(const Launch&, const Fold&);

// Where statistics are fixed mean_d and weight_cov are null, and workspace, b and shift unused;
// grads [2, W].
struct FoldBackward {
  const void* weight;
  Parameter gamma;
  const void *invstd, *offset, *centre, *mean_d, *weight_cov, *a, *s, *sum_g;
  int64_t count;
  void *workspace, *grad_weight, *grads, *b, *shift;
};
// Elements of `workspace`, in the accumulation dtype.
int64_t fold_backward_workspace(int64_t width, int64_t channels);
void launch_fold_backward(const Launch&, const FoldBackward&);

}  // namespace fused_bottleneck::cuda
