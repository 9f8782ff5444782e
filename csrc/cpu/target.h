// Sets the instruction set that the rest of a file is compiled for: FUSED_BOTTLENECK_TARGET
// (absent: the baseline). FB_END_TARGET ends it.
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FB_PRAGMA(text) _Pragma(#text)
#if !defined(FUSED_BOTTLENECK_TARGET)
#define FB_END_TARGET
#elif defined(__clang__)
#define FB_TARGET(isa) \
  FB_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FB_END_TARGET FB_PRAGMA(clang attribute pop)
#else
#define FB_TARGET(isa) FB_PRAGMA(GCC target(isa))
#define FB_END_TARGET
#endif
#if defined(FUSED_BOTTLENECK_TARGET)
FB_TARGET(FUSED_BOTTLENECK_TARGET)
#endif
