// The fused 1x1 products of ops.cpp on CPU, float32: blocks of pixels through the caches.
//
// FLOPs: 2 rows * depth * channels each. Bytes: every operand and every result once.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "blocking.h"
#include "kernels.h"
#include "products.h"

namespace fused_bottleneck::cpu {
namespace {

// What stays in a core's L2 cache: the operands and values of a block of a product, and the
// operands of the next one.
constexpr int64_t kBlockBytes = 768 * 1024;
constexpr int64_t kLeftBytes = 400 * 1024;
// Rows that are summed in float32 before the sum goes on (see has_few_blocks); a block of them in a
// product over pixels, whose wide operand is read once per cache line and may come from the L3
// cache.
constexpr int64_t kMaxRows = 396;
// A result larger than this goes past the caches: little of it would still be there at its use.
constexpr int64_t kStreamBytes = 24 * 1024 * 1024;
static_assert(kMaxRows % kRowMultiple == 0);

int64_t row_limit(int64_t bytes, int64_t floats_per_row) {
  const int64_t rows = bytes / (floats_per_row * static_cast<int64_t>(sizeof(float)));
  return std::clamp(rows / kRowMultiple * kRowMultiple, kRowMultiple, kMaxRows);
}

const Kernels& row_kernels() { return capability().kernels[static_cast<int>(Dtype::float32)]; }

// --- blocks and workspace ---

Blocks product_blocks(int64_t rows, int64_t depth, int64_t channels) {
  return Blocks(rows, thread_count(), row_limit(kBlockBytes, 2 * depth + channels));
}

Blocks pixel_blocks(int64_t rows, const Split& split) {
  return Blocks(rows, split.row_parts, kMaxRows);
}

// Floats of one thread's panels and values.
int64_t product_floats(const Blocks& blocks, int64_t depth, int64_t channels) {
  return round_up(depth * left_stride(blocks.block) + channels * blocks.block, kAlignment);
}

int64_t pixel_floats(const Blocks& blocks, int64_t wide, int64_t narrow) {
  return round_up(wide * left_stride(blocks.block) + narrow * right_stride(blocks.block) +
                      row_limit(kLeftBytes, wide) * narrow,
                  kAlignment);
}

int64_t product_total(int64_t rows, int64_t depth, int64_t channels) {
  const Blocks blocks = product_blocks(rows, depth, channels);
  return blocks.threads * product_floats(blocks, depth, channels);
}

int64_t pixel_total(int64_t rows, int64_t wide, int64_t narrow, const Split& split) {
  const Blocks blocks = pixel_blocks(rows, split);
  return blocks.threads * (split.channel_parts * pixel_floats(blocks, wide, narrow) +
                           2 * round_up(wide * narrow, kAlignment));  // sums are double
}

// What any product of [rows, depth] and [depth, channels], either way round or over pixels, needs.
int64_t workspace_bytes(int64_t rows, int64_t depth, int64_t channels) {
  STD_TORCH_CHECK(rows > 0 && depth > 0 && channels > 0,
                  "product_workspace: expected rows, depth and channels to be positive, got ", rows,
                  ", ", depth, ", ", channels);
  const int64_t wide = std::max(depth, channels), narrow = std::min(depth, channels);
  const int64_t floats =
      std::max({product_total(rows, depth, channels), product_total(rows, channels, depth),
                pixel_total(rows, wide, narrow, Split::of(wide * narrow)),
                pixel_total(rows, depth, channels, Split::by_rows(depth * channels)),
                pixel_total(rows, channels, depth, Split::by_rows(depth * channels))});
  return (floats + round_up(depth * channels, kAlignment)) * static_cast<int64_t>(sizeof(float)) +
         kAlignment;
}

// --- operands ---

// A float32 matrix [rows, channels] whose channels the panels can hold.
const float* product_matrix(const char* op, const char* name, const Tensor& t, int64_t rows) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && is_matrix(t) &&
                      t.numel() > 0 && matrix_rows(t) == rows &&
                      matrix_channels(t) % kChannelMultiple == 0,
                  op, ": expected ", name, " to be float32 [", rows, ", C], C a multiple of ",
                  kChannelMultiple, kMatrixLayout, "on the CPU, got ", describe(t));
  return static_cast<const float*>(t.const_data_ptr());
}

