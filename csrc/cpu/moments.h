// channel_moments: mean and sum of squared deviations per channel, two-pass in a tile that stays in
// cache, tiles combined by Chan's formula. Included by kernels_impl.h, after loops.h.
#pragma once

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

// Sums of the tile's columns: into sum[C of the tile].
template <class T>
FB_INLINE void tile_sum(const T* y, int64_t channels, int64_t row_begin, int64_t row_end,
                        int64_t c_begin, int64_t c_end, Acc<T>* sum) {
  using A = Acc<T>;
  for (int64_t c = 0; c < c_end - c_begin; ++c) sum[c] = 0;
  for_each_lanes<A>(row_begin, row_end, c_begin, c_end,
                    [&](auto lanes, auto rows, int64_t row, int64_t c) {
                      auto total = load(lanes, sum + (c - c_begin));
                      for (int r = 0; r < rows; ++r)
                        total += load(lanes, y + (row + r) * channels + c);
                      store(lanes, sum + (c - c_begin), total);
                    });
}

// Sums of d and d^2 of the tile's columns, d = y - centre.
template <class T>
FB_INLINE void tile_deviations(const T* y, int64_t channels, int64_t row_begin, int64_t row_end,
                               int64_t c_begin, int64_t c_end, const Acc<T>* centre, Acc<T>* sum_d,
                               Acc<T>* sum_dd) {
  using A = Acc<T>;
  for (int64_t c = 0; c < c_end - c_begin; ++c) sum_d[c] = sum_dd[c] = 0;
  for_each_lanes<A>(row_begin, row_end, c_begin, c_end,
                    [&](auto lanes, auto rows, int64_t row, int64_t c) {
                      const int64_t k = c - c_begin;
                      const auto shift = load(lanes, centre + k);
                      auto total_d = load(lanes, sum_d + k);
                      auto total_dd = load(lanes, sum_dd + k);
                      for (int r = 0; r < rows; ++r) {
                        const auto d = load(lanes, y + (row + r) * channels + c) - shift;
                        total_d += d;
                        total_dd += d * d;
                      }
                      store(lanes, sum_d + k, total_d);
                      store(lanes, sum_dd + k, total_dd);
                    });
}

// Chan's formula. Where the difference of the means is infinite, their weighted sum still gives the
// mean that eager has: an infinite one, or NaN for infinities of both signs.
void merge_moments(int64_t channels, int64_t rows_before, double* mean, double* m2, int64_t rows,
                   const double* more_mean, const double* more_m2) {
  const double before = static_cast<double>(rows_before);
  const double weight = static_cast<double>(rows) / static_cast<double>(rows_before + rows);
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = more_mean[c] - mean[c];
    m2[c] += more_m2[c] + delta * (delta * (before * weight));
    mean[c] = delta - delta == 0 ? mean[c] + delta * weight
                                 : mean[c] * (1 - weight) + more_mean[c] * weight;
  }
}

// The moments of one tile of columns from its sums of d. The correction by sum_d makes a rounded
// centre harmless (m2 can then round below 0: not in a sum of squares); an infinite centre is an
// infinite mean.
template <class A>
FB_INLINE void tile_moments(int64_t channels, int64_t rows, const A* centre, const A* sum_d,
                            const A* sum_dd, double* mean, double* m2) {
  const double n = static_cast<double>(rows);
  for (int64_t c = 0; c < channels; ++c) {
    const double middle = centre[c], d = sum_d[c], dd = sum_dd[c];
    mean[c] = middle - middle == 0 ? middle + d / n : middle;
    const double squares = dd - d * (d / n);
    m2[c] = squares < 0 ? 0 : squares;
  }
}

template <class T>
void channel_moments(const ChannelMoments& p, int64_t begin, int64_t end, double* mean,
                     double* m2) {
  using A = Acc<T>;
  const T* y = static_cast<const T*>(p.y);
  const int64_t row_bytes = min64(p.channels, kChannelBlock) * static_cast<int64_t>(sizeof(T));
  const int64_t tile_rows = min64(kTileBytes / row_bytes, kMaxTileRows);
  A centre[kChannelBlock], sum_d[kChannelBlock], sum_dd[kChannelBlock];
  double tile_mean[kChannelBlock], tile_m2[kChannelBlock];
  for (int64_t c = 0; c < p.channels; ++c) mean[c] = m2[c] = 0;
  const auto tile = [&](int64_t row_begin, int64_t row_end, int64_t c_begin, int64_t c_end) {
    const int64_t rows = row_end - row_begin, channels = c_end - c_begin;
    tile_sum(y, p.channels, row_begin, row_end, c_begin, c_end, centre);
    for (int64_t k = 0; k < channels; ++k) centre[k] /= static_cast<A>(rows);
    tile_deviations(y, p.channels, row_begin, row_end, c_begin, c_end, centre, sum_d, sum_dd);
    tile_moments(channels, rows, centre, sum_d, sum_dd, tile_mean, tile_m2);
    merge_moments(channels, row_begin - begin, mean + c_begin, m2 + c_begin, rows, tile_mean,
                  tile_m2);
  };
  for_each_tile(begin, end, p.channels, tile_rows, tile);
}

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA
