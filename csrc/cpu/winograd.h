// The interface between the 3x3 convolutions of winograd.cpp and their kernels (winograd_impl.h);
// plain data only, as in kernels.h. float32, stride 1, padding 1.
//
// Winograd's F(2x2, 3x3), Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2015):
// an output tile of 2 x 2 pixels comes from an input tile of 4 x 4 through 16 products instead of
// 36. With d, g, y the tiles of input, weight and output, per pair of channels
//   V = Bt d B,  U = G g Gt,  y = At (sum over channels of U * V) A,
// so that a convolution is 16 matrix products, one per position of the 4 x 4 tile. The gradient of
// the weight is Gt (sum over tiles of (A dy At) * V) G.
#pragma once

#include <cstdint>

namespace fused_bottleneck::cpu {

constexpr int kPositions = 16;

// Images [height, width, channels], and tiles [begin, begin + count) of them, which are numbered row
// by row, image by image.
struct TileRange {
  int64_t height, width, channels;
  int64_t begin, count;
};

// V of a range of tiles as left panels, one array per position; rows up to kRowMultiple are zero.
struct TransformInput {
  TileRange tiles;
  const float* x;
  int64_t stride;  // of the panels, in rows
  float* panels;
  int64_t position_step;
};

// U as right panels, one array per position, for output channels [begin, end).
struct TransformWeight {
  int64_t depth, channels;
  const float* weight;
  int64_t channel_stride, depth_stride, row_stride, column_stride;
  float* panels;
  int64_t position_step;
};

// y of a range of tiles, from values [count, channels] per position.
struct TransformOutput {
  TileRange tiles;
  const float* values;
  int64_t position_step;
  float* y;
};

// One position of V as right panels, or of A dy At as left panels.
struct PackPosition {
  TileRange tiles;
  const float* source;
  int position;
  int64_t stride;
  float* panels;
};

// The weight's gradient [left, 3, 3, right] from sums per position (as of Accumulate) of `parts`
// threads, for left channels [begin, end).
struct TransformSums {
  int64_t begin, end, right_channels;
  const double* sums;
  int64_t position_step, parts, part_step;
  float* weight;
};

struct WinogradKernels {
  void (*transform_input)(const TransformInput&);
  void (*transform_weight)(const TransformWeight&, int64_t begin, int64_t end);
  void (*transform_output)(const TransformOutput&);
  void (*pack_input_position)(const PackPosition&);
  void (*pack_grad_position)(const PackPosition&);
  void (*transform_sums)(const TransformSums&);
};

namespace isa_avx2 {
extern const WinogradKernels winograd_kernels;
}
namespace isa_avx512 {
extern const WinogradKernels winograd_kernels;
}

}  // namespace fused_bottleneck::cpu
