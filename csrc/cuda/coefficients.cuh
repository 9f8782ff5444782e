// What the coefficient kernels share: a normalisation's parameters.
#pragma once

#include "device.cuh"

namespace fused_bottleneck::cuda {

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

}  // namespace fused_bottleneck::cuda