// A float32 weight [depth, channels] with any strides.
PackWeight product_weight(const char* op, const char* name, const Tensor& t, int64_t depth,
                          int64_t channels) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 2 &&
                      t.size(0) == depth && t.size(1) == channels,
                  op, ": expected ", name, " to be float32 [", depth, ", ", channels,
                  "], on the CPU, got ", describe(t));
  return {static_cast<const float*>(t.const_data_ptr()),
          depth,
          channels,
          t.stride(0),
          t.stride(1),
          0,
          depth,
          nullptr};
}

int64_t product_channels(const char* op, const char* name, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) > 0 && weight.size(1) % kChannelMultiple == 0,
                  op, ": expected ", name, " to be [K, C], C a multiple of ", kChannelMultiple,
                  ", got ", describe(weight));
  return weight.size(1);
}

void pack(const PackWeight& weight) {
  const ProductKernels& kernels = kernels_in_use();
  const int64_t panels = (weight.channels + kPanelMultiple - 1) / kPanelMultiple;
  torch::stable::parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
    kernels.pack_weight(weight, begin * kPanelMultiple,
                        std::min(end * kPanelMultiple, weight.channels));
  });
}

// --- product: values = [a | a2] [weight; weight2], block by block, each block to an epilogue ---

class Product {
 public:
  Product(const char* op, const Tensor& a, const Tensor& weight)
      : op_(op), rows(matrix_rows(a)), channels(product_channels(op, "weight", weight)) {
    add("a", a, "weight", weight);
  }

  void add(const char* name, const Tensor& a, const char* weight_name, const Tensor& weight) {
    sources_.push_back({product_matrix(op_, name, a, rows), matrix_channels(a)});
    weights_.push_back(product_weight(op_, weight_name, weight, matrix_channels(a), channels));
    depth_ += matrix_channels(a);
  }

  // What an epilogue reads of its rows besides the values: fetched while they are computed.
  void reads(const void* matrix, int64_t row_bytes) {
    if (matrix != nullptr) epilogue_reads_.push_back({matrix, row_bytes});
  }

  // epilogue(block, values [rows, channels]); blocks run in parallel.
  template <class Epilogue>
  void run(const Blocks& blocks, const Tensor& lent, const Epilogue& epilogue) {
    const ProductKernels& kernels = kernels_in_use();
    Workspace workspace(op_, lent, workspace_bytes(rows, depth_, channels));
    const float* right = pack_weights(workspace);
    const int64_t floats = product_floats(blocks, depth_, channels);
    float* panels = workspace.take<float>(blocks.threads * floats);
    const int64_t stride = left_stride(blocks.block);
    parallel_blocks(blocks, [&](const Block& block) {
      float* left = panels + block.worker * floats;
      float* values = left + depth_ * stride;
      float* next = left;
      for (const Source& source : sources_) {
        kernels.pack_left({source.data + block.begin * source.channels, block.rows, source.channels,
                           source.channels, stride, nullptr, next, nullptr});
        next += source.channels * stride;
      }
      Multiply call{
          round_up(block.rows, kRowMultiple), depth_, channels, left, stride, right, values, {}};
      look_ahead(block, call.ahead);
      kernels.multiply(call);
      epilogue(block, values);
    });
  }

  Blocks blocks() const { return product_blocks(rows, depth_, channels); }

 private:
  struct Source {
    const float* data;
    int64_t channels;
  };

  struct Read {
    const void* matrix;
    int64_t row_bytes;
  };

  // The epilogue's rows of this block, and the sources' of the next one.
  void look_ahead(const Block& block, Ahead* ahead) const {
    const Ahead* end = ahead + kAheads;
    for (const Read& read : epilogue_reads_)
      if (ahead != end)
        *ahead++ = {static_cast<const char*>(read.matrix) + block.begin * read.row_bytes,
                    block.rows * read.row_bytes};
    for (const Source& source : sources_)
      if (ahead != end)
        *ahead++ = {source.data + (block.begin + block.rows) * source.channels,
                    block.next_rows * source.channels * static_cast<int64_t>(sizeof(float))};
  }

