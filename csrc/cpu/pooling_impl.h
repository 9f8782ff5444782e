// Max pooling behind a normalisation and ReLU, and its gradient. Included by kernels_impl.h.
//
// A line is the pixels of one image row. The window's elements (taps) count row by row.
#pragma once

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

// The taps of an output that are inside the input.
struct TapRange {
  int64_t begin, end;
};

FB_INLINE TapRange taps_of(const PoolAxis& axis, int64_t out) {
  const int64_t start = out * axis.stride - axis.padding, dilation = axis.dilation;
  const int64_t inside = (axis.in - start + dilation - 1) / dilation;
  return {start < 0 ? (dilation - 1 - start) / dilation : 0, min64(axis.kernel, inside)};
}

// Where a tap of an output is in the input.
FB_INLINE int64_t position(const PoolAxis& axis, int64_t out, int64_t tap) {
  return out * axis.stride - axis.padding + tap * axis.dilation;
}

// body(first pixel of the input's line, tap) for the rows of the window of output line `line`.
template <class Body>
FB_INLINE void for_each_tap_row(const PoolWindow& w, int64_t line, const Body& body) {
  const int64_t image = line / w.height.out, row = line % w.height.out;
  const TapRange taps = taps_of(w.height, row);
  for (int64_t tap = taps.begin; tap < taps.end; ++tap)
    body((image * w.height.in + position(w.height, row, tap)) * w.width.in, tap * w.width.kernel);
}

// body(pixel of the input, tap) for the window of an output: its line and its place there.
template <class Body>
FB_INLINE void for_each_tap(const PoolWindow& w, int64_t line, int64_t column, const Body& body) {
  const TapRange taps = taps_of(w.width, column);
  for_each_tap_row(w, line, [&](int64_t pixel, int64_t first) {
    for (int64_t tap = taps.begin; tap < taps.end; ++tap)
      body(pixel + position(w.width, column, tap), first + tap);
  });
}

// Indices of taps, one per lane, as wide as the values that they choose from.
template <class A>
using TapWord = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;

template <class A, int W>
FB_INLINE Value<TapWord<A>, W> load_taps(Lanes<A, W>, const uint8_t* p) {
  return __builtin_convertvector(read<Value<uint8_t, W>>(p), Value<TapWord<A>, W>);
}

template <class T>
void bn_relu_pool(const BnReluPool& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const T* y = static_cast<const T*>(p.y);
  const A* mean = static_cast<const A*>(p.mean);
  const A* scale = static_cast<const A*>(p.scale);
  const A* beta = static_cast<const A*>(p.beta);
  T* out = static_cast<T*>(p.out);
  uint8_t* index = p.index;
  const PoolWindow window = p.window;
  const int64_t channels = p.channels, width = window.width.out;
  const auto pixel = [&](int64_t line, int64_t column) {
    for_each_lanes<A>(
        line * width + column, line * width + column + 1, 0, channels,
        [&](auto lanes, auto, int64_t row, int64_t c) {
          constexpr int count = decltype(lanes)::count;
          using Word = Value<TapWord<A>, count>;
          const auto mean_c = load(lanes, mean + c);
          const auto scale_c = load(lanes, scale + c);
          const auto beta_c = load(lanes, beta + c);
          // The ReLU is in where the maximum starts; a NaN wins over all before it.
          Value<A, count> best{};
          Word winner = Word{} + kNoTap;
          for_each_tap(window, line, column, [&](int64_t at, int64_t tap) {
            auto v = affine(load(lanes, y + at * channels + c), mean_c, scale_c, beta_c);
            v = widen<T, count>(narrow<T, count>(v));
            const auto wins = (v > best) | (v != v);
            best = wins ? v : best;
            winner = wins ? Word{} + static_cast<TapWord<A>>(tap) : winner;
          });
          store(lanes, out + row * channels + c, best);
          write(index + row * channels + c, __builtin_convertvector(winner, Value<uint8_t, count>));
        });
  };
  for (int64_t line = begin; line < end; ++line)
    for (int64_t column = 0; column < width; ++column) pixel(line, column);
}

template <class T>
void pool_bn_backward_reduce(const PoolBnBackwardReduce& p, int64_t begin, int64_t end,
                             double* sum_g, double* sum_g_xhat) {
  using A = Acc<T>;
  const T* grad_out = static_cast<const T*>(p.grad_out);
  const T* y = static_cast<const T*>(p.y);
  const A* mean = static_cast<const A*>(p.mean);
  const A* invstd = static_cast<const A*>(p.invstd);
  const uint8_t* index = p.index;
  const PoolWindow window = p.window;
  const int64_t channels = p.channels, width = window.width.out;
  A tile_sum_g[kChannelBlock], tile_sum_g_xhat[kChannelBlock];
  for (int64_t c = 0; c < channels; ++c) sum_g[c] = sum_g_xhat[c] = 0;
  const auto pixel = [&](int64_t at, int64_t c_begin, int64_t c_end) {
    const auto add = [&](auto lanes, auto, int64_t row, int64_t c) {
      constexpr int count = decltype(lanes)::count;
      using Word = Value<TapWord<A>, count>;
      const Word winner = load_taps(lanes, index + row * channels + c);
      Value<A, count> chosen{};
      for_each_tap(window, row / width, row % width, [&](int64_t from, int64_t tap) {
        const Word this_tap = Word{} + static_cast<TapWord<A>>(tap);
        chosen = winner == this_tap ? load(lanes, y + from * channels + c) : chosen;
      });
      const auto xhat = (chosen - load(lanes, mean + c)) * load(lanes, invstd + c);
      const auto grad = load(lanes, grad_out + row * channels + c);
      const auto g = winner == Word{} + kNoTap ? Value<A, count>{} : grad;
      A* total_g = tile_sum_g + (c - c_begin);
      A* total_g_xhat = tile_sum_g_xhat + (c - c_begin);
      store(lanes, total_g, load(lanes, total_g) + g);
      store(lanes, total_g_xhat, load(lanes, total_g_xhat) + g * xhat);
    };
    for_each_lanes<A>(at, at + 1, c_begin, c_end, add);
  };
  const auto tile = [&](int64_t row_begin, int64_t row_end, int64_t c_begin, int64_t c_end) {
    clear(tile_sum_g);
    clear(tile_sum_g_xhat);
    for (int64_t row = row_begin; row < row_end; ++row) pixel(row, c_begin, c_end);
    add_tile_sum(tile_sum_g, c_begin, c_end, sum_g);
    add_tile_sum(tile_sum_g_xhat, c_begin, c_end, sum_g_xhat);
  };
  for_each_tile(begin * width, end * width, channels, kMaxTileRows, tile);
}

// The outputs that have a pixel of the input in their window, and as which tap; how many they are.
FB_INLINE int64_t list_uses(const PoolBnBackward& p, int64_t line, int64_t column, PoolUse* uses) {
  const PoolAxis &height = p.window.height, &width = p.window.width;
  const int64_t image = line / height.in, row = line % height.in;
  int64_t count = 0;
  for (int64_t i = p.rows.first[row]; i < p.rows.first[row + 1]; ++i) {
    const PoolUse of_row = p.rows.uses[i];
    for (int64_t j = p.columns.first[column]; j < p.columns.first[column + 1]; ++j) {
      const PoolUse of_column = p.columns.uses[j];
      uses[count++] = {(image * height.out + of_row.out) * width.out + of_column.out,
                       of_row.tap * width.kernel + of_column.tap};
    }
  }
  return count;
}

template <class T>
void pool_bn_backward(const PoolBnBackward& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const T* grad_out = static_cast<const T*>(p.grad_out);
  const T* y = static_cast<const T*>(p.y);
  const A* mean = static_cast<const A*>(p.mean);
  const A* scale = static_cast<const A*>(p.scale);
  const A* k0 = static_cast<const A*>(p.k0);
  const A* k1 = static_cast<const A*>(p.k1);
  T* out = static_cast<T*>(p.out);
  const uint8_t* index = p.index;
  const PoolWindow window = p.window;
  const int64_t channels = p.channels, width = window.width.in;
  PoolUse uses[kNoTap];  // of a pixel: each tap at most once
  const auto pixel = [&](int64_t at, int64_t count) {
    for_each_lanes<A>(at, at + 1, 0, channels, [&](auto lanes, auto, int64_t row, int64_t c) {
      constexpr int wide = decltype(lanes)::count;
      using Word = Value<TapWord<A>, wide>;
      Value<A, wide> g{};
      for (int64_t i = 0; i < count; ++i) {
        const int64_t from = uses[i].out * channels + c;
        const Word tap = Word{} + static_cast<TapWord<A>>(uses[i].tap);
        const auto won = load_taps(lanes, index + from) == tap;
        g += won ? load(lanes, grad_out + from) : Value<A, wide>{};
      }
      if (k0 != nullptr) {
        const auto centred = load(lanes, y + row * channels + c) - load(lanes, mean + c);
        g = g - load(lanes, k0 + c) - centred * load(lanes, k1 + c);
      }
      store(lanes, out + row * channels + c, load(lanes, scale + c) * g);
    });
  };
  for (int64_t line = begin; line < end; ++line)
    for (int64_t column = 0; column < width; ++column)
      pixel(line * width + column, list_uses(p, line, column, uses));
}

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA
