// 3x3 convolutions of ops.cpp on CPU by Winograd's minimal filtering, float32, padding 1, stride 1
// or 2; the schemes are in winograd.h.
//
// FLOPs: 2.25 (stride 1) or 1.44 (stride 2) times fewer products than a direct convolution. Bytes:
// x and y once; the transformed weight once for a block of tiles.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "../stable_utils.h"
#include "blocking.h"
#include "cpu_ops.h"
#include "kernels.h"
#include "products.h"
#include "winograd.h"

namespace fused_bottleneck::cpu {
namespace {

// Tiles of a block: few keep the transformed tiles near the L2 cache; a transformed weight that
// itself comes from memory is to be read for many. Measured: flat within 10 %.
constexpr int64_t kSmallWeightBytes = 8 * 1024 * 1024;
constexpr int64_t kFewTiles = 48;
constexpr int64_t kManyTiles = 132;
// Where a thread has all its tiles in one block, so much of a transformed weight at a time, by
// output channels. Measured for 512 channels: a third less memory, the same time.
constexpr int64_t kSliceFloats = 2 * 1024 * 1024;
// Tiles whose products are summed in float32 before the sum goes on (see has_few_blocks).
constexpr int64_t kSummedTiles = 396;

const WinogradKernels& winograd_kernels(WinogradScheme scheme) {
  kernels_in_use();  // throws where there are none
  return capability().winograd[static_cast<int>(scheme)];
}

WinogradScheme scheme_of(const char* op, int64_t stride, bool transposed) {
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": expected stride to be 1 or 2, got ", stride);
  if (stride == 1) return WinogradScheme::forward;
  return transposed ? WinogradScheme::strided_grad : WinogradScheme::strided;
}

struct Images {
  int64_t count, height, width, channels;
  const float* data;
};

// A float32 tensor [N, H, W, C] whose channels the panels can hold.
Images images(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 4 &&
                      t.is_contiguous() && t.numel() > 0 && t.size(3) % kChannelMultiple == 0,
                  op, ": expected ", name, " to be float32 [N, H, W, C], C a multiple of ",
                  kChannelMultiple, ", contiguous, on the CPU, got ", describe(t));
  return {t.size(0), t.size(1), t.size(2), t.size(3),
          static_cast<const float*>(t.const_data_ptr())};
}

// Throws unless `small` has the size that a convolution of that stride makes of `large`; `got` is
// the argument to blame, one of the two.
void check_sizes(const char* op, const char* name, const Images& large, const Images& small,
                 int64_t stride, const Tensor& got) {
  const int64_t height = (large.height - 1) / stride + 1, width = (large.width - 1) / stride + 1;
  const bool is_small = got.const_data_ptr() == small.data;
  const std::string sizes =
      is_small
          ? shape_name(std::initializer_list<int64_t>{large.count, height, width, small.channels})
          : "images of which a stride of " + std::to_string(stride) + " makes " +
                shape_name(std::initializer_list<int64_t>{small.count, small.height, small.width});
  STD_TORCH_CHECK(small.count == large.count && small.height == height && small.width == width, op,
                  ": expected ", name, " to be ", sizes, ", got ", describe(got));
}

int64_t tile_count(int64_t count, int64_t height, int64_t width, int outputs) {
  return count * ((height + outputs - 1) / outputs) * ((width + outputs - 1) / outputs);
}

bool overhangs(int64_t pixels, const WinogradKernels& kernels) {
  return pixels % kernels.outputs != 0;
}

// The range of a block's tiles, with its classes in the order right, whole, below, corner.
TileRange tile_range(const Images& from, const Images& to, const Block& block, int outputs) {
  const int64_t across = (to.width + outputs - 1) / outputs, whole_across = to.width / outputs;
  const int64_t down = (to.height + outputs - 1) / outputs, whole_down = to.height / outputs;
  int64_t tiles[kTileClasses] = {};
  for (int64_t tile = block.begin; tile < block.begin + block.rows; ++tile) {
    const bool over = tile % across >= whole_across, under = tile / across % down >= whole_down;
    ++tiles[under ? (over ? kCorner : kBelow) : (over ? kRight : kWhole)];
  }
  TileRange range{from.height, from.width,  from.channels, to.height, to.width,
                  to.channels, block.begin, block.rows,    {}};
  range.first_of[kWhole] = tiles[kRight];
  range.first_of[kBelow] = range.first_of[kWhole] + tiles[kWhole];
  range.first_of[kCorner] = range.first_of[kBelow] + tiles[kBelow];
  return range;
}