  const float* pack_weights(Workspace& workspace) {
    float* panels = workspace.take<float>(depth_ * channels);
    int64_t depth_begin = 0;
    for (PackWeight weight : weights_) {
      weight.depth_begin = depth_begin;
      weight.total_depth = depth_;
      weight.panels = panels;
      pack(weight);
      depth_begin += weight.depth;
    }
    return panels;
  }

  const char* op_;
  std::vector<Source> sources_;
  std::vector<PackWeight> weights_;
  std::vector<Read> epilogue_reads_;
  int64_t depth_ = 0;

 public:
  const int64_t rows, channels;
};

bool goes_past_caches(const Tensor& out) { return out.numel() * out.element_size() > kStreamBytes; }

// A pointer to row `row` of a float32 matrix that may be absent.
const float* row_of(const void* matrix, int64_t row, int64_t channels) {
  return matrix == nullptr ? nullptr : static_cast<const float*>(matrix) + row * channels;
}

void product_(const Tensor& a, const Tensor& weight, const Tensor& out, const Tensor& workspace) {
  Product product("product_", a, weight);
  check_matrix("product_", "out", out, ScalarType::Float, product.rows, product.channels);
  check_disjoint("product_", "out", out, "a", a);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  product.run(product.blocks(), workspace, [&](const Block& block, const float* values) {
    std::copy_n(values, block.rows * product.channels, to + block.begin * product.channels);
  });
}

void product_add_(const Tensor& a, const Tensor& weight, const Tensor& addend,
                  const OptionalTensor& shift, const Tensor& out, const Tensor& workspace) {
  constexpr const char* op = "product_add_";
  Product product(op, a, weight);
  Arguments args(op, "addend", addend);
  check_matrix(op, "addend", addend, ScalarType::Float, product.rows, product.channels);
  const auto* added = static_cast<const float*>(addend.const_data_ptr());
  const auto* shifts = static_cast<const float*>(args.vector_or(0, "shift", shift));
  auto* to = static_cast<float*>(args.output("out", out, {{"a", a}}));
  const int64_t channels = product.channels;
  product.run(product.blocks(), workspace, [&](const Block& block, const float* values) {
    for (int64_t row = 0; row < block.rows; ++row) {
      const int64_t at = (block.begin + row) * channels;
      for (int64_t c = 0; c < channels; ++c)
        to[at + c] = values[row * channels + c] + added[at + c] + shifts[c];
    }
  });
}

std::tuple<Tensor, Tensor> product_moments_(const Tensor& a, const Tensor& weight,
                                            const Tensor& out, const Tensor& workspace) {
  Product product("product_moments_", a, weight);
  const Arguments args("product_moments_", "out", out);
  check_matrix("product_moments_", "out", out, ScalarType::Float, product.rows, product.channels);
  check_disjoint("product_moments_", "out", out, "a", a);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const Kernels& kernels = row_kernels();
  const Blocks blocks = product.blocks();
  const Partials partials(blocks.count(), product.channels);
  std::vector<int64_t> sizes(blocks.count(), 0);
  product.run(blocks, workspace, [&](const Block& block, const float* values) {
    std::copy_n(values, block.rows * product.channels, to + block.begin * product.channels);
    sizes[block.index] = block.rows;
    kernels.channel_moments({product.channels, values}, 0, block.rows, partials.first(block.index),
                            partials.second(block.index));
  });
  int64_t before = sizes[0];
  for (int64_t block = 1; block < blocks.count(); ++block) {
    if (sizes[block] == 0) continue;
    kernels.merge_moments(product.channels, before, partials.first(0), partials.second(0),
                          sizes[block], partials.first(block), partials.second(block));
    before += sizes[block];
  }
  return {to_vector(args, partials.first(0)), to_vector(args, partials.second(0))};
}

void product_residual_relu_(const Tensor& a, const Tensor& weight, const OptionalTensor& a2,
                            const OptionalTensor& weight2, const Tensor& shift,
                            const OptionalTensor& residual, const Tensor& out, const Tensor& mask,
                            const Tensor& workspace) {
  constexpr const char* op = "product_residual_relu_";
  Product product(op, a, weight);
  Arguments args(op, "out", out);
  args.together("a2", a2, "weight2", weight2);
  if (a2.has_value()) product.add("a2", *a2, "weight2", *weight2);
  check_matrix(op, "out", out, ScalarType::Float, product.rows, product.channels);
  const ResidualRelu whole{product.channels,
                           nullptr,
                           args.vector_or(0, "mean", std::nullopt),
                           args.vector_or(1, "scale", std::nullopt),
                           args.vector("shift", shift),
                           args.matrix("residual", residual),
                           args.output("out", out, {{"a", a}, {"a2", a2}, {"residual", residual}}),
                           args.mask_output(mask, {{"residual", residual}, {"out", out}}),
                           goes_past_caches(out)};
  const int64_t mask_stride = (product.channels + 7) / 8;
  const auto kernel = row_kernels().residual_relu;
  product.reads(whole.residual, product.channels * sizeof(float));
  product.run(product.blocks(), workspace, [&](const Block& block, const float* values) {
    ResidualRelu call = whole;
    call.y = values;
    call.residual = row_of(whole.residual, block.begin, product.channels);
    call.out = static_cast<float*>(whole.out) + block.begin * product.channels;
    call.mask = whole.mask + block.begin * mask_stride;
    kernel(call, 0, block.rows);
  });
}

void product_masked_add_(const Tensor& a, const Tensor& weight, const Tensor& grad_out,
                         const Tensor& mask, const Tensor& out, const Tensor& workspace) {
  constexpr const char* op = "product_masked_add_";
  Product product(op, a, weight);
  const Arguments args(op, "out", out);
  check_matrix(op, "out", out, ScalarType::Float, product.rows, product.channels);
  const MaskedAdd whole{product.channels,
                        nullptr,
                        args.matrix("grad_out", grad_out),
                        args.mask(mask),
                        args.output("out", out, {{"a", a}, {"grad_out", grad_out}, {"mask", mask}}),
                        goes_past_caches(out)};
  const int64_t mask_stride = (product.channels + 7) / 8;
  const auto kernel = row_kernels().masked_add;
  product.reads(whole.grad_out, product.channels * sizeof(float));
  product.run(product.blocks(), workspace, [&](const Block& block, const float* values) {
    MaskedAdd call = whole;
    call.value = values;
    call.grad_out = row_of(whole.grad_out, block.begin, product.channels);
    call.mask = whole.mask + block.begin * mask_stride;
    call.out = static_cast<float*>(whole.out) + block.begin * product.channels;
    kernel(call, 0, block.rows);
  });
}

std::tuple<Tensor, Tensor> product_bn_backward_reduce_(
    const Tensor& a, const Tensor& weight, const OptionalTensor& addend,
    const OptionalTensor& shift, const Tensor& y, const Tensor& mean, const Tensor& invstd,
    const Tensor& scale, const OptionalTensor& beta, const Tensor& g, const Tensor& workspace) {
  constexpr const char* op = "product_bn_backward_reduce_";
  Product product(op, a, weight);
  Arguments args(op, "y", y);
  check_matrix(op, "y", y, ScalarType::Float, product.rows, product.channels);
  const BnBackwardReduce whole{product.channels,
                               nullptr,
                               args.matrix("addend", addend),
                               args.vector_or(0, "shift", shift),
                               y.const_data_ptr(),
                               args.vector("mean", mean),
                               args.vector("invstd", invstd),
                               args.vector("scale", scale),
                               args.vector_or(0, "beta", beta),
                               nullptr,
                               args.output("g", g, {{"a", a}, {"addend", addend}})};
  const auto kernel = row_kernels().bn_backward_reduce;
  const Blocks blocks = product.blocks();
  const Partials partials(blocks.count(), product.channels);
  std::fill_n(partials.first(0), 2 * blocks.count() * product.channels, 0.0);
  product.reads(whole.y, product.channels * sizeof(float));
  product.reads(whole.addend, product.channels * sizeof(float));
  product.run(blocks, workspace, [&](const Block& block, const float* values) {
    BnBackwardReduce call = whole;
    call.grad = values;
    call.addend = row_of(whole.addend, block.begin, product.channels);
    call.y = row_of(whole.y, block.begin, product.channels);
    call.g = static_cast<float*>(whole.g) + block.begin * product.channels;
    kernel(call, 0, block.rows, partials.first(block.index), partials.second(block.index));
  });
  return {sum_parts(args, blocks.count(), [&](int64_t block) { return partials.first(block); }),
          sum_parts(args, blocks.count(), [&](int64_t block) { return partials.second(block); })};
}

