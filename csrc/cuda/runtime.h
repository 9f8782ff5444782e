// A call's place on the GPU: device, stream, memory.
#pragma once

#include <cuda_runtime_api.h>

#include "../arguments.h"
#include "kernels.h"

namespace fused_bottleneck::cuda {

// torch's current stream of a device, as a cudaStream_t.
void* current_stream(int32_t device);

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

// Makes a device the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    check(cudaGetDevice(&previous_));
    if (previous_ != device) check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

inline Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      return Dtype::float32;
  }
}

// kernel(launch, call) on torch's current stream of the arguments' device.
template <class Call>
void run(void (*kernel)(const Launch&, const Call&), const Arguments& args, const Call& call) {
  const DeviceGuard guard(args.device());
  kernel({current_stream(args.device()), dtype_of(args.dtype), args.rows, args.channels}, call);
}

}  // namespace fused_bottleneck::cuda