// The part of the images that `tiles` tiles from `begin` on of `to` cover, whose tiles are
// `pixels` rows apart in `of`.
Ahead lines_of(const Images& of, const Images& to, int64_t pixels, int outputs, int64_t begin,
               int64_t tiles) {
  if (tiles == 0) return {};
  const int64_t across = (to.width + outputs - 1) / outputs;
  const int64_t down = (to.height + outputs - 1) / outputs;
  const auto line = [&](int64_t row) {
    return row / down * of.height + std::min(row % down * pixels, of.height);
  };
  const int64_t first = line(begin / across), last = line((begin + tiles - 1) / across + 1);
  const int64_t floats = of.width * of.channels;
  return {of.data + first * floats, (last - first) * floats * static_cast<int64_t>(sizeof(float))};
}

// The part-th of so many equal parts.
Ahead part_of(const Ahead& whole, int part, int parts) {
  const int64_t begin = whole.bytes * part / parts, end = whole.bytes * (part + 1) / parts;
  return {static_cast<const char*>(whole.at) + begin, end - begin};
}

// Rows [begin, end) of the panels that have a product at a position.
struct Rows {
  Rows(const WinogradKernels& kernels, const TileRange& range, int position) {
    // Whether the last tile of a line of so many pixels has it, too.
    const auto in_last = [&](int64_t pixels, int at) {
      const int64_t outputs = pixels % kernels.outputs;
      return outputs == 0 || (kernels.needed.positions[outputs] >> at & 1) != 0;
    };
    const bool in_right = in_last(range.out_width, position % kernels.points);
    const bool in_below = in_last(range.out_height, position / kernels.points);
    begin = in_right ? 0 : range.first_of[kWhole];
    end = in_below ? (in_right ? range.count : range.first_of[kCorner]) : range.first_of[kBelow];
  }

  int64_t count() const { return end - begin; }

  int64_t begin, end;
};

// How one call is cut up, and the memory that it takes.
struct Plan {
  Plan(const WinogradKernels& kernels, int64_t tiles, int64_t depth, int64_t channels)
      : positions(kernels.points * kernels.points),
        weights(kernels.weights * kernels.weights),
        blocks(tiles, thread_count(), tile_limit(weights * depth * channels)),
        slice(blocks.per_thread == 1 ? slice_channels(weights * depth, channels) : channels),
        weight(round_up(depth * slice, kAlignment)),
        rows(blocks.block + kRowMultiple),
        panel(round_up(depth * left_stride(rows), kAlignment)),
        value(round_up(rows * slice, kAlignment)) {}

  int64_t thread_floats() const { return positions * (panel + value); }
  int64_t bytes() const {
    const int64_t floats = weights * weight + blocks.threads * thread_floats();
    return floats * static_cast<int64_t>(sizeof(float)) + kAlignment;
  }

  static int64_t tile_limit(int64_t weight) {
    const bool small = weight * static_cast<int64_t>(sizeof(float)) <= kSmallWeightBytes;
    return small ? kFewTiles : kManyTiles;
  }

  static int64_t slice_channels(int64_t weight_of_channel, int64_t channels) {
    const int64_t slices = (weight_of_channel * channels + kSliceFloats - 1) / kSliceFloats;
    return std::min(round_up((channels + slices - 1) / slices, kPanelMultiple), channels);
  }

  int positions, weights;
  Blocks blocks;
  int64_t slice;         // channels whose weight is transformed at a time
  int64_t weight;        // floats of one of the weights, for a slice
  int64_t rows;          // room for the last of a position's rows to begin anywhere
  int64_t panel, value;  // floats of one position
};

// The same for the gradient of the weight.
struct GradPlan {
  GradPlan(const WinogradKernels& kernels, int64_t tiles, int64_t left, int64_t right)
      : positions(kernels.points * kernels.points),
        weights(kernels.weights * kernels.weights),
        left_panels(kernels.one_grad ? 1 : kernels.points),
        right_panels(kernels.points),
        split(Split::of(weights * left * right)),
        blocks(tiles, split.row_parts, kSummedTiles),
        left(round_up(left * left_stride(blocks.block), kAlignment)),
        right(round_up(right * right_stride(blocks.block), kAlignment)),
        sums(round_up(left * right, kAlignment)),
        float_sums(has_few_blocks(blocks)) {}