// --- products over pixels ---

// left^T right, left [rows, wide] and right [rows, narrow]: float32 within a block and over few, or
// double. Symmetric: left and right are the same; its sums are those of a covariance, double.
class PixelProduct {
 public:
  PixelProduct(int64_t rows, int64_t wide, int64_t narrow, const Split& split,
               bool symmetric = false, bool in_double = false)
      : split(split),
        blocks(pixel_blocks(rows, split)),
        left_rows(left_stride(blocks.block)),
        right_rows(right_stride(blocks.block)),
        wide_(wide),
        narrow_(narrow),
        symmetric_(symmetric),
        in_double_(in_double),
        float_sums_(!symmetric && has_few_blocks(blocks)) {}

  // Takes the panels of all threads and the sums.
  void take(Workspace& workspace) {
    floats_ = pixel_floats(blocks, wide_, narrow_);
    panels_ = workspace.take<float>(blocks.threads * split.channel_parts * floats_);
    sums_ = workspace.take_sums(blocks.threads * sums_step(), float_sums_);
  }

  // A thread's panels, and behind them room for values.
  float* left(const Block& block) const { return panels_ + block.worker * floats_; }
  float* right(const Block& block) const { return left(block) + wide_ * left_rows; }
  float* values(const Block& block) const { return right(block) + narrow_ * right_rows; }

  // The wide channels of the block's thread.
  ChannelRange channels(const Block& block) const {
    return ChannelRange(wide_, split.channel_parts, block.part);
  }

  // Adds the product of the panels of a block, and fetches the next rows of their sources.
  void add(const Block& block, const float* wide, const float* narrow) const {
    const ChannelRange range = channels(block);
    const bool whole = split.channel_parts == 1;
    kernels_in_use().accumulate(
        {0,
         block.rows,
         range.size(),
         narrow_,
         left(block),
         left_rows,
         right(block),
         right_rows,
         in_double_,
         symmetric_,
         block.first,
         sums_ + block.share * sums_step() + range.begin * narrow_,
         {whole ? next_rows(block, wide, wide_) : Ahead{}, next_rows(block, narrow, narrow_)}});
  }

  // [wide, narrow], or [narrow, wide] if transposed; on the device of `like`.
  Tensor total(const Tensor& like, bool transposed) const {
    const std::vector<int64_t> sizes =
        transposed ? std::vector<int64_t>{narrow_, wide_} : std::vector<int64_t>{wide_, narrow_};
    Tensor out = torch::stable::new_empty(like, sizes, ScalarType::Float);
    unpack({static_cast<float*>(out.mutable_data_ptr()), nullptr}, transposed);
    return out;
  }

