// What the fused 1x1 products share: how they are cut up, the memory that they need, and their
// operands.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "arguments.h"
#include "blocking.h"
#include "products.h"

namespace fused_bottleneck::cpu {

// What stays in a core's L2 cache: the operands and values of a block of a product, and the
// operands of the next one.
constexpr int64_t kBlockBytes = 768 * 1024;
constexpr int64_t kLeftBytes = 400 * 1024;
// Rows that are summed in float32 before the sum goes on (see has_few_blocks); a block of them in a
// product over pixels, whose wide operand is read once per cache line and may come from the L3
// cache.
constexpr int64_t kMaxRows = 396;
static_assert(kMaxRows % kRowMultiple == 0);

inline int64_t row_limit(int64_t bytes, int64_t floats_per_row) {
  const int64_t rows = bytes / (floats_per_row * static_cast<int64_t>(sizeof(float)));
  return std::clamp(rows / kRowMultiple * kRowMultiple, kRowMultiple, kMaxRows);
}

// --- blocks and workspace ---

inline Blocks product_blocks(int64_t rows, int64_t depth, int64_t channels) {
  return Blocks(rows, thread_count(), row_limit(kBlockBytes, 2 * depth + channels));
}

inline Blocks pixel_blocks(int64_t rows, const Split& split) {
  return Blocks(rows, split.row_parts, kMaxRows);
}

// Words of one thread's panels and values; enough for bfloat16, which has half as many in a panel.
inline int64_t product_floats(const Blocks& blocks, int64_t depth, int64_t channels) {
  return round_up(depth * left_stride(blocks.block) + channels * blocks.block, kAlignment);
}

inline int64_t pixel_floats(const Blocks& blocks, int64_t wide, int64_t narrow) {
  return round_up(wide * left_stride(blocks.block) + narrow * right_stride(blocks.block) +
                      row_limit(kLeftBytes, wide) * narrow,
                  kAlignment);
}

inline int64_t product_total(int64_t rows, int64_t depth, int64_t channels) {
  const Blocks blocks = product_blocks(rows, depth, channels);
  return blocks.threads * product_floats(blocks, depth, channels);
}

inline int64_t pixel_total(int64_t rows, int64_t wide, int64_t narrow, const Split& split) {
  const Blocks blocks = pixel_blocks(rows, split);
  return blocks.threads * (split.channel_parts * pixel_floats(blocks, wide, narrow) +
                           2 * round_up(wide * narrow, kAlignment));  // sums are double
}

// A weight, which all of them pack but products over pixels alone.
inline int64_t bytes_with_weight(int64_t floats, int64_t weight) {
  return (floats + round_up(weight, kAlignment)) * static_cast<int64_t>(sizeof(float)) + kAlignment;
}

// What a product of [rows, depth] and [depth, channels] needs.
inline int64_t product_bytes(int64_t rows, int64_t depth, int64_t channels) {
  return bytes_with_weight(product_total(rows, depth, channels), depth * channels);
}

// One over pixels, with sums of all threads' own only where these are small.
inline int64_t transposed_bytes(int64_t rows, int64_t a, int64_t b) {
  return bytes_with_weight(pixel_total(rows, std::max(a, b), std::min(a, b), Split::of(a * b)), 0);
}

// One over pixels with sums of every thread's own, and a weight [left, right].
inline int64_t summed_bytes(int64_t rows, int64_t left, int64_t right) {
  return bytes_with_weight(pixel_total(rows, left, right, Split::by_rows(left * right)),
                           left * right);
}

// What any product of [rows, depth] and [depth, channels], either way round or over pixels, needs.
inline int64_t workspace_bytes(int64_t rows, int64_t depth, int64_t channels) {
  STD_TORCH_CHECK(rows > 0 && depth > 0 && channels > 0,
                  "product_workspace: expected rows, depth and channels to be positive, got ", rows,
                  ", ", depth, ", ", channels);
  return std::max({product_bytes(rows, depth, channels), product_bytes(rows, channels, depth),
                   transposed_bytes(rows, depth, channels), summed_bytes(rows, depth, channels),
                   summed_bytes(rows, channels, depth)});
}

// --- operands ---

// The dtype that a product's matrices are to have, by its first one.
inline ScalarType product_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float;
}

// Where rows of a matrix are.
struct ProductMatrix {
  const char* row(int64_t row) const { return data + row * row_bytes; }
  // Fetched soon: `count` rows.
  Ahead rows(int64_t from, int64_t count) const { return {row(from), count * row_bytes}; }

  const char* data;
  int64_t channels, row_bytes;
};

// A matrix [rows, channels] of that dtype, whose channels the panels can hold.
inline ProductMatrix product_matrix(const char* op, const char* name, const Tensor& t,
                                    ScalarType dtype, int64_t rows) {
  const int64_t channels = t.dim() > 1 ? matrix_channels(t) : 0;
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && is_matrix(t) && t.numel() > 0 &&
                      matrix_rows(t) == rows && channels % kChannelMultiple == 0,
                  op, ": expected ", name, " to be ", dtype_name(dtype), " [", rows,
                  ", C], C a multiple of ", kChannelMultiple, kMatrixLayout, "on the CPU, got ",
                  describe(t));
  return {static_cast<const char*>(t.const_data_ptr()), channels,
          channels * static_cast<int64_t>(t.element_size())};
}

// A weight [depth, channels] of that dtype with any strides.
inline PackWeight product_weight(const char* op, const char* name, const Tensor& t,
                                 ScalarType dtype, int64_t depth, int64_t channels) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == depth &&
                      t.size(1) == channels,
                  op, ": expected ", name, " to be ", dtype_name(dtype), " [", depth, ", ",
                  channels, "], on the CPU, got ", describe(t));
  return {t.const_data_ptr(), depth, channels, t.stride(0), t.stride(1), 0, depth, nullptr};
}

inline int64_t product_channels(const char* op, const char* name, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) > 0 && weight.size(1) % kChannelMultiple == 0,
                  op, ": expected ", name, " to be [K, C], C a multiple of ", kChannelMultiple,
                  ", got ", describe(weight));
  return weight.size(1);
}

inline void pack(const ProductKernels& kernels, const PackWeight& weight) {
  const int64_t panels = (weight.channels + kPanelMultiple - 1) / kPanelMultiple;
  torch::stable::parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
    kernels.pack_weight(weight, begin * kPanelMultiple,
                        std::min(end * kPanelMultiple, weight.channels));
  });
}

}  // namespace fused_bottleneck::cpu
