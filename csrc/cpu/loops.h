// How the kernels walk over a matrix. Included by kernels_impl.h, after simd.h.
//
// Row-major order, kRowGroup rows at a time: sequential streams, and a [C] vector is loaded once
// for kRowGroup rows. Column sums go over tiles of rows x channels, so that the accumulators stay
// in the L1 cache.
#pragma once

namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA {

constexpr int kRowGroup = 4;
// Channels whose accumulators are kept in L1 at a time (2 KiB of float).
constexpr int64_t kChannelBlock = 512;
// Rows summed in the accumulation dtype before the sum goes on in double.
constexpr int64_t kMaxTileRows = 512;
// A tile of the two-pass moments is read twice, the second time from the L2 cache.
constexpr int64_t kTileBytes = 128 * 1024;

FB_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// body(lanes, rows, row, c): for rows row .. row + rows - 1 and channels c .. c + lanes - 1.
template <class A, class Rows, class Body>
FB_INLINE void for_each_lanes_of(Rows rows, int64_t row, int64_t c_begin, int64_t c_end,
                                 const Body& body) {
  constexpr int width = FullLanes<A>::count;
  int64_t c = c_begin;
  for (; c + width <= c_end; c += width) body(FullLanes<A>{}, rows, row, c);
  for (; c < c_end; ++c) body(Lanes<A, 1>{}, rows, row, c);
}

// The same for rows [begin, end), kRowGroup at a time and then one by one.
template <class A, class Body>
FB_INLINE void for_each_lanes(int64_t begin, int64_t end, int64_t c_begin, int64_t c_end,
                              const Body& body) {
  int64_t row = begin;
  for (; row + kRowGroup <= end; row += kRowGroup)
    for_each_lanes_of<A>(std::integral_constant<int, kRowGroup>{}, row, c_begin, c_end, body);
  for (; row < end; ++row)
    for_each_lanes_of<A>(std::integral_constant<int, 1>{}, row, c_begin, c_end, body);
}

// body(row_begin, row_end, c_begin, c_end) for tiles that cover [begin, end) x [0, channels).
template <class Body>
FB_INLINE void for_each_tile(int64_t begin, int64_t end, int64_t channels, int64_t tile_rows,
                             const Body& body) {
  for (int64_t row = begin; row < end; row += tile_rows)
    for (int64_t c = 0; c < channels; c += kChannelBlock)
      body(row, min64(row + tile_rows, end), c, min64(c + kChannelBlock, channels));
}

// --- The column sums of a tile. ---

template <class A>
FB_INLINE void clear(A* sum) {
  for (int64_t k = 0; k < kChannelBlock; ++k) sum[k] = 0;
}

template <class A>
FB_INLINE void add_tile_sum(const A* tile_sum, int64_t c_begin, int64_t c_end, double* sum) {
  for (int64_t c = c_begin; c < c_end; ++c) sum[c] += tile_sum[c - c_begin];
}

}  // namespace fused_bottleneck::cpu::FUSED_BOTTLENECK_ISA