  Tensor symmetric_total(const Tensor& like) const {
    Tensor out = torch::stable::new_empty(like, {wide_, wide_}, ScalarType::Double);
    double* to = static_cast<double*>(out.mutable_data_ptr());
    unpack({nullptr, to}, false);
    torch::stable::parallel_for(0, wide_ / kLeft, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kLeft; i < end * kLeft; i += kLeft)
        for (int64_t j = 0; j < i + kLeft; ++j)
          for (int64_t k = std::max(i, j + 1); k < i + kLeft; ++k)
            to[k * wide_ + j] = to[j * wide_ + k];
    });
    return out;
  }

  const Split split;
  const Blocks blocks;
  const int64_t left_rows, right_rows;  // of the panels

 private:
  int64_t sums_step() const { return round_up(wide_ * narrow_, kAlignment); }

  static Ahead next_rows(const Block& block, const float* matrix, int64_t channels) {
    if (matrix == nullptr) return {};
    return {matrix + (block.begin + block.rows) * channels,
            block.next_rows * channels * static_cast<int64_t>(sizeof(float))};
  }

  void unpack(const Sums& out, bool transposed) const {
    torch::stable::parallel_for(0, wide_ / kLeft, 8, [&](int64_t begin, int64_t end) {
      kernels_in_use().unpack_sums({begin * kLeft, end * kLeft, narrow_, sums_, blocks.threads,
                                    sums_step(), symmetric_, transposed ? 1 : narrow_,
                                    transposed ? wide_ : 1, out});
    });
  }

  int64_t wide_, narrow_, floats_ = 0;
  bool symmetric_, in_double_, float_sums_;
  float* panels_ = nullptr;
  Sums sums_;
};

Tensor transposed_product(const Tensor& a, const Tensor& b, const Tensor& lent) {
  constexpr const char* op = "transposed_product";
  check_matrix(op, "a", a);
  const int64_t rows = matrix_rows(a);
  const float* sources[] = {product_matrix(op, "a", a, rows), product_matrix(op, "b", b, rows)};
  const int64_t sizes[] = {matrix_channels(a), matrix_channels(b)};
  const bool swapped = sizes[0] < sizes[1];  // the narrower one on the right
  const int64_t wide = sizes[swapped], narrow = sizes[!swapped];
  PixelProduct product(rows, wide, narrow, Split::of(wide * narrow));
  Workspace workspace(op, lent, workspace_bytes(rows, wide, narrow));
  product.take(workspace);
  const ProductKernels& kernels = kernels_in_use();
  const float *from_wide = sources[swapped], *from_narrow = sources[!swapped];
  parallel_blocks(product.blocks, product.split.channel_parts, [&](const Block& block) {
    const ChannelRange range = product.channels(block);
    kernels.pack_left({from_wide + block.begin * wide + range.begin, block.rows, range.size(), wide,
                       product.left_rows, nullptr, product.left(block), nullptr});
    kernels.pack_right({from_narrow + block.begin * narrow, block.rows, narrow, narrow,
                        product.right_rows, nullptr, product.right(block), nullptr});
    product.add(block, from_wide, from_narrow);
  });
  return product.total(a, swapped);
}

std::tuple<Tensor, Tensor> symmetric_product(const char* op, const Tensor& d, const Tensor& lent,
                                             bool in_double) {
  check_matrix(op, "d", d);
  const int64_t rows = matrix_rows(d), channels = matrix_channels(d);
  const float* source = product_matrix(op, "d", d, rows);
  const Split split = Split::by_rows(channels * channels);
  PixelProduct product(rows, channels, channels, split, true, in_double);
  Workspace workspace(op, lent, workspace_bytes(rows, channels, channels));
  product.take(workspace);
  const int64_t threads = product.blocks.threads;
  const Partials sums(threads, channels);
  std::fill_n(sums.first(0), threads * channels, 0.0);
  const ProductKernels& kernels = kernels_in_use();
  parallel_blocks(product.blocks, [&](const Block& block) {
    const float* from = source + block.begin * channels;
    kernels.pack_left({from, block.rows, channels, channels, product.left_rows, nullptr,
                       product.left(block), sums.first(block.worker)});
    kernels.pack_right({from, block.rows, channels, channels, product.right_rows, nullptr,
                        product.right(block), nullptr});
    product.add(block, source, nullptr);
  });
  const auto thread_sums = [&](int64_t thread) { return sums.first(thread); };
  Tensor sum_d = torch::stable::new_empty(d, {channels}, ScalarType::Double);
  std::copy_n(add_parts(channels, threads, thread_sums), channels,
              static_cast<double*>(sum_d.mutable_data_ptr()));
  return {sum_d, product.symmetric_total(d)};
}

