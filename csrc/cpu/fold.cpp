// The folds of a normalisation into the 1x1 convolution before it, of ops.cpp on CPU, float32: the
// algebra of algebra.py in one pass over the weights each way.
//
// FLOPs: rows * channels * (10 forward, 8 + channels backward, half a product). Bytes: the weight
// and each matrix of its shape once.
#include "fold.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu_ops.h"
#include "pixel_product.h"

namespace fused_bottleneck::cpu {
namespace {

constexpr int64_t kGrainRows = 64;

const FoldKernels& fold_kernels() {
  kernels_in_use();  // throws where there are none
  return *capability().folds;
}

// The arguments of a call around a weight [rows, channels].
class FoldArguments {
 public:
  FoldArguments(const char* op, const Tensor& weight) : op_(op), weight_(weight) {
    product_matrix(op, "weight", weight, ScalarType::Float, weight.dim() == 2 ? weight.size(0) : 0);
    rows = weight.size(0);
    channels = weight.size(1);
  }

  const float* sized(const char* name, const Tensor& t,
                     std::initializer_list<int64_t> sizes) const {
    check_tensor(op_, name, t, ScalarType::Float, sizes);
    return static_cast<const float*>(t.const_data_ptr());
  }

  const float* matrix(const char* name, const Tensor& t) const {
    return sized(name, t, {rows, channels});
  }
  const float* of_rows(const char* name, const Tensor& t) const { return sized(name, t, {rows}); }
  const float* of_channels(const char* name, const Tensor& t) const {
    return sized(name, t, {channels});
  }
  const float* of_rows(const char* name, const OptionalTensor& t) const {
    return t.has_value() ? of_rows(name, *t) : nullptr;
  }

  Tensor new_float(std::initializer_list<int64_t> sizes) const {
    return torch::stable::new_empty(weight_, std::vector<int64_t>(sizes), ScalarType::Float);
  }

  int64_t rows, channels;

 private:
  const char* op_;
  const Tensor& weight_;
};

float* data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fold_product(
    const Tensor& weight, const Tensor& weight_cov, const Tensor& cov, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& bias, double eps, const Tensor& centre,
    const Tensor& mean_d) {
  const FoldArguments args("fold_product", weight);
  const Tensor folded = args.new_float({args.rows, args.channels});
  const Tensor mean = args.new_float({args.rows}), var = args.new_float({args.rows}),
               invstd = args.new_float({args.rows}), offset = args.new_float({args.rows}),
               shift = args.new_float({args.rows});
  const float* from_cov = args.sized("cov", cov, {args.channels, args.channels});
  std::vector<float> variances(args.channels);
  for (int64_t c = 0; c < args.channels; ++c) variances[c] = from_cov[c * args.channels + c];
  const Fold call{args.channels,
                  args.matrix("weight", weight),
                  args.matrix("weight_cov", weight_cov),
                  variances.data(),
                  args.of_channels("centre", centre),
                  args.of_channels("mean_d", mean_d),
                  args.of_rows("gamma", gamma),
                  args.of_rows("beta", beta),
                  args.of_rows("bias", bias),
                  eps,
                  data(folded),
                  data(mean),
                  data(var),
                  data(invstd),
                  data(offset),
                  data(shift)};
  const int64_t parts = (args.rows + kGrainRows - 1) / kGrainRows;
  std::vector<double> cancellation(parts);
  const auto kernel = fold_kernels().fold;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      cancellation[part] =
          kernel(call, part * kGrainRows, std::min(args.rows, (part + 1) * kGrainRows));
  });
  const Tensor largest = torch::stable::new_empty(weight, {}, ScalarType::Double);
  *static_cast<double*>(largest.mutable_data_ptr()) =
      *std::max_element(cancellation.begin(), cancellation.end());
  return {folded, mean, var, invstd, offset, shift, largest};
}

namespace {

// -weight^T diag(k) weight, from factors -k.
Tensor weighted_square(const FoldArguments& args, const Tensor& weight, const float* factors,
                       Workspace& workspace) {
  const ProductMatrix source =
      product_matrix("fold_backward_", "weight", weight, ScalarType::Float, args.rows);
  const int64_t channels = args.channels;
  const Split split = Split::by_rows(channels * channels);
  const ProductKernels& kernels = kernels_in_use();
  PixelProduct product(kernels, args.rows, channels, channels, split, Symmetry::product);
  product.take(workspace);
  parallel_blocks(product.blocks, [&](const Block& block) {
    const char* from = source.row(block.begin);
    kernels.pack_left({from, block.rows, channels, channels, product.left_rows, nullptr,
                       product.left(block), nullptr});
    kernels.pack_right({from, block.rows, channels, channels, product.right_rows, nullptr,
                        product.right(block), nullptr, factors + block.begin});
    product.add(block, &source, nullptr);
  });
  return product.symmetric_total<float>(weight);
}

// -(sum_g / count) a - mean_d b.
Tensor operand_shift(const FoldArguments& args, const float* a, const float* b, const float* sum_g,
                     const float* mean_d, int64_t count) {
  std::vector<float> mean_g(args.rows);
  std::transform(sum_g, sum_g + args.rows, mean_g.begin(),
                 [&](float sum) { return sum / static_cast<float>(count); });
  std::vector<double> sums(args.channels, 0.0);
  const auto kernel = fold_kernels().subtract_rows;
  torch::stable::parallel_for(
      0, args.channels / kChannelMultiple, 4, [&](int64_t begin, int64_t end) {
        const auto subtract = [&](const float* matrix, int64_t rows, const float* coefficients) {
          kernel({rows, args.channels, matrix, coefficients, sums.data()}, begin * kChannelMultiple,
                 end * kChannelMultiple);
        };
        subtract(a, args.rows, mean_g.data());
        subtract(b, args.channels, mean_d);
      });
  const Tensor shift = args.new_float({args.channels});
  std::transform(sums.begin(), sums.end(), data(shift),
                 [](double sum) { return static_cast<float>(sum); });
  return shift;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> fold_backward_(const Tensor& weight, const OptionalTensor& gamma,
                                                  const Tensor& invstd, const Tensor& offset,
                                                  const Tensor& mean_d, const Tensor& weight_cov,
                                                  const Tensor& a, const Tensor& s,
                                                  const Tensor& sum_g, int64_t count,
                                                  const Tensor& lent) {
  constexpr const char* op = "fold_backward_";
  STD_TORCH_CHECK(count > 0, op, ": expected count to be positive, got ", count);
  const FoldArguments args(op, weight);
  const Tensor dgamma = args.new_float({args.rows});
  std::vector<float> factors(args.rows);
  args.matrix("s", s);
  for (const auto& [name, input] :
       {std::pair{"weight", &weight}, std::pair{"a", &a}, std::pair{"weight_cov", &weight_cov}})
    check_disjoint(op, "s", s, name, *input);
  const FoldBackward call{args.channels,
                          count,
                          args.matrix("weight", weight),
                          args.of_rows("gamma", gamma),
                          args.of_rows("invstd", invstd),
                          args.of_rows("offset", offset),
                          args.of_channels("mean_d", mean_d),
                          args.matrix("weight_cov", weight_cov),
                          args.of_rows("sum_g", sum_g),
                          data(s),
                          data(dgamma),
                          factors.data()};
  const float* from_a = args.matrix("a", a);
  Workspace workspace(op, lent, summed_bytes(args.rows, args.channels, args.channels));
  torch::stable::parallel_for(0, args.rows, kGrainRows, [&](int64_t begin, int64_t end) {
    fold_kernels().fold_backward(call, begin, end);
  });
  const Tensor b = weighted_square(args, weight, factors.data(), workspace);
  const Tensor shift = operand_shift(args, from_a, data(b), call.sum_g, call.mean_d, count);
  return {dgamma, b, shift};
}

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("fold_product", TORCH_BOX(&fold_product));
  m.impl("fold_backward_", TORCH_BOX(&fold_backward_));
}

}  // namespace fused_bottleneck::cpu
