// The micro-kernels of the 1x1 products, for one instruction set and one kind of words in the
// panels: included after single_impl.h by kernels_impl.h, after pairs_impl.h by
// kernels_avx512_bf16.cpp. See products.h for the layouts.
//
// A tile of the result stays in registers over the whole depth: 12 x 2 vectors of AVX-512, 6 x 2 of
// AVX2, so that a step costs 2 vector loads and 12 (6) broadcasts for 24 (12) multiply-adds.
#pragma once

#include "products.h"

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

#if FUSED_BOTTLENECK_VECTOR_BYTES == 64
constexpr int kTileRows = 12;  // of multiply
constexpr int kTileLeft = 8;   // left channels of accumulate
FB_INLINE DoubleVector multiply_add(double a, DoubleVector b, DoubleVector c) {
  return (DoubleVector)_mm512_fmadd_pd(_mm512_set1_pd(a), (__m512d)b, (__m512d)c);
}
#else
constexpr int kTileRows = 6;
constexpr int kTileLeft = 4;
FB_INLINE DoubleVector multiply_add(double a, DoubleVector b, DoubleVector c) {
  return (DoubleVector)_mm256_fmadd_pd(_mm256_set1_pd(a), (__m256d)b, (__m256d)c);
}
#endif
static_assert(kRowMultiple % kTileRows == 0 && kLeft % kTileLeft == 0);

template <int Rows, int Vectors>
struct Tile {
  FloatVector at[Rows][Vectors];
};

// One step of the depth: tile[r][v] += left[r * left_step] * right[v].
template <int Rows, int Vectors>
FB_INLINE void step(Tile<Rows, Vectors>& tile, const float* left, int64_t left_step,
                    const float* right) {
  FloatVector b[Vectors];
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v) b[v] = read<FloatVector>(right + v * kVector);
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    const float a = left[r * left_step];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) tile.at[r][v] = multiply_add(a, b[v], tile.at[r][v]);
  }
}

void pack_weight(const PackWeight& p, int64_t begin, int64_t end) {
  const Element* source = static_cast<const Element*>(p.source);
  for_each_panel(end - begin, [&](auto vectors, int64_t from) {
    constexpr int width = vectors * kVector;
    const int64_t c = begin + from;
    pack_panel(p, source + c * p.channel_stride, width,
               p.panels + (c * p.total_depth + p.depth_begin * width) / kPerWord);
  });
}

// Walks over the memory of a call's aheads, in as many equal steps as the call has.
class Prefetcher {
 public:
  FB_INLINE Prefetcher(const Ahead* aheads, int64_t steps) : next_(aheads), end_(aheads + kAheads) {
    int64_t lines = 0;
    for (int i = 0; i < kAheads; ++i) lines += aheads[i].bytes / kLine + 1;
    lines_ = (lines + steps - 1) / steps;
    start();
  }

