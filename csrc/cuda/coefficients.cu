// The algebra between the stages (algebra.py), a launch per junction. The matrix products of a
// junction are not here: W cov and W^T diag(k) W have 2 W K^2 operations each, 1.1 GFLOP at the
// last stage of ResNet-50, which is a tiled product's work. What is left is a few bytes a weight
// (W K < 2^20): under 10 microseconds, most of it the launch.
#include "device.cuh"

namespace fused_bottleneck::cuda {
namespace {

constexpr int kRowThreads = 128;
constexpr int kColumns = 16;  // of operand_shift: 32 bytes of a 16-bit row
constexpr int kColumnLines = 32;

// Element i of a parameter, or what stands for an absent one.
template <class A>
__device__ A parameter(const Parameter& p, int64_t i, A absent) {
  if (p.data == nullptr) return absent;
  switch (p.dtype) {
    case Dtype::float64:
      return static_cast<A>(static_cast<const double*>(p.data)[i]);
    case Dtype::bfloat16:
      return static_cast<A>(widen(static_cast<const __nv_bfloat16*>(p.data)[i]));
    case Dtype::float16:
      return static_cast<A>(widen(static_cast<const __half*>(p.data)[i]));
    default:
      return static_cast<A>(static_cast<const float*>(p.data)[i]);
  }
}

__device__ inline float inverse_std(float var, double eps) {
  return 1.0f / sqrtf(var + static_cast<float>(eps));
}
__device__ inline double inverse_std(double var, double eps) { return rsqrt(var + eps); }

template <class A>
__global__ void __launch_bounds__(kThreads) bn_coefficients_kernel(int64_t n, BnCoefficients p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= n) return;
  const A mean = static_cast<const A*>(p.mean)[c];
  const A invstd = inverse_std(static_cast<const A*>(p.var)[c], p.eps);
  A* out = static_cast<A*>(p.coefficients) + c;
  out[0] = invstd;
  out[n] = parameter<A>(p.gamma, c, 1) * invstd;
  out[2 * n] = parameter<A>(p.beta, c, 0);
  out[3 * n] = mean + parameter<A>(p.bias, c, 0);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    bn_backward_coefficients_kernel(int64_t n, BnBackwardCoefficients p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= n) return;
  const A count = static_cast<A>(p.count);
  A* out = static_cast<A*>(p.coefficients) + c;
  out[0] = static_cast<const A*>(p.sum_g)[c] / count;
  out[n] = static_cast<const A*>(p.invstd)[c] * static_cast<const A*>(p.sum_g_xhat)[c] / count;
}

// The sum of the block's values, in every thread; kRowThreads threads.
template <class A>
__device__ A row_sum(A value) {
  A* shared = reinterpret_cast<A*>(shared_memory);
  __syncthreads();
  shared[threadIdx.x] = value;
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  __syncthreads();
  return shared[0];
}

// A block owns an output channel, a row of the weight. Bytes an element: weight, product, folded.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    fold_rows_kernel(int64_t width, int64_t channels, FoldRows p) {
  using A = Acc<T>;
  const int64_t w = blockIdx.x;
  const T* weight = static_cast<const T*>(p.weight) + w * channels;
  const A* product = static_cast<const A*>(p.product) + w * channels;
  const A* centre = static_cast<const A*>(p.centre);
  const A* mean_d = static_cast<const A*>(p.mean_d);
  T* folded = static_cast<T*>(p.folded) + w * channels;
  A var = 0, mean = 0, offset = 0;
  for (int64_t k = threadIdx.x; k < channels; k += kRowThreads) {
    const A v = widen(weight[k]);
    var += product[k] * v;
    mean += v * (mean_d[k] + centre[k]);
    offset -= v * mean_d[k];
  }
  var = row_sum(var);
  mean = row_sum(mean);
  offset = row_sum(offset);
  if (var < A(0)) var = 0;  // NaN stays
  A* vectors = static_cast<A*>(p.vectors) + w;
  if (threadIdx.x == 0) {
    vectors[0] = mean;
    vectors[width] = var;
    vectors[3 * width] = offset;
  }
  const A invstd = inverse_std(var, p.eps);
  const A scale = parameter<A>(p.gamma, w, 1) * invstd;
  A shift = 0;
#pragma unroll 1  // four steps at most, and unrolled the float64 kernel spills
  for (int64_t k = threadIdx.x; k < channels; k += kRowThreads) {
    folded[k] = narrow<T>(scale * widen(weight[k]));
    shift -= widen(folded[k]) * mean_d[k];
  }
  shift = row_sum(shift) + parameter<A>(p.beta, w, 0);
  if (threadIdx.x != 0) return;
  vectors[2 * width] = invstd;
  vectors[4 * width] = shift;
}