std::tuple<Tensor, Tensor> gram(const Tensor& d, const Tensor& workspace) {
  return symmetric_product("gram", d, workspace, false);
}

std::tuple<Tensor, Tensor> gram_in_double(const Tensor& d, const Tensor& workspace) {
  return symmetric_product("gram_in_double", d, workspace, true);
}

std::tuple<Tensor, Tensor> masked_products_(const Tensor& grad_out, const Tensor& mask,
                                            const Tensor& d, const Tensor& weight,
                                            const Tensor& out, const Tensor& lent) {
  constexpr const char* op = "masked_products_";
  const Arguments args(op, "grad_out", grad_out);
  const float* source = product_matrix(op, "grad_out", grad_out, args.rows);
  const uint8_t* bits = args.mask(mask);
  const float* from_d = product_matrix(op, "d", d, args.rows);
  const int64_t wide = args.channels, narrow = matrix_channels(d), mask_stride = (wide + 7) / 8;
  check_matrix(op, "out", out, ScalarType::Float, args.rows, narrow);
  check_disjoint(op, "out", out, "grad_out", grad_out);
  check_disjoint(op, "out", out, "d", d);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  PackWeight packed = product_weight(op, "weight", weight, wide, narrow);
  Workspace workspace(op, lent, workspace_bytes(args.rows, wide, narrow));
  packed.panels = workspace.take<float>(wide * narrow);
  pack(packed);
  PixelProduct s(args.rows, wide, narrow, Split::by_rows(wide * narrow));
  s.take(workspace);
  const Blocks& blocks = s.blocks;
  const Partials sums(blocks.threads, wide);
  const ProductKernels& kernels = kernels_in_use();
  const int64_t most = row_limit(kLeftBytes, wide);
  std::fill_n(sums.first(0), blocks.threads * wide, 0.0);
  parallel_blocks(blocks, [&](const Block& block) {
    float *left = s.left(block), *values = s.values(block);
    kernels.pack_left({source + block.begin * wide, block.rows, wide, wide, s.left_rows,
                       bits + block.begin * mask_stride, left, sums.first(block.worker)});
    kernels.pack_right({from_d + block.begin * narrow, block.rows, narrow, narrow, s.right_rows,
                        nullptr, s.right(block), nullptr});
    s.add(block, source, from_d);
    for (int64_t row = 0; row < block.rows; row += most) {
      const int64_t part = std::min(most, block.rows - row);
      kernels.multiply({round_up(part, kRowMultiple),
                        wide,
                        narrow,
                        left + row * kLeft,
                        s.left_rows,
                        packed.panels,
                        values,
                        {}});
      std::copy_n(values, part * narrow, to + (block.begin + row) * narrow);
    }
  });
  return {sum_parts(args, blocks.threads, [&](int64_t thread) { return sums.first(thread); }),
          s.total(grad_out, false)};
}

bool has_products() { return capability().products != nullptr; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("product_", TORCH_BOX(&product_));
  m.impl("product_add_", TORCH_BOX(&product_add_));
  m.impl("product_moments_", TORCH_BOX(&product_moments_));
  m.impl("product_residual_relu_", TORCH_BOX(&product_residual_relu_));
  m.impl("product_masked_add_", TORCH_BOX(&product_masked_add_));
  m.impl("product_bn_backward_reduce_", TORCH_BOX(&product_bn_backward_reduce_));
  m.impl("transposed_product", TORCH_BOX(&transposed_product));
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("gram_in_double", TORCH_BOX(&gram_in_double));
  m.impl("masked_products_", TORCH_BOX(&masked_products_));
}

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CompositeExplicitAutograd, m) {
  m.impl("has_products", TORCH_BOX(&has_products));
  m.impl("product_workspace", TORCH_BOX(&workspace_bytes));
}

}  // namespace fused_bottleneck::cpu
