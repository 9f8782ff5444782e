// The interface between the fused 1x1 products (products.cpp, pixel_products.cpp) and their
// micro-kernels (products_impl.h), compiled once per instruction set; plain data only, as in
// kernels.h.
//
// A 1x1 convolution of pixels is a matrix product. A block of pixels goes through the caches once:
// its operands are packed into panels while they are read (the prologue), multiplied out of the L2
// cache, and the block of values, still there, goes through a row kernel of kernels.h (the
// epilogue). No wide intermediate touches memory.
//
// Panels, of words of 32 bits, channels in multiples of kChannelMultiple. A word holds one float32,
// or two bfloat16 that follow each other along what a product sums over: rows and depths count
// words there.
//   left   [channels / kLeft][stride][kLeft]: a block of rows, one element broadcast at a time
//   right  [channels / width][stride][width]: read in whole vectors; width is 2 vectors, and 1 for
//          what is left of the channels. Panel c begins at c * stride.
#pragma once

#include <cstdint>

namespace fused_bottleneck::cpu {

constexpr int64_t kChannelMultiple = 16;
constexpr int64_t kWordBytes = 4;
constexpr int64_t kLeft = 8;
constexpr int64_t kPanelMultiple = 32;  // of the widest right panel
// Of a product over pixels: the right panels that are to stay in a core's L2 cache.
constexpr int64_t kNarrowBytes = 384 * 1024;
// Rows of a left block are padded with zeros to a multiple of this (12 or 6 rows to a tile).
constexpr int64_t kRowMultiple = 12;

// rows x channels of a row-major matrix, source_stride elements from row to row.
struct PackRows {
  const void* source;
  int64_t rows, channels, source_stride;
  int64_t stride;       // of the panels, in words; at least those of `rows` (left: rounded up)
  const uint8_t* mask;  // left only, whole rows: elements without their bit are zero; or null
  float* panels;
  double* sums;                   // left only: column sums are added here; null: not wanted
  const float* scales = nullptr;  // right only, float32: of the rows; null: one
};

// A weight seen as [depth, channels] with any strides: rows depth_begin .. of right panels whose
// stride is total_depth.
struct PackWeight {
  const void* source;
  int64_t depth, channels, depth_stride, channel_stride;
  int64_t depth_begin, total_depth;
  float* panels;
};

// Memory that is wanted soon: asked for while a product computes, a few lines at each step.
constexpr int kAheads = 3;
struct Ahead {
  const void* at = nullptr;
  int64_t bytes = 0;
};

// values [rows, channels] = left [rows, depth] times right [depth, channels]; depth in words.
struct Multiply {
  int64_t rows, depth, channels;
  const float* left;
  int64_t left_stride;
  const float* right;
  float* values;
  Ahead ahead[kAheads];
};

// Sums of products over pixels, in the kernels' own layout, [left_channels * right_channels]; see
// unpack_sums. float32 or double: one of the two is null.
struct Sums {
  float* floats = nullptr;
  double* doubles = nullptr;

  Sums operator+(int64_t offset) const {
    return {floats == nullptr ? nullptr : floats + offset,
            doubles == nullptr ? nullptr : doubles + offset};
  }
};

// sums (+)= left^T right over `rows` words from word `begin` of the panels on: float32 within the
// call, or, of float32 words, double (sums too).
struct Accumulate {
  int64_t begin, rows, left_channels, right_channels;
  const float* left;
  int64_t left_stride;
  const float* right;
  int64_t right_stride;
  bool in_double;
  bool upper;  // left and right are the same matrix: tiles below the diagonal are left out
  bool first;  // sums has no content yet
  Sums sums;
  Ahead ahead[kAheads];
};

// out[l * left_step + r * right_step] = sums of (l, r) over `parts` arrays of sums, `part_step`
// numbers apart, in order; for left channels [begin, end), multiples of kLeft. One of the steps is
// 1. With `upper`, what is below the diagonal's tiles is left alone.
struct UnpackSums {
  int64_t begin, end, right_channels;
  Sums sums;
  int64_t parts, part_step;
  bool upper;
  int64_t left_step, right_step;
  Sums out;
};

// out [rows, channels] = values, or values + addend + shift; addend and out as the operands are.
struct WriteValues {
  int64_t rows, channels;
  const float* values;
  void* out;
  const void* addend = nullptr;
  const float* shift = nullptr;
};

struct ProductKernels {
  int64_t per_word;  // elements in a word
  // For accumulate: words of rows; for multiply: words of channels, pack_depth with its mask only.
  void (*pack_left)(const PackRows&);
  void (*pack_depth)(const PackRows&);
  void (*pack_right)(const PackRows&);
  // Channels [begin, end); begin a multiple of kPanelMultiple, end too or the last.
  void (*pack_weight)(const PackWeight&, int64_t begin, int64_t end);
  void (*multiply)(const Multiply&);
  void (*accumulate)(const Accumulate&);
  void (*unpack_sums)(const UnpackSums&);
  void (*write_values)(const WriteValues&);
};

namespace isa_avx2 {
extern const ProductKernels product_kernels;
}
namespace isa_avx512 {
extern const ProductKernels product_kernels;
}
namespace isa_avx512_bf16 {
extern const ProductKernels product_kernels;
}

}  // namespace fused_bottleneck::cpu