  FB_INLINE void step() {
    for (int64_t i = 0; i < lines_ && next_ != end_; ++i) {
      __builtin_prefetch(at_, 0, 3);
      at_ += kLine;
      if (at_ >= stop_) {
        ++next_;
        start();
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  FB_INLINE void start() {
    while (next_ != end_ && next_->bytes == 0) ++next_;
    if (next_ == end_) return;
    at_ = static_cast<const char*>(next_->at);
    stop_ = at_ + next_->bytes;
  }

  const Ahead *next_, *end_;
  const char *at_ = nullptr, *stop_ = nullptr;
  int64_t lines_;
};

// Depth that is summed in one chain; the error of a sum grows with the length of its chains.
constexpr int64_t kDepthChain = 512;

// The lines that a tile will write, so much of the depth before its end: that is 400 ns, as where
// the values go straight to their place they come from memory.
constexpr int64_t kValuesAhead = 8 * kLeft;

template <int Vectors>
FB_INLINE void prefetch_values(const float* values, int64_t channels) {
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < Vectors; ++v) __builtin_prefetch(values + r * channels + v * kVector, 1);
}

// Depth [begin, end) of one tile: into the values, or added to them.
template <int Vectors>
FB_INLINE void multiply_tile(const Multiply& p, int64_t row, int64_t c, int64_t begin, int64_t end,
                             Prefetcher& ahead) {
  Tile<kTileRows, Vectors> tile{};
  const float* left = p.left + begin * p.left_stride + row * kLeft;
  const float* right = p.right + c * p.depth + begin * (Vectors * kVector);
  float* values = p.values + row * p.channels + c;
  const int64_t fetched_at = end - begin > kValuesAhead ? end - kValuesAhead : begin;
  for (int64_t k = begin; k < end; k += kLeft, left += p.left_stride * kLeft) {
    ahead.step();
    if (k == fetched_at) prefetch_values<Vectors>(values, p.channels);
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i, right += Vectors * kVector) step(tile, left + i, kLeft, right);
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < Vectors; ++v) {
      float* value = values + r * p.channels + v * kVector;
      write(value, begin == 0 ? tile.at[r][v] : read<FloatVector>(value) + tile.at[r][v]);
    }
}

void multiply(const Multiply& p) {
  const int64_t tiles = p.rows / kTileRows * ((p.channels + kWide - 1) / kWide);
  Prefetcher ahead(p.ahead, tiles * p.depth / kLeft);
  for_each_panel(p.channels, [&](auto vectors, int64_t c) {
    for (int64_t k = 0; k < p.depth; k += kDepthChain)
      for (int64_t row = 0; row < p.rows; row += kTileRows)
        multiply_tile<vectors>(p, row, c, k, min64(k + kDepthChain, p.depth), ahead);
  });
}

// sums (+)= values of one tile.
template <class T, class Sum>
FB_INLINE void add_tile(const T* values, int count, bool first, Sum* sums) {
  if (first) {
    for (int i = 0; i < count; ++i) sums[i] = values[i];
  } else {
    for (int i = 0; i < count; ++i) sums[i] += values[i];
  }
}

template <int Vectors, class Sum>
FB_INLINE void accumulate_tile(const Accumulate& p, Sum* all_sums, int64_t l, int64_t c,
                               Prefetcher& ahead) {
  constexpr int width = Vectors * kVector;
  constexpr int count = kTileLeft * width;
  const float* left = p.left + l / kLeft * kLeft * p.left_stride + l % kLeft + p.begin * kLeft;
  const float* right = p.right + c * p.right_stride + p.begin * width;
  Sum* sums = all_sums + l * p.right_channels + c * kTileLeft;
  for (int i = 0; i < count; i += 64 / static_cast<int>(sizeof(Sum)))
    __builtin_prefetch(sums + i, 1);
  Tile<kTileLeft, Vectors> total{};
  for (int64_t begin = 0; begin < p.rows; begin += kChain) {
    const int64_t end = min64(begin + kChain, p.rows);
    Tile<kTileLeft, Vectors> tile{};
    int64_t row = begin;
    for (; row + kLeft <= end; row += kLeft) {
      ahead.step();
#pragma GCC unroll 8
      for (int i = 0; i < kLeft; ++i, left += kLeft, right += width) step(tile, left, 1, right);
    }
    for (; row < end; ++row, left += kLeft, right += width) step(tile, left, 1, right);
    for (int r = 0; r < kTileLeft; ++r)
      for (int v = 0; v < Vectors; ++v) total.at[r][v] += tile.at[r][v];
  }
  add_tile(reinterpret_cast<const float*>(&total), count, p.first, sums);
}

// Doubles of a left panel's rows [begin, end), from channel l % kLeft on.
FB_INLINE void widen_left(const float* left, int64_t rows, double* wide) {
  for (int64_t row = 0; row < rows; ++row)
    for (int i = 0; i < kTileLeft; ++i) wide[row * kTileLeft + i] = left[row * kLeft + i];
}

// The same tile in double, where a product of floats is exact: one vector of floats at a time.
template <int Vectors>
FB_INLINE void accumulate_tile_in_double(const Accumulate& p, int64_t l, int64_t c) {
  constexpr int width = Vectors * kVector;
  const float* left = p.left + l / kLeft * kLeft * p.left_stride + l % kLeft + p.begin * kLeft;
  double wide[kChain * kTileLeft];
  DoubleVector tile[kTileLeft][2 * Vectors];
  for (int v = 0; v < Vectors; ++v) {
    const float* right = p.right + c * p.right_stride + p.begin * width + v * kVector;
    DoubleVector part[kTileLeft][2] = {};
    for (int64_t begin = 0; begin < p.rows; begin += kChain) {
      const int64_t rows = min64(kChain, p.rows - begin);
      widen_left(left + begin * kLeft, rows, wide);
      for (int64_t row = 0; row < rows; ++row, right += width) {
        DoubleVector b[2];
        for (int h = 0; h < 2; ++h)
          b[h] = __builtin_convertvector((read<Value<float, kVector / 2>>(right + h * kVector / 2)),
                                         DoubleVector);
#pragma GCC unroll 8
        for (int i = 0; i < kTileLeft; ++i)
          for (int h = 0; h < 2; ++h)
            part[i][h] = multiply_add(wide[row * kTileLeft + i], b[h], part[i][h]);
      }
    }
    for (int i = 0; i < kTileLeft; ++i)
      for (int h = 0; h < 2; ++h) tile[i][2 * v + h] = part[i][h];
  }
  add_tile(reinterpret_cast<const double*>(&tile), kTileLeft * width, p.first,
           p.sums.doubles + l * p.right_channels + c * kTileLeft);
}

// A group of right panels that stays in the L2 cache goes along all left ones.
void accumulate(const Accumulate& p) {
  const int64_t fitting = kNarrowBytes / ((p.rows + 1) * static_cast<int64_t>(sizeof(float)));
  const int64_t group = fitting < kWide ? kWide : fitting / kWide * kWide;
  const int64_t tiles = p.left_channels / kTileLeft * ((p.right_channels + kWide - 1) / kWide);
  Prefetcher ahead(p.ahead, (p.upper ? tiles / 2 : tiles) * (p.rows / kLeft) + 1);
  for (int64_t from = 0; from < p.right_channels; from += group)
    for (int64_t l = 0; l < p.left_channels; l += kTileLeft)
      for_each_panel(min64(group, p.right_channels - from), [&](auto vectors, int64_t c) {
        constexpr int width = vectors * kVector;
        if (p.upper && from + c + width <= l) return;
        if (p.in_double) {
          accumulate_tile_in_double<vectors>(p, l, from + c);
        } else if (p.sums.floats != nullptr) {
          accumulate_tile<vectors>(p, p.sums.floats, l, from + c, ahead);
        } else {
          accumulate_tile<vectors>(p, p.sums.doubles, l, from + c, ahead);
        }
      });
}

// out(l, r) of one tile.
template <class Sum, class Out>
FB_INLINE void unpack_tile(const UnpackSums& p, const Sum* sums, Out* out, int64_t l, int64_t c,
                           int64_t width) {
  const Sum* tile = sums + l * p.right_channels + c * kTileLeft;
  const int64_t count = kTileLeft * width;
  double total[kTileLeft * kWide];
  for (int64_t i = 0; i < count; ++i) total[i] = tile[i];
  for (int64_t part = 1; part < p.parts; ++part)
    for (int64_t i = 0; i < count; ++i) total[i] += tile[part * p.part_step + i];
  out += l * p.left_step + c * p.right_step;
  if (p.left_step == 1) {
    for (int64_t j = 0; j < width; ++j)
      for (int i = 0; i < kTileLeft; ++i)
        out[i + j * p.right_step] = static_cast<Out>(total[i * width + j]);
  } else {
    for (int i = 0; i < kTileLeft; ++i)
      for (int64_t j = 0; j < width; ++j)
        out[i * p.left_step + j] = static_cast<Out>(total[i * width + j]);
  }
}

template <class Sum, class Out>
FB_INLINE void unpack_all(const UnpackSums& p, const Sum* sums, Out* out) {
  for (int64_t l = p.begin; l < p.end; l += kTileLeft)
    for_each_panel(p.right_channels, [&](auto vectors, int64_t c) {
      constexpr int width = vectors * kVector;
      if (!p.upper || c + width > l) unpack_tile(p, sums, out, l, c, width);
    });
}

void unpack_sums(const UnpackSums& p) {
  if (p.out.doubles != nullptr) {
    unpack_all(p, p.sums.doubles, p.out.doubles);
  } else if (p.sums.doubles != nullptr) {
    unpack_all(p, p.sums.doubles, p.out.floats);
  } else {
    unpack_all(p, p.sums.floats, p.out.floats);
  }
}

void write_values(const WriteValues& p) {
  const Element* addend = static_cast<const Element*>(p.addend);
  Element* out = static_cast<Element*>(p.out);
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t c = 0; c < p.channels; c += kVector) {
      const int64_t at = row * p.channels + c;
      FloatVector v = load(Float{}, p.values + at);
      if (addend != nullptr) v = v + load(Float{}, addend + at) + load(Float{}, p.shift + c);
      store(Float{}, out + at, v);
    }
}

const ProductKernels product_kernels = {kPerWord, pack_left,  pack_depth,  pack_right,  pack_weight,
                                        multiply, accumulate, unpack_sums, write_values};

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA
