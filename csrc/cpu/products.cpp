// The fused 1x1 products of ops.cpp on CPU, float32 or bfloat16: blocks of pixels through the
// caches, each from its operands through the product to an epilogue.
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

// Of a product's values and matrices of that dtype.
const Kernels& row_kernels(ScalarType dtype) {
  const Dtype index = dtype == ScalarType::BFloat16 ? Dtype::bfloat16_of_values : Dtype::float32;
  return capability().kernels[static_cast<int>(index)];
}

// --- product: values = [a | a2] [weight; weight2], block by block, each block to an epilogue ---

class Product {
 public:
  Product(const char* op, const Tensor& a, const Tensor& weight)
      : op_(op),
        rows(matrix_rows(a)),
        channels(product_channels(op, "weight", weight)),
        dtype(product_dtype(a)),
        kernels(product_kernels_for(dtype)) {
    add("a", a, "weight", weight);
  }

  void add(const char* name, const Tensor& a, const char* weight_name, const Tensor& weight) {
    sources_.push_back(product_matrix(op_, name, a, dtype, rows));
    weights_.push_back(
        product_weight(op_, weight_name, weight, dtype, matrix_channels(a), channels));
    depth_ += matrix_channels(a);
  }

  // What an epilogue reads of its rows besides the values: fetched while they are computed.
  void reads(const void* matrix) {
    if (matrix != nullptr)
      epilogue_reads_.push_back({static_cast<const char*>(matrix), channels, row_bytes()});
  }

  // epilogue(block, values [rows, channels]), float32; blocks run in parallel.
  template <class Epilogue>
  void run(const Blocks& blocks, const Tensor& lent, const Epilogue& epilogue) {
    run_into(nullptr, blocks, lent, epilogue);
  }

  // The values into a matrix [rows, channels]; then epilogue(block, its rows there).
  template <class Epilogue>
  void run_to(void* to, const Blocks& blocks, const Tensor& lent, const Epilogue& epilogue) {
    float* in_place = dtype == ScalarType::Float ? static_cast<float*>(to) : nullptr;
    run_into(in_place, blocks, lent, [&](const Block& block, const float* values) {
      void* rows = row_of(to, block.begin);
      if (values != rows) kernels.write_values({block.rows, channels, values, rows});
      epilogue(block, rows);
    });
  }

  Blocks blocks() const { return product_blocks(rows, depth_, channels); }

  // A row of a matrix [rows, channels] that may be absent.
  void* row_of(void* matrix, int64_t row) const {
    return matrix == nullptr ? nullptr : static_cast<char*>(matrix) + row * row_bytes();
  }
  const void* row_of(const void* matrix, int64_t row) const {
    return row_of(const_cast<void*>(matrix), row);
  }

 private:
  int64_t row_bytes() const {
    return channels * static_cast<int64_t>(kWordBytes / kernels.per_word);
  }

  // A block of whole tiles is computed where it belongs, if there is such a place.
  template <class Epilogue>
  void run_into(float* to, const Blocks& blocks, const Tensor& lent, const Epilogue& epilogue) {
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
      for (const ProductMatrix& source : sources_) {
        kernels.pack_depth({source.row(block.begin), block.rows, source.channels, source.channels,
                            stride, nullptr, next, nullptr});
        next += source.channels / kernels.per_word * stride;
      }
      Multiply call{round_up(block.rows, kRowMultiple),
                    depth_ / kernels.per_word,
                    channels,
                    left,
                    stride,
                    right,
                    values,
                    {}};
      look_ahead(block, call.ahead);
      kernels.multiply(call);
      epilogue(block, values);
    });
  }

  // The epilogue's rows of this block, and the sources' of the next one.
  void look_ahead(const Block& block, Ahead* ahead) const {
    const Ahead* end = ahead + kAheads;
    for (const ProductMatrix& read : epilogue_reads_)
      if (ahead != end) *ahead++ = read.rows(block.begin, block.rows);
    for (const ProductMatrix& source : sources_)
      if (ahead != end) *ahead++ = source.rows(block.begin + block.rows, block.next_rows);
  }

  const float* pack_weights(Workspace& workspace) {
    float* panels = workspace.take<float>(depth_ * channels);
    int64_t depth_begin = 0;
    for (PackWeight weight : weights_) {
      weight.depth_begin = depth_begin;
      weight.total_depth = depth_;
      weight.panels = panels;
      pack(kernels, weight);
      depth_begin += weight.depth;
    }
    return panels;
  }

  const char* op_;
  std::vector<ProductMatrix> sources_;
  std::vector<PackWeight> weights_;
  std::vector<ProductMatrix> epilogue_reads_;
  int64_t depth_ = 0;

 public:
  const int64_t rows, channels;
  const ScalarType dtype;
  const ProductKernels& kernels;
};

}  // namespace

