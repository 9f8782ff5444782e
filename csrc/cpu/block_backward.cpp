// The block's backward on CPU in one call; see block_forward.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "block.h"
#include "cpu_ops.h"

namespace fused_bottleneck::cpu {
namespace {

using Sums = std::tuple<Tensor, Tensor>;

// The gradients of a unit's gamma and beta; the bias's is zero.
struct UnitGrads {
  Tensor gamma, beta;
};

// What a tail unit's operand has for its gradient: the coefficients of a product with g, or the
// gradient of the unit's output.
struct OperandGrad {
  OptionalTensor b, shift, dy;
};

// The state that forward kept of a tail unit, in the order of its tensors.
struct TailState {
  Tensor invstd, offset;
  OptionalTensor centre, mean_d, weight_cov, output;
};

class Backward {
 public:
  Backward(const BlockSizes& sizes, const Tensor& grad_out, const Tensor& mask,
           const std::vector<Tensor>& weight_grads, const Tensor& lent)
      : at(sizes),
        grads(sizes.has_downsample() ? 4 : 3),
        sizes_(sizes),
        grad_out_(grad_out),
        mask_(mask),
        weight_grads_(weight_grads),
        memory_(data_of(lent)),
        workspace_(workspace_of("block_backward_", lent, at.layout.bytes, at.workspace)) {}

  float* scratch(int64_t offset) const { return memory_ + offset / sizeof(float); }

  // B1 of a tail unit in the gram way; g a goes into `product`.
  void gram_way(size_t unit, const Tensor& weight, const OptionalTensor& gamma,
                const TailState& state, const Pixels& operand, const Pixels& product) {
    const Tensor rows = weight_rows(weight), d = operand.matrix();
    const Tensor a = folded_weight(rows, gamma, state.invstd);
    const Tensor s = matrix_over(data_of(weight_grads_[unit]), rows.size(0), rows.size(1));
    const Tensor sum_g =
        masked_products_into(grad_out_, mask_, d, a, product.matrix(), s, workspace_);
    const auto [dgamma, b, shift] =
        fold_backward_(rows, gamma, state.invstd, state.offset, *state.mean_d, *state.weight_cov, a,
                       s, sum_g, sizes_.out_rows(), workspace_);
    grads[unit] = {dgamma, sum_g};
    operands_[unit - 2] = {b, shift, std::nullopt};
  }

  // B1 in the product way; y becomes its gradient.
  void product_way(size_t unit, const Tensor& weight, const OptionalTensor& gamma,
                   const TailState& state, const Pixels& operand, const Pixels& y, bool needed) {
    const int64_t kept = state.output->size(0);
    copy_all(data_of(*state.output), y.data, state.output->numel());
    if (kept < y.count)
      product_(operand.images(kept, y.count).matrix(), weight_columns(weight),
               y.images(kept, y.count).matrix(), workspace_);
    const float* offset = floats(state.offset);
    const Tensor mean =
        vector_of(state.offset, state.offset.numel(), [&](int64_t c) { return -offset[c]; });
    const Tensor wide = y.matrix();
    const Sums sums = masked_bn_backward_reduce(grad_out_, mask_, wide, mean, state.invstd);
    const auto [k0, k1] = grad_coefficients(sums, state.invstd, y.rows());
    masked_bn_backward_(grad_out_, mask_, wide, mean, scale_of(gamma, state.invstd), k0, k1, wide);
    if (needed) transposed_product_into(wide, operand.matrix(), weight_grads_[unit], workspace_);
    grads[unit] = {std::get<1>(sums), std::get<0>(sums)};
    operands_[unit - 2] = {std::nullopt, std::nullopt, wide};
  }

  // B2: the gradient of conv3's operand through its ReLU, into g; then dy2 in its place.
  void conv3_operand(const Tensor& weight, const Pixels& operand, const Pixels& product,
                     const Tensor& y2, const Norm& norm, const Pixels& g) {
    const OperandGrad& from = operands_[0];
    const auto reduce = [&](const Tensor& a, const Tensor& w, const OptionalTensor& addend) {
      return product_bn_backward_reduce_(a, w, addend, from.shift, y2, norm.mean, norm.invstd,
                                         norm.scale, norm.beta, g.matrix(), workspace_);
    };
    const Sums sums = from.dy.has_value() ? reduce(*from.dy, weight_rows(weight), std::nullopt)
                                          : reduce(operand.matrix(), *from.b, product.matrix());
    finish(1, g, y2, norm, sums);
  }

