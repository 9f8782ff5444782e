// In place of csrc/cuda/runtime.cpp: the emulated device has no streams.
#include <cstdint>

namespace fused_bottleneck::cuda {

void* current_stream(int32_t) { return nullptr; }

}  // namespace fused_bottleneck::cuda
