#include "runtime.h"

#include <dlfcn.h>

namespace fused_bottleneck::cuda {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// From torch's library for CUDA, which is loaded wherever there are CUDA tensors. Not linked, so
// that this library loads with every torch; its own handle, as its symbols are not global.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  STD_TORCH_CHECK(symbol != nullptr,
                  "fused_bottleneck: this torch has no CUDA streams (libtorch_cuda.so is not "
                  "loaded, or lacks aoti_torch_get_current_cuda_stream)");
  return reinterpret_cast<CurrentStream>(symbol);
}

}  // namespace

void* current_stream(int32_t device) {
  static const CurrentStream find = find_current_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(find(device, &stream));
  return stream;
}

}  // namespace fused_bottleneck::cuda