  // B3 and B4, and dy1 in place of the gradient g of conv2's input.
  void conv2(const Tensor& weight, const Pixels& dy2, const Tensor& y1, const Norm& norm,
             const Pixels& g, bool needed) {
    winograd_conv_(dy2.nhwc(), weight, sizes_.stride, true, g.nhwc(), workspace_, std::nullopt,
                   std::nullopt, std::nullopt);
    const Tensor matrix = g.matrix();
    const Sums sums = bn_backward_reduce_(matrix, std::nullopt, std::nullopt, y1, norm.mean,
                                          norm.invstd, norm.scale, norm.beta, matrix);
    if (needed)
      winograd_weight_grad_into(dy2.nhwc(), Pixels(y1).nhwc(), sizes_.stride, weight_grads_[1],
                                workspace_, norm.mean, norm.scale, norm.beta);
    finish(0, g, y1, norm, sums);
  }

  // B5.
  void conv1(const Pixels& dy1, const Tensor& x, bool needed) {
    if (needed) transposed_product_into(dy1.matrix(), x, weight_grads_[0], workspace_);
  }

  // B6: grad_x = dy1 W1, plus g or the downsample's part.
  void input(const Tensor& weight, const Pixels& dy1, bool identity, const Tensor& grad_x) {
    if (identity) {
      product_masked_add_(dy1.matrix(), weight_rows(weight), grad_out_, mask_, grad_x, workspace_);
    } else {
      product_(dy1.matrix(), weight_rows(weight), grad_x, workspace_);
    }
  }

  // The gradient of the downsample's operand, in place of the gram way's g a.
  void downsample_operand(const Tensor& weight, const Pixels& operand, const Pixels& product) {
    const OperandGrad& from = operands_[1];
    const Tensor value = product.matrix();
    if (from.dy.has_value()) {
      product_(*from.dy, weight_rows(weight), value, workspace_);
    } else {
      product_add_(operand.matrix(), *from.b, value, from.shift, value, workspace_);
    }
  }

  const BackwardScratch at;
  std::vector<UnitGrads> grads;

 private:
  static Tensor folded_weight(const Tensor& rows, const OptionalTensor& gamma,
                              const Tensor& invstd) {
    const int64_t width = rows.size(0), channels = rows.size(1);
    const Tensor folded = torch::stable::new_empty(rows, {width, channels}, ScalarType::Float);
    const float *from = floats(rows), *s = floats(invstd);
    float* to = data_of(folded);
    torch::stable::parallel_for(0, width, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const float scale = gamma_at(gamma, r) * s[r];
        for (int64_t k = 0; k < channels; ++k)
          to[r * channels + k] = scale * from[r * channels + k];
      }
    });
    return folded;
  }

  // Turns g, the gradient of a normalisation's output, into that of its input y, in place.
  void finish(size_t unit, const Pixels& g, const Tensor& y, const Norm& norm, const Sums& sums) {
    const auto [k0, k1] = grad_coefficients(sums, norm.invstd, g.rows());
    bn_backward_(g.matrix(), y, norm.mean, norm.scale, k0, k1, g.matrix());
    grads[unit].gamma = std::get<1>(sums);
    grads[unit].beta = std::get<0>(sums);
  }

  const BlockSizes& sizes_;
  const Tensor& grad_out_;
  const Tensor& mask_;
  const std::vector<Tensor>& weight_grads_;
  float* memory_;
  Tensor workspace_;
  OperandGrad operands_[2];
};