void product_(const Tensor& a, const Tensor& weight, const Tensor& out, const Tensor& workspace) {
  Product product("product_", a, weight);
  check_matrix("product_", "out", out, product.dtype, product.rows, product.channels);
  check_disjoint("product_", "out", out, "a", a);
  product.run_to(out.mutable_data_ptr(), product.blocks(), workspace,
                 [](const Block&, const void*) {});
}

void product_add_(const Tensor& a, const Tensor& weight, const Tensor& addend,
                  const OptionalTensor& shift, const Tensor& out, const Tensor& workspace) {
  constexpr const char* op = "product_add_";
  Product product(op, a, weight);
  Arguments args(op, "addend", addend);
  check_matrix(op, "addend", addend, product.dtype, product.rows, product.channels);
  const auto* shifts = static_cast<const float*>(args.vector_or(0, "shift", shift));
  void* to = args.output("out", out, {{"a", a}});
  product.run(product.blocks(), workspace, [&](const Block& block, const float* values) {
    product.kernels.write_values({block.rows, product.channels, values,
                                  product.row_of(to, block.begin),
                                  product.row_of(addend.const_data_ptr(), block.begin), shifts});
  });
}

std::tuple<Tensor, Tensor> product_moments_(const Tensor& a, const Tensor& weight,
                                            const Tensor& out, const Tensor& workspace) {
  Product product("product_moments_", a, weight);
  const Arguments args("product_moments_", "out", out);
  check_matrix("product_moments_", "out", out, product.dtype, product.rows, product.channels);
  check_disjoint("product_moments_", "out", out, "a", a);
  void* to = out.mutable_data_ptr();
  const Kernels& kernels = row_kernels(product.dtype);
  const Blocks blocks = product.blocks();
  const Partials partials(blocks.count(), product.channels);
  std::vector<int64_t> sizes(blocks.count(), 0);
  product.run_to(to, blocks, workspace, [&](const Block& block, const void* rows) {
    sizes[block.index] = block.rows;
    kernels.channel_moments({product.channels, rows}, 0, block.rows, partials.first(block.index),
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
  check_matrix(op, "out", out, product.dtype, product.rows, product.channels);
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
  const auto kernel = row_kernels(product.dtype).residual_relu;
  product.reads(whole.residual);
  product.run(product.blocks(), workspace, [&](const Block& block, const float* values) {
    ResidualRelu call = whole;
    call.y = values;
    call.residual = product.row_of(whole.residual, block.begin);
    call.out = product.row_of(whole.out, block.begin);
    call.mask = whole.mask + block.begin * mask_stride;
    kernel(call, 0, block.rows);
  });
}

void product_masked_add_(const Tensor& a, const Tensor& weight, const Tensor& grad_out,
                         const Tensor& mask, const Tensor& out, const Tensor& workspace) {
  constexpr const char* op = "product_masked_add_";
  Product product(op, a, weight);
  const Arguments args(op, "out", out);
  check_matrix(op, "out", out, product.dtype, product.rows, product.channels);
  const MaskedAdd whole{product.channels,
                        nullptr,
                        args.matrix("grad_out", grad_out),
                        args.mask(mask),
                        args.output("out", out, {{"a", a}, {"grad_out", grad_out}, {"mask", mask}}),
                        goes_past_caches(out)};
  const int64_t mask_stride = (product.channels + 7) / 8;
  const auto kernel = row_kernels(product.dtype).masked_add;
  product.reads(whole.grad_out);
  product.run(product.blocks(), workspace, [&](const Block& block, const float* values) {
    MaskedAdd call = whole;
    call.value = values;
    call.grad_out = product.row_of(whole.grad_out, block.begin);
    call.mask = whole.mask + block.begin * mask_stride;
    call.out = product.row_of(whole.out, block.begin);
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
  check_matrix(op, "y", y, product.dtype, product.rows, product.channels);
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
  const auto kernel = row_kernels(product.dtype).bn_backward_reduce;
  const Blocks blocks = product.blocks();
  const Partials partials(blocks.count(), product.channels);
  std::fill_n(partials.first(0), 2 * blocks.count() * product.channels, 0.0);
  product.reads(whole.y);
  product.reads(whole.addend);
  product.run(blocks, workspace, [&](const Block& block, const float* values) {
    BnBackwardReduce call = whole;
    call.grad = values;
    call.addend = product.row_of(whole.addend, block.begin);
    call.y = product.row_of(whole.y, block.begin);
    call.g = product.row_of(whole.g, block.begin);
    kernel(call, 0, block.rows, partials.first(block.index), partials.second(block.index));
  });
  return sum_both_parts(args, partials);
}

bool has_products() { return capability().products != nullptr; }
bool has_pair_products() { return capability().pair_products != nullptr; }

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
  m.impl("has_pair_products", TORCH_BOX(&has_pair_products));
  m.impl("product_workspace", TORCH_BOX(&workspace_bytes));
}

}  // namespace fused_bottleneck::cpu
