// The panels of the 1x1 products with a float32 in each word. Included by kernels_impl.h.
#pragma once

#include "panels_impl.h"

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

using Element = float;
constexpr int64_t kPerWord = 1;

FB_INLINE FloatVector multiply_add(float a, FloatVector b, FloatVector c) {
#if FUSED_BOTTLENECK_VECTOR_BYTES == 64
  return (FloatVector)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)c);
#else
  return (FloatVector)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
#endif
}

// Rows [row_begin, row_end) of channels [c_begin, c_end). Summed: total[0 ..] are the sums of the
// columns.
template <bool Masked, bool Summed>
FB_INLINE void pack_left_tile(const PackRows& p, int64_t row_begin, int64_t row_end,
                              int64_t c_begin, int64_t c_end, float* total) {
  const int64_t panel = p.stride * kLeft;
  const int64_t mask_stride = (p.channels + 7) / 8;
  if constexpr (Summed) clear(total);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const Element* source = static_cast<const Element*>(p.source) + row * p.source_stride;
    float* out = p.panels + c_begin / kLeft * panel + row * kLeft;
    for (int64_t c = c_begin; c < c_end; c += kVector, out += kVector / kLeft * panel) {
      FloatVector v = load(Float{}, source + c);
      if constexpr (Masked)
        v = where_bits(Float{}, read_bits(Float{}, p.mask + row * mask_stride, c), v);
      if constexpr (Summed) {
        float* sum = total + (c - c_begin);
        store(Float{}, sum, load(Float{}, sum) + v);
      }
      write_left(out, panel, v);
    }
  }
}

template <bool Masked>
FB_INLINE void pack_left_of(const PackRows& p) {
  if (p.sums == nullptr) return pack_left_tile<Masked, false>(p, 0, p.rows, 0, p.channels, nullptr);
  float total[kChannelBlock];
  for_each_tile(0, p.rows, p.channels, kChain,
                [&](int64_t row_begin, int64_t row_end, int64_t c_begin, int64_t c_end) {
                  pack_left_tile<Masked, true>(p, row_begin, row_end, c_begin, c_end, total);
                  add_tile_sum(total, c_begin, c_end, p.sums);
                });
}

void pack_left(const PackRows& p) {
  if (p.mask == nullptr) {
    pack_left_of<false>(p);
  } else {
    pack_left_of<true>(p);
  }
  const int64_t padded = (p.rows + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
  for (int64_t c = 0; c < p.channels; c += kLeft)
    for (int64_t at = p.rows * kLeft; at < padded * kLeft; ++at) p.panels[c * p.stride + at] = 0;
}

void pack_right(const PackRows& p) {
  const Element* source = static_cast<const Element*>(p.source);
  for_each_panel(p.channels, [&](auto vectors, int64_t c) {
    constexpr int width = vectors * kVector;
    float* panel = p.panels + c * p.stride;
    for (int64_t row = 0; row < p.rows; ++row) {
      const float scale = p.scales == nullptr ? 1.0f : p.scales[row];
      for (int v = 0; v < width; v += kVector)
        store(Float{}, panel + row * width + v,
              load(Float{}, source + row * p.source_stride + c + v) * scale);
    }
  });
}

// The words of rows are those of the depth.
void pack_depth(const PackRows& p) { pack_left(p); }

// One panel of a weight, from its first channel on.
FB_INLINE void pack_panel(const PackWeight& p, const float* source, int64_t width, float* panel) {
  if (p.channel_stride == 1) {
    for (int64_t k = 0; k < p.depth; ++k)
      for (int64_t i = 0; i < width; i += kVector)
        store(Float{}, panel + k * width + i, load(Float{}, source + k * p.depth_stride + i));
  } else if (p.depth_stride == 1) {
    transpose_panel(source, p.depth, p.channel_stride, width, panel);
  } else {
    for (int64_t k = 0; k < p.depth; ++k)
      for (int64_t i = 0; i < width; ++i)
        panel[k * width + i] = source[k * p.depth_stride + i * p.channel_stride];
  }
}

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA
