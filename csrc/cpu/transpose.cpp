// Batched matrix transposition: what turns contiguous activations into channels_last and back.
//
// A plain strided copy reads or writes one element per cache line and touches each line many times
// from memory. Here a square tile goes through the L1 cache: whole lines in, whole lines out, which
// go past the caches where they would not stay there: written through them, memory would first be
// read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "arguments.h"

namespace fused_bottleneck::cpu {
namespace {

// Elements of a tile's side: four cache lines of 32-bit ones. With two it takes up to twice as
// long.
constexpr int64_t kTile = 64;
constexpr int64_t kBlock = 4;
constexpr uintptr_t kLine = 64;

// tile[c][r] = x[r][c].
template <class T>
void transpose_elements(const T* x, int64_t x_stride, T* tile, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) tile[c * kTile + r] = x[r * x_stride + c];
}

// The same for kBlock rows and columns of 32-bit elements: rows interleaved in pairs, twice.
void transpose_block(const int32_t* x, int64_t x_stride, int32_t* tile) {
#if defined(__SSE2__)
  const auto row = [&](int64_t r) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + r * x_stride));
  };
  const auto store = [&](int64_t c, __m128i value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(tile + c * kTile), value);
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
  transpose_elements(x, x_stride, tile, kBlock, kBlock);
#endif
}

void transpose_into(const int32_t* x, int64_t x_stride, int32_t* tile, int64_t rows,
                    int64_t columns) {
  const int64_t whole_rows = rows / kBlock * kBlock, whole_columns = columns / kBlock * kBlock;
  for (int64_t r = 0; r < whole_rows; r += kBlock)
    for (int64_t c = 0; c < whole_columns; c += kBlock)
      transpose_block(x + r * x_stride + c, x_stride, tile + c * kTile + r);
  transpose_elements(x + whole_columns, x_stride, tile + whole_columns * kTile, whole_rows,
                     columns - whole_columns);
  transpose_elements(x + whole_rows * x_stride, x_stride, tile + whole_rows, rows - whole_rows,
                     columns);
}

template <class T>
void transpose_into(const T* x, int64_t x_stride, T* tile, int64_t rows, int64_t columns) {
  transpose_elements(x, x_stride, tile, rows, columns);
}

// kTile elements, whole cache lines of 32-bit elements, past the caches.
void stream_row(const int32_t* from, int32_t* to) {
#if defined(__SSE2__)
  for (int64_t i = 0; i < kTile; i += kBlock)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
  std::copy_n(from, kTile, to);
#endif
}

template <class T>
void stream_row(const T* from, T* to) {
  std::copy_n(from, kTile, to);
}

// What was written past the caches is in order with what follows.
void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
struct Call {
  const T* x;
  T* out;
  int64_t batch, rows, columns;
  bool stream;
};

// Rows r .. and columns c .. of one matrix, at most kTile of each.
template <class T>
void transpose_tile(const Call<T>& call, const T* x, T* out, int64_t r, int64_t c) {
  const int64_t rows = std::min(kTile, call.rows - r), columns = std::min(kTile, call.columns - c);
  alignas(64) T tile[kTile * kTile];
  x += r * call.columns + c;
  out += c * call.rows + r;
  transpose_into(x, call.columns, tile, rows, columns);
  if (call.stream && rows == kTile) {
    for (int64_t i = 0; i < columns; ++i) stream_row(tile + i * kTile, out + i * call.rows);
  } else {
    for (int64_t i = 0; i < columns; ++i) std::copy_n(tile + i * kTile, rows, out + i * call.rows);
  }
}

// One unit of work is kTile columns of x, that is kTile rows of out: sequential writes.
template <class T>
void transpose(const Call<T>& call) {
  const int64_t strips = (call.columns + kTile - 1) / kTile;
  torch::stable::parallel_for(0, call.batch * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = i / strips * call.rows * call.columns;
      for (int64_t r = 0; r < call.rows; r += kTile)
        transpose_tile(call, call.x + offset, call.out + offset, r, i % strips * kTile);
    }
    if (call.stream) finish_streams();
  });
}

// Whether every row of out begins with a cache line, which goes past the caches whole or not at
// all.
bool has_whole_lines(const void* out, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(row_bytes)) % kLine == 0;
}

template <class T>
void transpose(const Tensor& x, const Tensor& out, int64_t first) {
  const int64_t batch = x.size(0), rows = x.size(1), columns = x.size(2);
  T* to = static_cast<T*>(out.mutable_data_ptr()) + first * rows * columns;
  const bool lines = has_whole_lines(to, rows * static_cast<int64_t>(sizeof(T)));
  transpose(Call<T>{static_cast<const T*>(x.const_data_ptr()), to, batch, rows, columns,
                    lines && goes_past_caches(out)});
}

}  // namespace

void transpose_(const Tensor& x, const Tensor& out, int64_t first) {
  constexpr const char* op = "transpose_";
  check_dense(op, "x", x, x.dim() == 3 && x.is_contiguous(), "matrices [B, R, C]",
              ", contiguous, ");
  const int64_t images = out.dim() == 3 ? out.size(0) : 0;
  check_tensor(op, "out", out, x.scalar_type(), {images, x.size(2), x.size(1)});
  STD_TORCH_CHECK(first >= 0 && first + x.size(0) <= images, op, ": expected out to have matrices ",
                  first, " to ", first + x.size(0) - 1, ", got ", describe(out));
  check_disjoint(op, "out", out, "x", x);
  switch (x.element_size()) {
    case 8:
      return transpose<int64_t>(x, out, first);
    case 4:
      return transpose<int32_t>(x, out, first);
    default:
      return transpose<int16_t>(x, out, first);
  }
}

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("transpose_", TORCH_BOX(&transpose_));
}

}  // namespace fused_bottleneck::cpu
