// advise_huge_pages_: a fresh 50 MB tensor costs more in page faults than the pass that fills it.
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "../stable_utils.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_bottleneck::cpu {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
// Below this most of the storage is outside of whole huge pages.
constexpr int64_t kMinBytes = int64_t{4} << 20;

// Advises the whole huge pages inside the storage of t. The kernel may refuse (transparent huge
// pages off, foreign memory); that costs speed only, so the result is not looked at.
void advise_huge_pages_(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  if (bytes < kMinBytes) return;
  const auto data = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t storage = data - t.storage_offset() * t.element_size();
  const uintptr_t begin = (storage + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (storage + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("advise_huge_pages_", TORCH_BOX(&advise_huge_pages_));
}

}  // namespace fused_bottleneck::cpu
