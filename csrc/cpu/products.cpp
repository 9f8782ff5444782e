// The fused 1x1 products of ops.cpp on CPU, float32: blocks of pixels through the caches, each from
// its operands through the product to an epilogue.
//
// FLOPs: 2 rows * depth * channels each. Bytes: every operand and every result once.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu_ops.h"
#include "product_operands.h"

namespace fused_bottleneck::cpu {
namespace {

const Kernels& row_kernels() { return capability().kernels[static_cast<int>(Dtype::float32)]; }

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
    run_into(nullptr, blocks, lent, epilogue);
  }

  // The values into a matrix [rows, channels]; then epilogue(block, its rows there).
  template <class Epilogue>
  void run_to(float* to, const Blocks& blocks, const Tensor& lent, const Epilogue& epilogue) {
    run_into(to, blocks, lent, [&](const Block& block, const float* values) {
      float* rows = to + block.begin * channels;
      if (values != rows) std::copy_n(values, block.rows * channels, rows);
      epilogue(block, rows);
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

  // A block of whole tiles is computed where it belongs, if there is such a place.
  template <class Epilogue>
  void run_into(float* to, const Blocks& blocks, const Tensor& lent, const Epilogue& epilogue) {
    const ProductKernels& kernels = kernels_in_use();
    Workspace workspace(op_, lent, product_bytes(rows, depth_, channels));
    const float* right = pack_weights(workspace);
    const int64_t floats = product_floats(blocks, depth_, channels);
    float* panels = workspace.take<float>(blocks.threads * floats);
    const int64_t stride = left_stride(blocks.block);
    parallel_free_blocks(blocks, [&](const Block& block) {
      float* left = panels + block.worker * floats;
      float* values = left + depth_ * stride;
      if (to != nullptr && block.rows % kRowMultiple == 0) values = to + block.begin * channels;
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

// A pointer to row `row` of a float32 matrix that may be absent.
const float* row_of(const void* matrix, int64_t row, int64_t channels) {
  return matrix == nullptr ? nullptr : static_cast<const float*>(matrix) + row * channels;
}

}  // namespace

void product_(const Tensor& a, const Tensor& weight, const Tensor& out, const Tensor& workspace) {
  Product product("product_", a, weight);
  check_matrix("product_", "out", out, ScalarType::Float, product.rows, product.channels);
  check_disjoint("product_", "out", out, "a", a);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  product.run_to(to, product.blocks(), workspace, [](const Block&, const float*) {});
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
  product.run_to(to, blocks, workspace, [&](const Block& block, const float* values) {
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

bool has_products() { return capability().products != nullptr; }

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("product_", TORCH_BOX(&product_));
  m.impl("product_add_", TORCH_BOX(&product_add_));
  m.impl("product_moments_", TORCH_BOX(&product_moments_));
  m.impl("product_residual_relu_", TORCH_BOX(&product_residual_relu_));
  m.impl("product_masked_add_", TORCH_BOX(&product_masked_add_));
  m.impl("product_bn_backward_reduce_", TORCH_BOX(&product_bn_backward_reduce_));
}

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CompositeExplicitAutograd, m) {
  m.impl("has_products", TORCH_BOX(&has_products));
  m.impl("product_workspace", TORCH_BOX(&workspace_bytes));
}

}  // namespace fused_bottleneck::cpu