  int64_t thread_floats() const { return left_panels * left + right_panels * right; }
  int64_t workers() const { return blocks.threads * split.channel_parts; }
  int64_t bytes() const {
    return workers() * thread_floats() * static_cast<int64_t>(sizeof(float)) +
           blocks.threads * weights * sums *
               static_cast<int64_t>(float_sums ? sizeof(float) : sizeof(double)) +
           kAlignment;
  }

  int positions, weights, left_panels, right_panels;  // panels: of a row of positions
  Split split;
  Blocks blocks;
  int64_t left, right, sums;  // floats of a block's panels, numbers of one weight
  bool float_sums;
};

// Products per pair of channels that a scheme takes for the weight's gradient, dy [count, height,
// width].
int64_t grad_products(WinogradScheme scheme, int64_t count, int64_t height, int64_t width) {
  const WinogradKernels& kernels = winograd_kernels(scheme);
  const auto along = [&](int64_t pixels) {
    const int last = kernels.needed.positions[pixels % kernels.outputs];
    return pixels / kernels.outputs * kernels.points + __builtin_popcount(last);
  };
  return count * along(height) * along(width);
}

// Simpler transforms are worth so many more products.
constexpr double kWorthOfDirect = 1.2;

WinogradScheme grad_scheme(const char* op, int64_t stride, int64_t count, int64_t height,
                           int64_t width) {
  const WinogradScheme scheme = scheme_of(op, stride, false);
  if (scheme != WinogradScheme::strided) return scheme;
  const auto direct = grad_products(WinogradScheme::direct, count, height, width);
  const auto strided = static_cast<double>(grad_products(scheme, count, height, width));
  return direct < kWorthOfDirect * strided ? WinogradScheme::direct : scheme;
}

}  // namespace

// Enough for a convolution with an output (if transposed: gradient of the input) [N, H, W, C] from
// `depth` channels, and for the gradient of its weight.
int64_t winograd_workspace(int64_t count, int64_t height, int64_t width, int64_t depth,
                           int64_t channels, int64_t stride, bool transposed) {
  constexpr const char* op = "winograd_workspace";
  const WinogradKernels& kernels = winograd_kernels(scheme_of(op, stride, transposed));
  STD_TORCH_CHECK(count > 0 && height > 0 && width > 0 && depth > 0 && channels > 0,
                  "winograd_workspace: expected count, height, width, depth and channels to be "
                  "positive, got ",
                  count, ", ", height, ", ", width, ", ", depth, ", ", channels);
  const WinogradKernels& grad = winograd_kernels(grad_scheme(op, stride, count, height, width));
  return std::max(
      Plan(kernels, tile_count(count, height, width, kernels.outputs), depth, channels).bytes(),
      GradPlan(grad, tile_count(count, height, width, grad.outputs), channels, depth).bytes());
}

namespace {

// `out` output channels from `first` on of the weight [K, C, 3, 3] with any strides as U;
// transposed: as that of the gradient of the input, turned where the scheme does not turn it
// itself.
void pack_weight(const WinogradKernels& kernels, const Tensor& weight, bool transposed, bool turned,
                 int64_t first, int64_t out, float* panels, int64_t weight_step) {
  const int64_t in = weight.size(transposed ? 0 : 1);
  const auto* data = static_cast<const float*>(weight.const_data_ptr()) +
                     first * weight.stride(transposed ? 1 : 0);
  const int64_t row = weight.stride(2), column = weight.stride(3);
  const TransformWeight call{in,
                             out,
                             turned ? data + 2 * (row + column) : data,
                             weight.stride(transposed ? 1 : 0),
                             weight.stride(transposed ? 0 : 1),
                             turned ? -row : row,
                             turned ? -column : column,
                             panels,
                             weight_step};
  const int64_t count = (out + kPanelMultiple - 1) / kPanelMultiple;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    kernels.transform_weight(call, begin * kPanelMultiple, std::min(end * kPanelMultiple, out));
  });
}

// The prologue from its arguments, all or none of which are vectors of x's channels; zeros stand in
// for an absent beta.
class GivenPrologue {
 public:
  GivenPrologue(const char* op, int64_t channels, const OptionalTensor& mean,
                const OptionalTensor& scale, const OptionalTensor& beta)
      : op_(op), channels_(channels) {
    STD_TORCH_CHECK(
        mean.has_value() == scale.has_value() && (mean.has_value() || !beta.has_value()), op,
        ": expected mean and scale together, and beta with them only");
    if (!mean.has_value()) return;
    if (!beta.has_value()) zeros_.assign(channels, 0.0f);
    value_ = {vector("mean", *mean), vector("scale", *scale),
              beta.has_value() ? vector("beta", *beta) : zeros_.data()};
  }

  const Prologue& value() const { return value_; }

 private:
  const float* vector(const char* name, const Tensor& t) const {
    check_tensor(op_, name, t, ScalarType::Float, {channels_});
    return static_cast<const float*>(t.const_data_ptr());
  }

  const char* op_;
  int64_t channels_;
  std::vector<float> zeros_;
  Prologue value_;
};

}  // namespace

void winograd_conv_(const Tensor& x, const Tensor& weight, int64_t stride, bool transposed,
                    const Tensor& out, const Tensor& lent, const OptionalTensor& mean,
                    const OptionalTensor& scale, const OptionalTensor& beta) {
  constexpr const char* op = "winograd_conv_";
  const WinogradScheme scheme = scheme_of(op, stride, transposed);
  const WinogradKernels& kernels = winograd_kernels(scheme);
  const Images from = images(op, "x", x), to = images(op, "out", out);
  const int64_t depth = from.channels, channels = to.channels;
  check_sizes(op, "out", transposed ? to : from, transposed ? from : to, stride, out);
  const int64_t rows = transposed ? depth : channels, columns = transposed ? channels : depth;
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Float &&
                      has_sizes(weight, {rows, columns, 3, 3}),
                  op, ": expected weight to be float32 [", rows, ", ", columns,
                  ", 3, 3], on the CPU, got ", describe(weight));
  check_disjoint(op, "out", out, "x", x);
  const GivenPrologue prologue(op, depth, mean, scale, beta);
  const Plan plan(kernels, tile_count(to.count, to.height, to.width, kernels.outputs), depth,
                  channels);
  Workspace workspace(op, lent, plan.bytes());
  float* right = workspace.take<float>(plan.weights * plan.weight);
  float* arrays = workspace.take<float>(plan.blocks.threads * plan.thread_floats());
  const int64_t panel_rows = left_stride(plan.rows);
  const bool turned = transposed && scheme == WinogradScheme::forward;
  const bool over = overhangs(to.height, kernels) || overhangs(to.width, kernels);
  auto* y = static_cast<float*>(out.mutable_data_ptr());
  const ProductKernels& products = kernels_in_use();
  for (int64_t first = 0; first < channels; first += plan.slice) {
    const int64_t slice = std::min(plan.slice, channels - first);
    pack_weight(kernels, weight, transposed, turned, first, slice, right, plan.weight);
    const auto compute = [&](const Block& block) {
      float* left = arrays + block.worker * plan.thread_floats();
      float* values = left + plan.positions * plan.panel;
      const TileRange range = tile_range(from, to, block, kernels.outputs);
      const int64_t padded = over ? block.rows + kRowMultiple : round_up(block.rows, kRowMultiple);
      if (first == 0)
        kernels.transform_input(
            {range, padded, from.data, prologue.value(), panel_rows, left, plan.panel});
      // Fetched while the products compute: what the next block reads, and what this one writes.
      const Ahead next = lines_of(from, to, kernels.step, kernels.outputs, block.begin + block.rows,
                                  block.next_rows);
      const Ahead written =
          lines_of(to, to, kernels.outputs, kernels.outputs, block.begin, block.rows);
      for (int position = 0; position < plan.positions; ++position) {
        const Rows rows(kernels, range, position);
        if (rows.count() == 0) continue;
        products.multiply({round_up(rows.count(), kRowMultiple),
                           depth,
                           slice,
                           left + position * plan.panel + rows.begin * kLeft,
                           panel_rows,
                           right + kernels.weight_of(position) * plan.weight,
                           values + position * plan.value + rows.begin * slice,
                           {part_of(next, position, plan.positions),
                            part_of(written, position, plan.positions)}});
      }
      kernels.transform_output({range, values, plan.value, first, slice, y});
    };
    // The next slice finds the transformed input where this one left it.
    if (plan.slice < channels) {
      parallel_blocks(plan.blocks, compute);
    } else {
      parallel_free_blocks(plan.blocks, compute);
    }
  }
}

void winograd_weight_grad_into(const Tensor& grad, const Tensor& x, int64_t stride,
                               const Tensor& out, const Tensor& lent, const OptionalTensor& mean,
                               const OptionalTensor& scale, const OptionalTensor& beta) {
  constexpr const char* op = "winograd_weight_grad";
  const Images dy = images(op, "grad", grad), from = images(op, "x", x);
  const WinogradKernels& kernels =
      winograd_kernels(grad_scheme(op, stride, dy.count, dy.height, dy.width));
  check_sizes(op, "grad", from, dy, stride, grad);
  const GivenPrologue prologue(op, from.channels, mean, scale, beta);
  const GradPlan plan(kernels, tile_count(dy.count, dy.height, dy.width, kernels.outputs),
                      dy.channels, from.channels);
  Workspace workspace(op, lent, plan.bytes());
  float* arrays = workspace.take<float>(plan.workers() * plan.thread_floats());
  const int64_t part_step = plan.weights * plan.sums;
  const Sums sums = workspace.take_sums(plan.blocks.threads * part_step, plan.float_sums);
  const int64_t left_rows = left_stride(plan.blocks.block);
  const int64_t right_rows = right_stride(plan.blocks.block);
  const ProductKernels& products = kernels_in_use();
  parallel_blocks(plan.blocks, plan.split.channel_parts, [&](const Block& block) {
    float* left = arrays + block.worker * plan.thread_floats();
    float* right = left + plan.left_panels * plan.left;
    const TileRange range = tile_range(from, dy, block, kernels.outputs);
    const ChannelRange channels(dy.channels, plan.split.channel_parts, block.part);
    const Sums to = sums + block.share * part_step + channels.begin * from.channels;
    for (int position = 0; position < plan.positions; ++position) {
      const int row = position / kernels.points, column = position % kernels.points;
      if (column == 0) {
        if (row == 0 || !kernels.one_grad)
          kernels.pack_grad_row(
              {range, dy.data, {}, row, channels.begin, channels.end, left_rows, left, plan.left});
        kernels.pack_input_row({range, from.data, prologue.value(), row, 0, from.channels,
                                right_rows, right, plan.right});
      }
      const Rows rows(kernels, range, position);
      products.accumulate({rows.begin,
                           rows.count(),
                           channels.size(),
                           from.channels,
                           left + column % plan.left_panels * plan.left,
                           left_rows,
                           right + column % plan.right_panels * plan.right,
                           right_rows,
                           false,
                           false,
                           block.first && kernels.is_first_of_weight(position),
                           to + kernels.weight_of(position) * plan.sums,
                           {}});
    }
  });
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, dy.channels / kLeft, 1, [&](int64_t begin, int64_t end) {
    kernels.transform_sums({begin * kLeft, end * kLeft, from.channels, sums, plan.sums,
                            plan.blocks.threads, part_step, to});
  });
}

Tensor winograd_weight_grad(const Tensor& grad, const Tensor& x, int64_t stride,
                            const Tensor& workspace, const OptionalTensor& mean,
                            const OptionalTensor& scale, const OptionalTensor& beta) {
  constexpr const char* op = "winograd_weight_grad";
  const int64_t width = images(op, "grad", grad).channels, depth = images(op, "x", x).channels;
  Tensor out = torch::stable::new_empty(grad, {width, 3, 3, depth});
  winograd_weight_grad_into(grad, x, stride, out, workspace, mean, scale, beta);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("winograd_conv_", TORCH_BOX(&winograd_conv_));
  m.impl("winograd_weight_grad", TORCH_BOX(&winograd_weight_grad));
}

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CompositeExplicitAutograd, m) {
  m.impl("winograd_workspace", TORCH_BOX(&winograd_workspace));
}

}  // namespace fused_bottleneck::cpu
