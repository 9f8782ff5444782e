// The panels of the 1x1 products with two bfloat16 in each word, of which the first is in the low
// half: what an instruction of AVX512-BF16 multiplies with two others and adds up in float32.
#pragma once

#include "panels_impl.h"

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

using Element = BFloat16;
constexpr int64_t kPerWord = 2;
using Word = Value<uint32_t, kVector>;

FB_INLINE FloatVector multiply_add(float a, FloatVector b, FloatVector c) {
  return (FloatVector)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
}

constexpr uint32_t kAllBits = 0xffff;

// Elements whose bit is not set are zero, and not read.
FB_INLINE __m256i load_bits(const BFloat16* source, uint32_t bits) {
  return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(bits), source);
}

FB_INLINE Word widened(__m256i half) { return (Word)_mm512_maskz_cvtepu16_epi32(kAllBits, half); }

FB_INLINE Word pairs_of(__m256i low, __m256i high) { return widened(low) | widened(high) << 16; }

FB_INLINE FloatVector sum_of(Word pairs) {
  return bit_cast<FloatVector>(pairs << 16) + bit_cast<FloatVector>(pairs & 0xffff0000u);
}

FB_INLINE uint32_t bits_of(const PackRows& p, int64_t row, int64_t c) {
  return p.mask == nullptr ? kAllBits
                           : read_bits(Float{}, p.mask + row * ((p.channels + 7) / 8), c);
}

// Rows row and row + 1 of 16 channels from c on; a row behind the last is zero.
FB_INLINE Word pairs_of_rows(const PackRows& p, int64_t row, int64_t c) {
  const Element* source = static_cast<const Element*>(p.source) + row * p.source_stride + c;
  const __m256i low = load_bits(source, bits_of(p, row, c));
  if (row + 1 == p.rows) return pairs_of(low, __m256i{});
  return pairs_of(low, load_bits(source + p.source_stride, bits_of(p, row + 1, c)));
}

template <bool Summed>
FB_INLINE void pack_left_tile(const PackRows& p, int64_t row_begin, int64_t row_end,
                              int64_t c_begin, int64_t c_end, float* total) {
  const int64_t panel = p.stride * kLeft;
  if constexpr (Summed) clear(total);
  for (int64_t row = row_begin; row < row_end; row += kPerWord) {
    float* out = p.panels + c_begin / kLeft * panel + row / kPerWord * kLeft;
    for (int64_t c = c_begin; c < c_end; c += kVector, out += kVector / kLeft * panel) {
      const Word pairs = pairs_of_rows(p, row, c);
      if constexpr (Summed) {
        float* sum = total + (c - c_begin);
        store(Float{}, sum, load(Float{}, sum) + sum_of(pairs));
      }
      write_left(out, panel, bit_cast<FloatVector>(pairs));
    }
  }
}

void pack_left(const PackRows& p) {
  if (p.sums == nullptr) return pack_left_tile<false>(p, 0, p.rows, 0, p.channels, nullptr);
  float total[kChannelBlock];
  for_each_tile(0, p.rows, p.channels, kChain,
                [&](int64_t row_begin, int64_t row_end, int64_t c_begin, int64_t c_end) {
                  pack_left_tile<true>(p, row_begin, row_end, c_begin, c_end, total);
                  add_tile_sum(total, c_begin, c_end, p.sums);
                });
}
static_assert(kChain % kPerWord == 0);

void pack_depth(const PackRows& p) {
  constexpr int64_t width = kLeft * kPerWord;
  const int64_t padded = (p.rows + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
  for (int64_t row = 0; row < padded; ++row) {
    const Element* source = static_cast<const Element*>(p.source) + row * p.source_stride;
    float* out = p.panels + row * kLeft;
    for (int64_t c = 0; c < p.channels; c += width, out += p.stride * kLeft)
      write(out, row < p.rows ? load_bits(source + c, bits_of(p, row, c)) : __m256i{});
  }
}
static_assert(kChannelMultiple % (kLeft * kPerWord) == 0);

void pack_right(const PackRows& p) {
  for_each_panel(p.channels, [&](auto vectors, int64_t c) {
    constexpr int width = vectors * kVector;
    float* out = p.panels + c * p.stride;
    for (int64_t row = 0; row < p.rows; row += kPerWord)
      for (int v = 0; v < width; v += kVector, out += kVector)
        write(out, pairs_of_rows(p, row, c + v));
  });
}

// One panel of a weight, from its first channel on.
FB_INLINE void pack_panel(const PackWeight& p, const BFloat16* source, int64_t width,
                          float* panel) {
  if (p.channel_stride == 1) {
    for (int64_t k = 0; k < p.depth; k += kPerWord)
      for (int64_t i = 0; i < width; i += kVector, panel += kVector) {
        const BFloat16* row = source + k * p.depth_stride + i;
        write(panel, pairs_of(load_bits(row, kAllBits), load_bits(row + p.depth_stride, kAllBits)));
      }
  } else if (p.depth_stride == 1 && p.channel_stride % kPerWord == 0) {
    transpose_panel(reinterpret_cast<const float*>(source), p.depth / kPerWord,
                    p.channel_stride / kPerWord, width, panel);
  } else {
    uint16_t* to = reinterpret_cast<uint16_t*>(panel);
    for (int64_t k = 0; k < p.depth; ++k)
      for (int64_t i = 0; i < width; ++i)
        to[(k / kPerWord * width + i) * kPerWord + k % kPerWord] =
            source[k * p.depth_stride + i * p.channel_stride].bits;
  }
}

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA
