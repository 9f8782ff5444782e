// The panels of the 1x1 products, whatever a word of them holds. Included by single_impl.h and
// pairs_impl.h. See products.h for the layouts.
#pragma once

#include "products.h"

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

using Float = FullLanes<float>;
using FloatVector = Value<float, Float::count>;
constexpr int kVector = Float::count;
using DoubleVector = Value<double, kVector / 2>;
constexpr int kWide = 2 * kVector;

static_assert(kChannelMultiple % kVector == 0 && kChannelMultiple % kLeft == 0);

// body(Vectors, channel) for every right panel of [0, channels).
template <class Body>
FB_INLINE void for_each_panel(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kWide <= channels; c += kWide) body(std::integral_constant<int, 2>{}, c);
  for (; c < channels; c += kVector) body(std::integral_constant<int, 1>{}, c);
}

// Lanes [half * kLeft, (half + 1) * kLeft) of every half, to panels that are `apart` floats apart.
FB_INLINE void write_left(float* out, int64_t apart, FloatVector v) {
#if FUSED_BOTTLENECK_VECTOR_BYTES == 64
  _mm256_storeu_ps(out, _mm512_castps512_ps256((__m512)v));
  _mm256_storeu_ps(out + apart, _mm512_extractf32x8_ps((__m512)v, 1));
#else
  write(out, v);
#endif
}

// Rows or products that are summed one after the other; the error of such a sum grows with its
// length.
constexpr int64_t kChain = 48;

// to[k][i] = from[i][k] for 8 x 8 elements.
FB_INLINE void transpose_8x8(const float* from, int64_t from_step, float* to, int64_t to_step) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_step);
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(s[i + j], s[i + j + 2], 0xee);
    }
  for (int k = 0; k < 4; ++k) {
    _mm256_storeu_ps(to + k * to_step, _mm256_permute2f128_ps(r[k], r[k + 4], 0x20));
    _mm256_storeu_ps(to + (k + 4) * to_step, _mm256_permute2f128_ps(r[k], r[k + 4], 0x31));
  }
}

constexpr int64_t kLineWords = 16;

// One panel from `words` words of each channel, next to each other: a cache line of every channel
// at a time, as rows a power of two apart share a cache set.
FB_INLINE void transpose_panel(const float* source, int64_t words, int64_t channel_stride,
                               int64_t width, float* panel) {
  for (int64_t line = 0; line < words; line += kLineWords)
    for (int64_t i = 0; i < width; i += 8)
      for (int64_t k = line; k < min64(line + kLineWords, words); k += 8)
        transpose_8x8(source + i * channel_stride + k, channel_stride, panel + k * width + i,
                      width);
}

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA
