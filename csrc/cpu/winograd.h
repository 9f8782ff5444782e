// The interface between the 3x3 convolutions of winograd.cpp and their kernels (winograd_impl.h);
// plain data only, as in kernels.h. float32, padding 1.
//
// Winograd's minimal filtering (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks",
// 2015): a tile of outputs comes from a tile of inputs through fewer products than a direct
// convolution takes. Along one dimension, with input d, weight g and output y, and per pair of
// channels in two dimensions,
//   V = Bt d,  U = G g,  y = At (sum over channels of U * V),
// so that a convolution is one matrix product per position of the transformed tile. The gradient of
// the weight is Gt (sum over tiles of (A dy) * V). The schemes, their coefficients in
// winograd_impl.h:
//
//   scheme        inputs  positions  outputs  products of a direct convolution
//   forward       4       4          2        6     F(2, 3); with a turned weight also the gradient
//   strided       5       5          2        6     stride 2: F(2, 2) on even, direct on odd inputs
//   strided_grad  3       5          4        6     the gradient of its input
//   direct        3       3          1        3     stride 2, for the gradient of the weight of
//                                                   images that larger tiles overhang
//
// In two dimensions all counts are squared: 16 products for 36, 25 for 36, and 9 for 9. The odd
// inputs of both strided schemes have two positions with the same U, which is kept once: 4 weights
// for 5 positions, along one dimension.
//
// Where the last tile of a line overhangs the image, some positions lead to outputs outside of it
// only, and have no product for that tile: at 7x7 225 for 16 * 16.
#pragma once

#include <cstdint>

#include "products.h"

namespace fused_bottleneck::cpu {

// How a tile lies in its image: whole, over its right edge, its lower edge, or both.
enum TileClass : int { kWhole, kRight, kBelow, kCorner };
constexpr int kTileClasses = 4;

// positions[n], bit p: position p of a line leads to one of its first n outputs.
constexpr int kMostOutputs = 4;
struct Needed {
  uint8_t positions[kMostOutputs + 1];
};

enum class WinogradScheme : int { forward, strided, strided_grad, direct };
constexpr int kWinogradSchemes = 4;

// Images [in_height, in_width, in_channels] and [out_height, out_width, out_channels], and output
// tiles [begin, begin + count) of them, which are numbered row by row, image by image. The panels
// have the tiles by class, those of a class in this order: the rows of all classes but those which
// a position does not need are contiguous.
struct TileRange {
  int64_t in_height, in_width, in_channels;
  int64_t out_height, out_width, out_channels;
  int64_t begin, count;
  int64_t first_of[kTileClasses];  // row of a class's first tile: right, whole, below, corner
};

// Per channel, for relu((x - mean) * scale + beta) instead of x, before the padding; null: x
// itself.
struct Prologue {
  const float* mean = nullptr;
  const float* scale = nullptr;
  const float* beta = nullptr;
};

// V of a range of tiles as left panels, one array per position; rows up to `padded` are zero.
struct TransformInput {
  TileRange tiles;
  int64_t padded;
  const float* x;
  Prologue prologue;
  int64_t stride;  // of the panels, in rows
  float* panels;
  int64_t position_step;
};

// U as right panels, one array per weight (see weight_of).
struct TransformWeight {
  int64_t depth, channels;
  const float* weight;
  int64_t channel_stride, depth_stride, row_stride, column_stride;
  float* panels;
  int64_t weight_step;
};

// Channels [begin, begin + channels) of y of a range of tiles, from values [count, channels] per
// position.
struct TransformOutput {
  TileRange tiles;
  const float* values;
  int64_t position_step;
  int64_t begin, channels;
  float* y;
};

// A row of positions of V as right panels, or of A dy (without prologue) as left panels, for
// channels [begin, end).
struct PackRow {
  TileRange tiles;
  const float* source;
  Prologue prologue;
  int row;
  int64_t begin, end;
  int64_t stride;
  float* panels;
  int64_t position_step;
};

// The weight's gradient [left, 3, 3, right] from sums per weight (as of Accumulate) of `parts`
// threads, for left channels [begin, end), multiples of kLeft.
struct TransformSums {
  int64_t begin, end, right_channels;
  Sums sums;
  int64_t weight_step, parts, part_step;
  float* weight;
};

struct WinogradKernels {
  // Along one dimension; step: how many input pixels from tile to tile.
  int points, outputs, weights, step;
  Needed needed;
  bool one_grad;  // A dy is the same at all positions: only the first is packed
  // Of a convolution; null where the scheme is not for that.
  void (*transform_input)(const TransformInput&);
  void (*transform_weight)(const TransformWeight&, int64_t begin, int64_t end);
  void (*transform_output)(const TransformOutput&);
  // Of the gradient of the weight; null where the scheme has none.
  void (*pack_input_row)(const PackRow&);
  void (*pack_grad_row)(const PackRow&);
  void (*transform_sums)(const TransformSums&);

  // Along one dimension the last positions have the last weight.
  int weight_of(int position) const {
    const int row = position / points, column = position % points, last = weights - 1;
    return weights * (row < last ? row : last) + (column < last ? column : last);
  }
  // Whether no position before it has its weight.
  bool is_first_of_weight(int position) const {
    return position / points < weights && position % points < weights;
  }
};

// Indexed by WinogradScheme.
namespace isa_avx2 {
extern const WinogradKernels winograd_kernels[kWinogradSchemes];
}
namespace isa_avx512 {
extern const WinogradKernels winograd_kernels[kWinogradSchemes];
}

}  // namespace fused_bottleneck::cpu
