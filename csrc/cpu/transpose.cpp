// Batched matrix transposition: what turns contiguous activations into channels_last and back.
//
// A plain strided copy reads or writes one element per cache line and touches each line many times
// from memory. Here a square tile goes through the L1 cache: whole lines in, whole lines out.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../stable_utils.h"

namespace fused_bottleneck::cpu {
namespace {

constexpr int64_t kTile = 32;
constexpr int64_t kBlock = 4;

template <class T>
void transpose_elements(const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t rows,
                        int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = x[r * x_stride + c];
}

// out[c][r] = x[r][c] for a 4x4 block of 32-bit elements: rows interleaved in pairs, twice.
void transpose_block(const int32_t* x, int64_t x_stride, int32_t* out, int64_t out_stride) {
#if defined(__SSE2__)
  const auto row = [&](int64_t r) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + r * x_stride));
  };
  const auto store = [&](int64_t c, __m128i value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + c * out_stride), value);
  };
  const __m128i low02 = _mm_unpacklo_epi32(row(0), row(2)),
                low13 = _mm_unpacklo_epi32(row(1), row(3));
  const __m128i high02 = _mm_unpackhi_epi32(row(0), row(2)),
                high13 = _mm_unpackhi_epi32(row(1), row(3));
  store(0, _mm_unpacklo_epi32(low02, low13));
  store(1, _mm_unpackhi_epi32(low02, low13));
  store(2, _mm_unpacklo_epi32(high02, high13));
  store(3, _mm_unpackhi_epi32(high02, high13));
#else
  transpose_elements(x, x_stride, out, out_stride, kBlock, kBlock);
#endif
}

void transpose_full_tile(const int32_t* x, int64_t x_stride, int32_t* out) {
  for (int64_t r = 0; r < kTile; r += kBlock)
    for (int64_t c = 0; c < kTile; c += kBlock)
      transpose_block(x + r * x_stride + c, x_stride, out + c * kTile + r, kTile);
}

template <class T>
void transpose_full_tile(const T* x, int64_t x_stride, T* out) {
  transpose_elements(x, x_stride, out, kTile, kTile, kTile);
}

template <class T>
void transpose_tile(const T* x, int64_t x_stride, T* out, int64_t out_stride, int64_t rows,
                    int64_t columns) {
  alignas(64) T tile[kTile * kTile];
  if (rows == kTile && columns == kTile) {
    transpose_full_tile(x, x_stride, tile);
  } else {
    transpose_elements(x, x_stride, tile, kTile, rows, columns);
  }
  for (int64_t c = 0; c < columns; ++c) std::copy_n(tile + c * kTile, rows, out + c * out_stride);
}

// One unit of work is kTile columns of x, that is kTile rows of out: sequential writes.
template <class T>
void transpose(const T* x, T* out, int64_t batch, int64_t rows, int64_t columns) {
  const int64_t strips = (columns + kTile - 1) / kTile;
  torch::stable::parallel_for(0, batch * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = i / strips * rows * columns;
      const int64_t c = i % strips * kTile;
      const int64_t width = std::min(kTile, columns - c);
      for (int64_t r = 0; r < rows; r += kTile)
        transpose_tile(x + offset + r * columns + c, columns, out + offset + c * rows + r, rows,
                       std::min(kTile, rows - r), width);
    }
  });
}

void transpose_(const Tensor& x, const Tensor& out) {
  check_dense("transpose_", "x", x, x.dim() == 3 && x.is_contiguous(), "matrices [B, R, C]",
              ", contiguous, ");
  const int64_t batch = x.size(0), rows = x.size(1), columns = x.size(2);
  check_tensor("transpose_", "out", out, x.scalar_type(), {batch, columns, rows});
  check_disjoint("transpose_", "out", out, "x", x);
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  switch (x.element_size()) {
    case 8:
      return transpose(static_cast<const int64_t*>(from), static_cast<int64_t*>(to), batch, rows,
                       columns);
    case 4:
      return transpose(static_cast<const int32_t*>(from), static_cast<int32_t*>(to), batch, rows,
                       columns);
    default:
      return transpose(static_cast<const int16_t*>(from), static_cast<int16_t*>(to), batch, rows,
                       columns);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("transpose_", TORCH_BOX(&transpose_));
}

}  // namespace fused_bottleneck::cpu