// A block owns a row. Bytes an element: weight, S, product, grad_weight, scaled.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    fold_backward_rows_kernel(int64_t channels, FoldBackwardRows p) {
  using A = Acc<T>;
  const int64_t w = blockIdx.x;
  const T* weight = static_cast<const T*>(p.weight) + w * channels;
  const A* s = static_cast<const A*>(p.s) + w * channels;
  T* grad_weight = static_cast<T*>(p.grad_weight) + w * channels;
  A dot = 0;
  for (int64_t k = threadIdx.x; k < channels; k += kRowThreads) dot += s[k] * widen(weight[k]);
  dot = row_sum(dot);
  const A sum_g = static_cast<const A*>(p.sum_g)[w];
  const A invstd = static_cast<const A*>(p.invstd)[w];
  const A dgamma = invstd * (dot + static_cast<const A*>(p.offset)[w] * sum_g);
  const A scale = parameter<A>(p.gamma, w, 1) * invstd;
  if (threadIdx.x == 0) static_cast<A*>(p.dgamma)[w] = dgamma;
  if (p.product == nullptr) {
    const A* centre = static_cast<const A*>(p.centre);
    for (int64_t k = threadIdx.x; k < channels; k += kRowThreads)
      grad_weight[k] = narrow<T>(scale * (s[k] + sum_g * centre[k]));
    return;
  }
  const A* product = static_cast<const A*>(p.product) + w * channels;
  const A* mean_d = static_cast<const A*>(p.mean_d);
  A* scaled = static_cast<A*>(p.scaled) + w * channels;
  const A factor = scale * invstd * dgamma / static_cast<A>(p.count);
  for (int64_t k = threadIdx.x; k < channels; k += kRowThreads) {
    const A grad = s[k] - sum_g * mean_d[k] - dgamma * invstd * product[k];
    grad_weight[k] = narrow<T>(scale * grad);
    scaled[k] = -factor * widen(weight[k]);
  }
}

// shift = -(sum_g / count) a - mean_d b. A block owns kColumns channels, a thread every
// kColumnLines-th row of one. Bytes: a and b.
template <class T>
__global__ void __launch_bounds__(kColumns* kColumnLines)
    operand_shift_kernel(int64_t width, int64_t channels, OperandShift p) {
  using A = Acc<T>;
  A* shared = reinterpret_cast<A*>(shared_memory);
  const int column = threadIdx.x % kColumns;
  const int line = threadIdx.x / kColumns;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  const A* sum_g = static_cast<const A*>(p.sum_g);
  const A* mean_d = static_cast<const A*>(p.mean_d);
  const A count = static_cast<A>(p.count);
  A total = 0;
  if (k < channels) {
#pragma unroll 4
    for (int64_t w = line; w < width; w += kColumnLines)
      total += sum_g[w] * widen(a[w * channels + k]);
    total /= count;
#pragma unroll 4
    for (int64_t i = line; i < channels; i += kColumnLines)
      total += mean_d[i] * widen(b[i * channels + k]);
  }
  shared[threadIdx.x] = total;
  __syncthreads();
  if (line != 0 || k >= channels) return;
  for (int other = 1; other < kColumnLines; ++other) total += shared[other * kColumns + column];
  static_cast<A*>(p.shift)[k] = -total;
}

// body(A{}) for the accumulation type of a dtype.
template <class Body>
void with_accumulator(Dtype dtype, const Body& body) {
  return dtype == Dtype::float64 ? body(double{}) : body(float{});
}

}  // namespace

void launch_bn_coefficients(const Launch& where, const BnCoefficients& p) {
  with_accumulator(where.dtype, [&](auto element) {
    launch(bn_coefficients_kernel<decltype(element)>, where, ceil_div(where.channels, kThreads),
           kThreads, 0, where.channels, p);
  });
}

void launch_bn_backward_coefficients(const Launch& where, const BnBackwardCoefficients& p) {
  with_accumulator(where.dtype, [&](auto element) {
    launch(bn_backward_coefficients_kernel<decltype(element)>, where,
           ceil_div(where.channels, kThreads), kThreads, 0, where.channels, p);
  });
}

void launch_fold_rows(const Launch& where, const FoldRows& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    launch(fold_rows_kernel<T>, where, where.rows, kRowThreads, kRowThreads * sizeof(Acc<T>),
           where.rows, where.channels, p);
  });
}

void launch_fold_backward_rows(const Launch& where, const FoldBackwardRows& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    launch(fold_backward_rows_kernel<T>, where, where.rows, kRowThreads,
           kRowThreads * sizeof(Acc<T>), where.channels, p);
  });
}

void launch_operand_shift(const Launch& where, const OperandShift& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kBlock = kColumns * kColumnLines;
    launch(operand_shift_kernel<T>, where, ceil_div(where.channels, kColumns), kBlock,
           kBlock * sizeof(Acc<T>), where.rows, where.channels, p);
  });
}

}  // namespace fused_bottleneck::cuda
