// advise_huge_pages_: a fresh 50 MB tensor costs more in page faults than the pass that fills it.
// discard_pages_: memory goes back to the system, wherever in the allocator's heap it lies.
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
// pages off, foreign memory); that costs speed or memory only, so the result is not looked at.
void advise(const Tensor& t, const void* data, int advice) {
#if defined(__linux__)
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  if (bytes < kMinBytes) return;
  const uintptr_t storage =
      reinterpret_cast<uintptr_t>(data) - t.storage_offset() * t.element_size();
  const uintptr_t begin = (storage + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (storage + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
#endif
}

void advise_huge_pages_(const Tensor& t) {
#if defined(MADV_HUGEPAGE)
  advise(t, t.const_data_ptr(), MADV_HUGEPAGE);
#endif
}

// What the storage held is lost: anonymous memory reads as zero then. Its data pointer is taken as
// by one who writes, which parts it from a lazy clone's.
void discard_pages_(const Tensor& t) {
#if defined(MADV_DONTNEED)
  advise(t, t.mutable_data_ptr(), MADV_DONTNEED);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("advise_huge_pages_", TORCH_BOX(&advise_huge_pages_));
  m.impl("discard_pages_", TORCH_BOX(&discard_pages_));
}

}  // namespace fused_bottleneck::cpu
