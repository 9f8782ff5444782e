// The interface between the passes (threading, checks; passes.cpp) and the vector kernels.
//
// The kernels are compiled once per instruction set from kernels_impl.h. Everything declared here
// is plain data without inline functions: an inline function shared between differently compiled
// files could be emitted with AVX-512 code and then be used by the linker on every machine.
//
// A matrix is row-major [rows, channels] in the storage dtype; a vector is [channels] in the
// accumulation dtype (double for float64, float for the others). A kernel works on rows
// [begin, end). `out` may be the same memory as an input matrix, element for element.
#pragma once

#include <cstdint>

namespace fused_bottleneck::cpu {

// The last: bfloat16 matrices but for the values of a product, which are float32: y of
// residual_relu, value of masked_add and grad of bn_backward_reduce.
enum class Dtype : int { float32, float64, bfloat16, float16, bfloat16_of_values };
constexpr int kDtypes = 5;

struct ChannelMoments {
  int64_t channels;
  const void* y;
};

struct BnApply {
  int64_t channels;
  const void *y, *mean, *scale, *beta, *centre;
  bool relu;
  void* out;
};

struct ResidualRelu {
  int64_t channels;
  const void *y, *mean, *scale, *shift;
  const void* residual;  // matrix or null
  void* out;
  uint8_t* mask;
  bool stream = false;  // write `out` past the caches where its alignment allows
};

struct MaskGrad {
  int64_t channels;
  const void* grad_out;
  const uint8_t* mask;
  void* g;
};

struct MaskedAdd {
  int64_t channels;
  const void *value, *grad_out;
  const uint8_t* mask;
  void* out;
  bool stream = false;  // as above
};

struct BnBackwardReduce {
  int64_t channels;
  const void* grad;
  const void* addend;  // matrix or null
  const void *shift, *y, *mean, *invstd, *scale, *beta;
  const uint8_t* mask;  // what is live; null: what scale and beta say
  void* g;              // matrix or null
};

struct BnBackward {
  int64_t channels;
  const void *g, *y, *mean, *scale;
  const void *k0, *k1;  // both null: y is not read
  const uint8_t* mask;  // of g, or null
  void* out;
};

// Of a max pooling's output: that no element of its window is above zero.
constexpr uint8_t kNoTap = 255;

// One side of a max pooling: tap t of output o is input o * stride - padding + t * dilation, if
// there is one; every output has one.
struct PoolAxis {
  int64_t in, out, kernel, stride, padding, dilation;
};

struct PoolWindow {
  PoolAxis height, width;
};

// Rows of these three are lines of pixels: of the output in the first two, of the input in the
// last.
struct BnReluPool {
  int64_t channels;
  PoolWindow window;
  const void *y, *mean, *scale, *beta;
  void* out;
  uint8_t* index;
};

struct PoolBnBackwardReduce {
  int64_t channels;
  PoolWindow window;
  const void* grad_out;
  const uint8_t* index;
  const void *y, *mean, *invstd;
};

// Which outputs have an input in their window, as which tap: of input i, uses first[i] up to
// first[i + 1], by increasing output.
struct PoolUse {
  int64_t out, tap;
};

struct PoolUses {
  const int64_t* first;
  const PoolUse* uses;
};

struct PoolBnBackward {
  int64_t channels;
  PoolWindow window;
  PoolUses rows, columns;
  const void* grad_out;
  const uint8_t* index;
  const void *y, *mean, *scale;
  const void *k0, *k1;  // both null: y is not read
  void* out;
};

// The kernels of one dtype. Reductions write their rows' result as doubles, [channels] each.
struct Kernels {
  void (*channel_moments)(const ChannelMoments&, int64_t begin, int64_t end, double* mean,
                          double* m2);
  // Adds the moments of `rows` more rows to those of `rows_before`: Chan, Golub, LeVeque (1979).
  void (*merge_moments)(int64_t channels, int64_t rows_before, double* mean, double* m2,
                        int64_t rows, const double* more_mean, const double* more_m2);
  void (*bn_apply)(const BnApply&, int64_t begin, int64_t end);
  void (*residual_relu)(const ResidualRelu&, int64_t begin, int64_t end);
  void (*mask_grad)(const MaskGrad&, int64_t begin, int64_t end, double* sum_g);
  void (*masked_add)(const MaskedAdd&, int64_t begin, int64_t end);
  void (*bn_backward_reduce)(const BnBackwardReduce&, int64_t begin, int64_t end, double* sum_g,
                             double* sum_g_xhat);
  void (*bn_backward)(const BnBackward&, int64_t begin, int64_t end);
  void (*bn_relu_pool)(const BnReluPool&, int64_t begin, int64_t end);
  void (*pool_bn_backward_reduce)(const PoolBnBackwardReduce&, int64_t begin, int64_t end,
                                  double* sum_g, double* sum_g_xhat);
  void (*pool_bn_backward)(const PoolBnBackward&, int64_t begin, int64_t end);
};

// One table per instruction set, indexed by Dtype; constant-initialised, so that loading the
// library runs no code of an instruction set that the machine may lack.
namespace isa_default {
extern const Kernels kernels[kDtypes];
}
namespace isa_avx2 {
extern const Kernels kernels[kDtypes];
}
namespace isa_avx512 {
extern const Kernels kernels[kDtypes];
}

// The instruction set in use: the best that the CPU has, capped by the environment variable
// FUSED_BOTTLENECK_CPU_CAPABILITY (default | avx2 | avx512 | avx512_bf16). Chosen at the first
// call; throws on an unknown value of the variable.
struct ProductKernels;
struct FoldKernels;
struct WinogradKernels;
struct Capability {
  const char* name;
  const Kernels* kernels;
  const ProductKernels* products;       // null: this instruction set has none
  const ProductKernels* pair_products;  // of bfloat16; null likewise
  const FoldKernels* folds;             // null where products is
  const WinogradKernels* winograd;      // by WinogradScheme; null where products is
};
const Capability& capability();

}  // namespace fused_bottleneck::cpu
