// bfloat16 with CUDA's conversions: to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t word = static_cast<uint32_t>(v.bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t word;
  std::memcpy(&word, &v, sizeof(word));
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16)};
}
