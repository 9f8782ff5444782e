// 3x3 convolutions of ops.cpp on CPU by Winograd's F(2x2, 3x3), float32, stride 1, padding 1.
//
// FLOPs: 4 pixels * depth * channels * 2 in the products, 2.25 times fewer than a direct
// convolution. Bytes: x and y once; the transformed weight once for a block of tiles.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../stable_utils.h"
#include "blocking.h"
#include "kernels.h"
#include "products.h"
#include "winograd.h"

namespace fused_bottleneck::cpu {
namespace {

// Tiles of a block: their 16 products of inputs and values share the L2 cache with a small
// transformed weight; a large one is to be read for many tiles.
constexpr int64_t kSmallWeightBytes = 512 * 1024;
constexpr int64_t kFewTiles = 48;
constexpr int64_t kManyTiles = 96;
// Tiles whose products are summed in float32 before the sum goes on in double.
constexpr int64_t kSummedTiles = 396;

const WinogradKernels& winograd_kernels() {
  kernels_in_use();  // throws where there are none
  return *capability().winograd;
}

struct Images {
  int64_t count, height, width, channels;
  const float* data;

  int64_t tiles() const { return count * ((height + 1) / 2) * ((width + 1) / 2); }
  TileRange range(const Block& block) const {
    return {height, width, channels, block.begin, block.rows};
  }
};

// A float32 tensor [N, H, W, C] whose channels the panels can hold.
Images images(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 4 &&
                      t.is_contiguous() && t.numel() > 0 && t.size(3) % kChannelMultiple == 0,
                  op, ": expected ", name, " to be float32 [N, H, W, C], C a multiple of ",
                  kChannelMultiple, ", contiguous, on the CPU, got ", describe(t));
  return {t.size(0), t.size(1), t.size(2), t.size(3), static_cast<const float*>(t.const_data_ptr())};
}

int64_t tile_limit(int64_t depth, int64_t channels) {
  const int64_t bytes = kPositions * depth * channels * static_cast<int64_t>(sizeof(float));
  return bytes <= kSmallWeightBytes ? kFewTiles : kManyTiles;
}

Blocks conv_blocks(int64_t tiles, int64_t depth, int64_t channels) {
  return Blocks(tiles, thread_count(), tile_limit(depth, channels));
}

// Floats of one position of a block.
int64_t panel_floats(const Blocks& blocks, int64_t depth) {
  return round_up(depth * left_stride(blocks.block), kAlignment) + kAlignment / 4;
}
int64_t value_floats(const Blocks& blocks, int64_t channels) {
  return round_up(blocks.block * channels, kAlignment) + kAlignment / 4;
}

int64_t sums_floats(const Blocks& blocks, int64_t left, int64_t right) {
  return round_up(left * left_stride(blocks.block) + right * right_stride(blocks.block),
                  kAlignment);
}

Blocks grad_blocks(int64_t tiles, int64_t left, int64_t right) {
  return Blocks(tiles, summing_threads(kPositions * left * right), kSummedTiles);
}

// What a convolution of `tiles` tiles, or the gradient of its weight, needs.
int64_t winograd_workspace(int64_t tiles, int64_t depth, int64_t channels) {
  const int64_t weight = kPositions * depth * channels, wide = std::max(depth, channels);
  const Blocks conv = conv_blocks(tiles, depth, channels);
  const Blocks grad = grad_blocks(tiles, wide, wide);
  const int64_t of_conv =
      round_up(weight, kAlignment) +
      conv.threads * kPositions * (panel_floats(conv, wide) + value_floats(conv, wide));
  const int64_t of_grad =
      grad.threads * (sums_floats(grad, wide, wide) + 2 * round_up(weight, kAlignment));
  return std::max(of_conv, of_grad) * static_cast<int64_t>(sizeof(float)) + kAlignment;
}

// The weight [K, C, 3, 3] with any strides as U; transposed: as that of the gradient of the input.
void pack_weight(const Tensor& weight, bool transposed, float* panels) {
  const int64_t out = weight.size(transposed ? 1 : 0), in = weight.size(transposed ? 0 : 1);
  const auto* data = static_cast<const float*>(weight.const_data_ptr());
  const int64_t row = weight.stride(2), column = weight.stride(3);
  const TransformWeight call{in,
                             out,
                             transposed ? data + 2 * (row + column) : data,
                             weight.stride(transposed ? 1 : 0),
                             weight.stride(transposed ? 0 : 1),
                             transposed ? -row : row,
                             transposed ? -column : column,
                             panels,
                             in * out};
  const int64_t count = (out + kPanelMultiple - 1) / kPanelMultiple;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    winograd_kernels().transform_weight(call, begin * kPanelMultiple,
                                        std::min(end * kPanelMultiple, out));
  });
}

void winograd_conv_(const Tensor& x, const Tensor& weight, bool transposed, const Tensor& out,
                    const Tensor& lent) {
  constexpr const char* op = "winograd_conv_";
  const Images from = images(op, "x", x), to = images(op, "out", out);
  const int64_t depth = from.channels, channels = to.channels;
  const int64_t rows = transposed ? depth : channels, columns = transposed ? channels : depth;
  STD_TORCH_CHECK(from.count == to.count && from.height == to.height && from.width == to.width, op,
                  ": expected out to have the images of x, ", describe(x), ", got ", describe(out));
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Float &&
                      has_sizes(weight, {rows, columns, 3, 3}),
                  op, ": expected weight to be float32 [", rows, ", ", columns,
                  ", 3, 3], on the CPU, got ", describe(weight));
  check_disjoint(op, "out", out, "x", x);
  Workspace workspace(op, lent, winograd_workspace(from.tiles(), depth, channels));
  float* right = workspace.take<float>(kPositions * depth * channels);
  pack_weight(weight, transposed, right);
  const Blocks blocks = conv_blocks(from.tiles(), depth, channels);
  const int64_t panel = panel_floats(blocks, depth), value = value_floats(blocks, channels);
  float* arrays = workspace.take<float>(blocks.threads * kPositions * (panel + value));
  const int64_t stride = left_stride(blocks.block);
  auto* y = static_cast<float*>(out.mutable_data_ptr());
  const ProductKernels& products = kernels_in_use();
  const WinogradKernels& kernels = winograd_kernels();
  parallel_blocks(blocks, [&](const Block& block) {
    float* left = arrays + block.thread * kPositions * (panel + value);
    float* values = left + kPositions * panel;
    kernels.transform_input({from.range(block), from.data, stride, left, panel});
    for (int position = 0; position < kPositions; ++position)
      products.multiply({round_up(block.rows, kRowMultiple), depth, channels,
                         left + position * panel, stride, right + position * depth * channels,
                         values + position * value, {}});
    kernels.transform_output({to.range(block), values, value, y});
  });
}

Tensor winograd_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& lent) {
  constexpr const char* op = "winograd_weight_grad";
  const Images dy = images(op, "grad", grad), from = images(op, "x", x);
  STD_TORCH_CHECK(from.count == dy.count && from.height == dy.height && from.width == dy.width, op,
                  ": expected grad to have the images of x, ", describe(x), ", got ",
                  describe(grad));
  const int64_t left_channels = dy.channels, right_channels = from.channels;
  Workspace workspace(op, lent, winograd_workspace(dy.tiles(), right_channels, left_channels));
  const Blocks blocks = grad_blocks(dy.tiles(), left_channels, right_channels);
  const int64_t floats = sums_floats(blocks, left_channels, right_channels);
  float* arrays = workspace.take<float>(blocks.threads * floats);
  const int64_t position_step = round_up(left_channels * right_channels, kAlignment);
  const int64_t part_step = kPositions * position_step;
  double* sums = workspace.take<double>(blocks.threads * part_step);
  const int64_t left_rows = left_stride(blocks.block), right_rows = right_stride(blocks.block);
  const ProductKernels& products = kernels_in_use();
  const WinogradKernels& kernels = winograd_kernels();
  parallel_blocks(blocks, [&](const Block& block) {
    float* left = arrays + block.thread * floats;
    float* right = left + left_channels * left_rows;
    for (int position = 0; position < kPositions; ++position) {
      kernels.pack_grad_position({dy.range(block), dy.data, position, left_rows, left});
      kernels.pack_input_position({from.range(block), from.data, position, right_rows, right});
      products.accumulate({block.rows, left_channels, right_channels, left, left_rows, right,
                           right_rows, false, block.first,
                           sums + block.thread * part_step + position * position_step, {}});
    }
  });
  Tensor out = torch::stable::new_empty(grad, {left_channels, 3, 3, right_channels});
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, left_channels / kLeft, 1, [&](int64_t begin, int64_t end) {
    kernels.transform_sums({begin * kLeft, end * kLeft, right_channels, sums, position_step,
                            blocks.threads, part_step, to});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("winograd_conv_", TORCH_BOX(&winograd_conv_));
  m.impl("winograd_weight_grad", TORCH_BOX(&winograd_weight_grad));
}

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CompositeExplicitAutograd, m) {
  m.impl("winograd_workspace", TORCH_BOX(&winograd_workspace));
}

}  // namespace fused_bottleneck::cpu
