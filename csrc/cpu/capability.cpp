#include <cstdlib>
#include <stdexcept>
#include <string>

#include "fold.h"
#include "kernels.h"
#include "products.h"
#include "winograd.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_bottleneck::cpu {
namespace {

// In ascending order; a machine that has one has all before it.
constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};
constexpr int kLevels = 4;

#if defined(__x86_64__)
constexpr unsigned kBf16Bit = 1u << 5;  // AVX512_BF16 in eax of leaf 7, subleaf 1
#endif

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  // Not all supported compilers know "f16c" as a name in __builtin_cpu_supports.
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return 1;
  const bool bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kBf16Bit) != 0;
  return bf16 ? 3 : 2;
#else
  return 0;
#endif
}

int requested_level() {
  const char* variable = std::getenv("FUSED_BOTTLENECK_CPU_CAPABILITY");
  if (variable == nullptr || *variable == '\0') return kLevels - 1;
  for (int level = 0; level < kLevels; ++level)
    if (std::string(variable) == kNames[level]) return level;
  throw std::runtime_error(
      "FUSED_BOTTLENECK_CPU_CAPABILITY: expected default, avx2, avx512 or avx512_bf16, got '" +
      std::string(variable) + "'");
}

Capability choose() {
  const int best = best_level(), requested = requested_level();
  const int level = requested < best ? requested : best;
#if defined(__x86_64__)
  const Kernels* const tables[] = {isa_default::kernels, isa_avx2::kernels, isa_avx512::kernels,
                                   isa_avx512::kernels};
  const ProductKernels* const products[] = {nullptr, &isa_avx2::product_kernels,
                                            &isa_avx512::product_kernels,
                                            &isa_avx512::product_kernels};
  const ProductKernels* const pairs[] = {nullptr, nullptr, nullptr,
                                         &isa_avx512_bf16::product_kernels};
  const FoldKernels* const folds[] = {nullptr, &isa_avx2::fold_kernels, &isa_avx512::fold_kernels,
                                      &isa_avx512::fold_kernels};
  const WinogradKernels* const winograd[] = {nullptr, isa_avx2::winograd_kernels,
                                             isa_avx512::winograd_kernels,
                                             isa_avx512::winograd_kernels};
#else
  const Kernels* const tables[] = {isa_default::kernels};
  const ProductKernels* const products[] = {nullptr};
  const ProductKernels* const pairs[] = {nullptr};
  const FoldKernels* const folds[] = {nullptr};
  const WinogradKernels* const winograd[] = {nullptr};
#endif
  return {kNames[level], tables[level], products[level],
          pairs[level],  folds[level],  winograd[level]};
}

}  // namespace

const Capability& capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace fused_bottleneck::cpu