std::vector<Tensor> block_backward_(
    const Tensor& grad_out, const Tensor& x, bool identity, const std::vector<Tensor>& weights,
    const std::vector<OptionalTensor>& gammas, const std::vector<OptionalTensor>& betas,
    const std::vector<Tensor>& saved, const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& images, const std::vector<bool>& needs_weight,
    const std::vector<Tensor>& weight_grads, const OptionalTensor& grad_x, const Tensor& scratch) {
  const BlockSizes block(sizes, images);
  STD_TORCH_CHECK(saved.size() == block.saved(), "block_backward_: expected ", block.saved(),
                  " saved tensors, got ", saved.size());
  const Tensor &y1 = saved[0], &y2 = saved[1], &mask = saved[2];
  block.check("block_backward_", x, y1, y2, weights.size());
  STD_TORCH_CHECK(gammas.size() == weights.size() && betas.size() == weights.size() &&
                      needs_weight.size() == weights.size() &&
                      weight_grads.size() == weights.size(),
                  "block_backward_: expected lists with an entry per unit");
  check_images("block_backward_", "grad_out", grad_out,
               {block.count, block.out_channels, block.out_height, block.out_width});
  const auto norm = [&](size_t unit) {
    const Tensor &mean = saved[3 + 2 * unit], &invstd = saved[4 + 2 * unit];
    return Norm{mean, invstd, scale_of(gammas[unit], invstd), betas[unit]};
  };
  const Norm norm1 = norm(0), norm2 = norm(1);
  for (size_t unit = 0; unit < weights.size(); ++unit) {
    if (!needs_weight[unit] && (unit < 2 || !block.is_gram(unit - 2))) continue;
    const Tensor& t = weight_grads[unit];
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
                        t.numel() == weights[unit].numel(),
                    "block_backward_: expected weight_grads to be float32 of the weights' sizes, "
                    "contiguous, on the CPU, got ",
                    describe(t));
  }
  Backward backward(block, grad_out, mask, weight_grads, scratch);
  const auto at = [&](int64_t offset) { return backward.scratch(offset); };
  std::vector<TailState> states;
  size_t next = kSavedOfConvs;
  for (size_t unit = 0; unit < images.size(); ++unit) {
    const Tensor* s = &saved[next];
    if (block.is_gram(unit)) {
      states.push_back({s[0], s[1], s[2], s[3], s[4], std::nullopt});
      next += kSavedOfGram;
    } else {
      states.push_back({s[0], s[1], std::nullopt, std::nullopt, std::nullopt, s[2]});
      next += kSavedOfProduct;
    }
  }
  const Pixels operand = block.after(at(backward.at.operand), block.width);
  bn_apply_(y2, norm2.mean, norm2.scale, norm2.beta, states[0].centre, true, operand.matrix());
  std::vector<Pixels> operands = {operand}, products;
  if (block.has_downsample())
    operands.push_back(block.strided_operand(x, at(backward.at.strided), states[1].centre));
  for (size_t unit = 0; unit < images.size(); ++unit) {
    const Pixels product = block.after(at(backward.at.products[unit]), operands[unit].channels);
    products.push_back(product);
    if (block.is_gram(unit)) {
      backward.gram_way(unit + 2, weights[unit + 2], gammas[unit + 2], states[unit], operands[unit],
                        product);
    } else {
      const Pixels y = block.after(at(backward.at.wide[unit]), block.out_channels);
      backward.product_way(unit + 2, weights[unit + 2], gammas[unit + 2], states[unit],
                           operands[unit], y, needs_weight[unit + 2]);
    }
  }
  const Pixels dy2 = products[0];
  backward.conv3_operand(weights[2], operand, products[0], y2, norm2, dy2);
  if (grad_x.has_value() && block.has_downsample())
    backward.downsample_operand(weights[3], operands[1], products[1]);
  const Pixels dy1 = block.before(at(backward.at.grad), block.width);
  backward.conv2(weights[1], dy2, y1, norm1, dy1, needs_weight[1]);
  backward.conv1(dy1, x, needs_weight[0]);
  if (grad_x.has_value()) {
    backward.input(weights[0], dy1, identity, *grad_x);
    if (block.has_downsample()) add_strided(products[1], block.downsample_stride, Pixels(*grad_x));
  }
  std::vector<Tensor> results;
  for (const UnitGrads& unit : backward.grads) {
    const Tensor bias = vector_of(unit.beta, unit.beta.numel(), [](int64_t) { return 0.0f; });
    results.insert(results.end(), {bias, unit.gamma, unit.beta});
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("block_backward_", TORCH_BOX(&block_backward_));
}

}  // namespace fused_bottleneck::cpu
