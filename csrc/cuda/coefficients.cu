// The algebra around single normalisations (algebra.py), a launch each: a few bytes a channel or
// weight, under 10 microseconds, most of it the launch. The junctions of the tail are in
// junctions.cu.
#include "coefficients.cuh"

namespace fused_bottleneck::cuda {
namespace {

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

// folded = round(gamma invstd weight), element by element. Bytes: weight, folded.
template <class T>
__global__ void __launch_bounds__(kThreads)
    folded_weight_kernel(int64_t width, int64_t channels, FoldedWeight p) {
  using A = Acc<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= width * channels) return;
  const int64_t w = i / channels;
  const A scale = parameter<A>(p.gamma, w, 1) * static_cast<const A*>(p.invstd)[w];
  static_cast<T*>(p.folded)[i] = narrow<T>(scale * widen(static_cast<const T*>(p.weight)[i]));
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

void launch_folded_weight(const Launch& where, const FoldedWeight& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    launch(folded_weight_kernel<T>, where, ceil_div(where.rows * where.channels, kThreads),
           kThreads, 0, where.rows, where.channels, p);
  });
}

}  // namespace fused_bottleneck::cuda
