// The block's forward on CPU in one call: the straight line of program.py and tail.py, for float32,
// 3x3 convolutions that go Winograd's way and statistics of the batch. Line by line the same ops;
// between two of them the caches are full of tensors, and Python's own memory far away.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "block.h"
#include "cpu_ops.h"

namespace fused_bottleneck::cpu {
namespace {

// Below so many elements a matrix times another is left to the BLAS (as in cpu_products.py).
constexpr int64_t kLargeMatrix = 1 << 16;

// What the output is the sum of: a product with a folded weight, or a wide tensor that is
// normalised as it is added.
struct Term {
  Pixels from;            // the product's operand, or the wide tensor
  OptionalTensor weight;  // [K, W], of a product
  OptionalTensor mean, scale, shift;
};

struct Unit {
  const Tensor& weight;
  const OptionalTensor &bias, &gamma, &beta;
  double eps;
};

// The state of a unit in the gram way, and its folded weight [K, W] and shift.
struct Fold {
  Tensor folded, shift, invstd, offset, mean_d, weight_cov;
};

// Mean [K] in float32 and covariance [K, K] of rows with those sums; cov in T.
template <class T>
std::tuple<Tensor, Tensor> covariance(const std::tuple<Tensor, Tensor>& sums, int64_t rows,
                                      ScalarType dtype) {
  const auto& [sum_d, s] = sums;
  const int64_t channels = sum_d.numel();
  const auto count = static_cast<double>(rows);
  const auto* sum = static_cast<const double*>(sum_d.const_data_ptr());
  const auto* squares = static_cast<const double*>(s.const_data_ptr());
  const Tensor mean =
      vector_of(sum_d, channels, [&](int64_t k) { return static_cast<float>(sum[k] / count); });
  const Tensor cov = torch::stable::new_empty(sum_d, {channels, channels}, dtype);
  auto* to = static_cast<T*>(cov.mutable_data_ptr());
  torch::stable::parallel_for(0, channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t k = 0; k < channels; ++k)
        to[i * channels + k] =
            static_cast<T>(squares[i * channels + k] / count - sum[i] / count * (sum[k] / count));
  });
  return {mean, cov};
}

// The forward, whose lines share sizes, scratch and results.
class Forward {
 public:
  Forward(const BlockSizes& sizes, int64_t chunk, double most_cancellation, const Tensor& lent)
      : at(sizes, chunk),
        sizes_(sizes),
        chunk_(chunk),
        most_cancellation_(most_cancellation),
        memory_(data_of(lent)),
        workspace_(workspace_of("block_forward_", lent, at.layout.bytes, at.workspace)) {}

  Norm conv1(const Tensor& x, const Unit& unit, const Tensor& y) {
    const auto moments = product_moments_(x, weight_columns(unit.weight), y, workspace_);
    return norm(moments, sizes_.in_rows(), unit);
  }

  Norm conv2(const Tensor& y1, const Norm& norm1, const Unit& unit, const Tensor& y) {
    winograd_conv_(Pixels(y1).nhwc(), unit.weight, sizes_.stride, false, Pixels(y).nhwc(),
                   workspace_, norm1.mean, norm1.scale, norm1.beta);
    return norm(channel_moments(y), sizes_.out_rows(), unit);
  }

  // Adds a tail unit's term, and what backward needs of it.
  void tail(size_t index, const Unit& unit, const Pixels& operand, const OptionalTensor& centre,
            const Tensor& kept) {
    if (sizes_.is_gram(index)) {
      gram_way(unit, operand, *centre);
    } else {
      product_way(unit, operand, sizes_.after(scratch(at.outputs[index]), sizes_.out_channels),
                  kept);
    }
  }

  // The block's output from its terms and, where that is one, a residual [N, H, W, C].
  void output(const OptionalTensor& residual, const Tensor& out, const Tensor& mask);

  float* scratch(int64_t offset) const { return memory_ + offset / sizeof(float); }

  const ForwardScratch at;
  std::vector<Tensor> states, reported;

 private:
  Norm norm(const std::tuple<Tensor, Tensor>& moments, int64_t rows, const Unit& unit) {
    Norm norm = norm_of(moments, rows, unit.gamma, unit.beta, unit.bias, unit.eps, reported);
    states.insert(states.end(), {norm.mean, norm.invstd});
    return norm;
  }

  void gram_way(const Unit& unit, const Pixels& operand, const Tensor& centre);
  Fold fold(const Unit& unit, const Tensor& d, const Tensor& centre);
  Fold fold_in_double(const Unit& unit, const Tensor& d, const Tensor& centre);
  void report(const Tensor& mean, const Tensor& var);
  void product_way(const Unit& unit, const Pixels& operand, const Pixels& y, const Tensor& kept);
  void arrange_terms();
  Tensor shift(const Tensor& like) const;
  void images(const OptionalTensor& residual, const Tensor& shift, int64_t begin, int64_t end,
              const Pixels& out, const Tensor& mask);

  const BlockSizes& sizes_;
  int64_t chunk_;
  double most_cancellation_;
  float* memory_;
  Tensor workspace_;
  std::vector<Term> terms_;
};

void Forward::report(const Tensor& mean, const Tensor& var) {
  const int64_t rows = sizes_.out_rows();
  const auto bessel = static_cast<float>(static_cast<double>(rows) / static_cast<double>(rows - 1));
  const float* variance = floats(var);
  reported.insert(
      reported.end(),
      {mean, vector_of(var, var.numel(), [&](int64_t c) { return variance[c] * bessel; })});
}

Fold Forward::fold(const Unit& unit, const Tensor& d, const Tensor& centre) {
  const auto [mean_d, cov] =
      covariance<float>(gram(d, workspace_), sizes_.out_rows(), ScalarType::Float);
  const Tensor rows = weight_rows(unit.weight);
  Tensor weight_cov;
  if (rows.numel() < kLargeMatrix) {
    weight_cov = torch::stable::matmul(rows, cov);
  } else {
    weight_cov = torch::stable::new_empty(d, {rows.size(0), rows.size(1)}, ScalarType::Float);
    product_(rows, cov, weight_cov, workspace_);
  }
  const auto [folded, mean, var, invstd, offset, shift, cancellation] = fold_product(
      rows, weight_cov, cov, unit.gamma, unit.beta, unit.bias, unit.eps, centre, mean_d);
  if (*static_cast<const double*>(cancellation.const_data_ptr()) > most_cancellation_)
    return fold_in_double(unit, d, centre);
  report(mean, var);
  return {folded, shift, invstd, offset, mean_d, weight_cov};
}

// algebra.fold_forward, with the covariance in double.
Fold Forward::fold_in_double(const Unit& unit, const Tensor& d, const Tensor& centre) {
  const auto sums = gram_in_double(d, workspace_);
  const auto [mean_d, cov] = covariance<double>(sums, sizes_.out_rows(), ScalarType::Double);
  const int64_t width = sizes_.out_channels, channels = mean_d.numel();
  const float* w = floats(unit.weight);
  const auto new_matrix = [&](ScalarType dtype) {
    return torch::stable::new_empty(d, {width, channels}, dtype);
  };
  const Tensor wide = new_matrix(ScalarType::Double);
  std::copy_n(w, width * channels, static_cast<double*>(wide.mutable_data_ptr()));
  const Tensor product = torch::stable::matmul(wide, cov);
  const auto* wc = static_cast<const double*>(product.const_data_ptr());
  const auto* sum_d = static_cast<const double*>(std::get<0>(sums).const_data_ptr());
  const auto count = static_cast<double>(sizes_.out_rows());
  const Tensor mean = new_vector(d, width), var = new_vector(d, width),
               invstd = new_vector(d, width), offset = new_vector(d, width),
               shift = new_vector(d, width), folded = new_matrix(ScalarType::Float),
               weight_cov = new_matrix(ScalarType::Float);
  std::copy_n(wc, width * channels, data_of(weight_cov));
  torch::stable::parallel_for(0, width, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      double variance = 0, from_centre = 0, from_mean = 0, from_folded = 0;
      for (int64_t k = 0; k < channels; ++k) {
        const double value = w[r * channels + k];
        variance += wc[r * channels + k] * value;
        from_centre += value * floats(centre)[k];
        from_mean += value * (sum_d[k] / count);
      }
      variance = variance <= 0 ? 0 : variance;
      const auto s = static_cast<float>(1 / std::sqrt(variance + unit.eps));
      const float scale = gamma_at(unit.gamma, r) * s;
      for (int64_t k = 0; k < channels; ++k) {
        const float value = data_of(folded)[r * channels + k] = scale * w[r * channels + k];
        from_folded += static_cast<double>(value) * floats(mean_d)[k];
      }
      const double bias = unit.bias.has_value() ? floats(*unit.bias)[r] : 0.0;
      const float beta = unit.beta.has_value() ? floats(*unit.beta)[r] : 0.0f;
      data_of(mean)[r] = static_cast<float>(from_mean + from_centre + bias);
      data_of(var)[r] = static_cast<float>(variance);
      data_of(invstd)[r] = s;
      data_of(offset)[r] = static_cast<float>(-from_mean);
      data_of(shift)[r] = static_cast<float>(beta - from_folded);
    }
  });
  report(mean, var);
  return {folded, shift, invstd, offset, mean_d, weight_cov};
}

void Forward::gram_way(const Unit& unit, const Pixels& operand, const Tensor& centre) {
  const Fold f = fold(unit, operand.matrix(), centre);
  states.insert(states.end(), {f.invstd, f.offset, centre, f.mean_d, f.weight_cov});
  terms_.push_back(
      {operand, torch::stable::transpose(f.folded, 0, 1), std::nullopt, std::nullopt, f.shift});
}

void Forward::product_way(const Unit& unit, const Pixels& operand, const Pixels& y,
                          const Tensor& kept) {
  const auto moments =
      product_moments_(operand.matrix(), weight_columns(unit.weight), y.matrix(), workspace_);
  const Norm n =
      norm_of(moments, sizes_.out_rows(), unit.gamma, unit.beta, unit.bias, unit.eps, reported);
  const float* mean = floats(n.mean);
  states.insert(states.end(),
                {n.invstd, vector_of(n.mean, n.mean.numel(), [&](int64_t c) { return -mean[c]; })});
  copy_all(y.data, data_of(kept), kept.numel());
  terms_.push_back({y, std::nullopt, n.mean, n.scale, n.beta});
}

// Products first; a second wide tensor is normalised in place.
void Forward::arrange_terms() {
  if (terms_.size() < 2) return;
  if (!terms_[0].weight.has_value()) std::swap(terms_[0], terms_[1]);
  Term& second = terms_[1];
  if (second.weight.has_value()) return;
  const Tensor y = second.from.matrix();
  bn_apply_(y, *second.mean, *second.scale, second.shift, std::nullopt, false, y);
}

// The sum of what the terms are shifted by; the second one only if it is a product.
Tensor Forward::shift(const Tensor& like) const {
  const int64_t channels = sizes_.out_channels;
  return vector_of(like, channels, [&](int64_t c) {
    float sum = terms_[0].shift.has_value() ? floats(*terms_[0].shift)[c] : 0.0f;
    if (terms_.size() > 1 && terms_[1].weight.has_value()) sum += floats(*terms_[1].shift)[c];
    return sum;
  });
}

void Forward::images(const OptionalTensor& residual, const Tensor& shift, int64_t begin,
                     int64_t end, const Pixels& out, const Tensor& mask) {
  const int64_t size = sizes_.out_height * sizes_.out_width, bits = (sizes_.out_channels + 7) / 8;
  const Tensor rows =
      view_of(static_cast<const uint8_t*>(mask.const_data_ptr()) + begin * size * bits,
              {(end - begin) * size, bits}, {bits, 1}, ScalarType::Byte);
  const auto part = [&](const Pixels& all) { return all.images(begin, end).matrix(); };
  const Term& first = terms_[0];
  OptionalTensor added, second, weight;
  if (terms_.size() == 1) {
    added = part(Pixels(*residual));
  } else if (terms_[1].weight.has_value()) {
    second = part(terms_[1].from);
    weight = terms_[1].weight;
  } else {
    added = part(terms_[1].from);
  }
  if (first.weight.has_value()) {
    product_residual_relu_(part(first.from), *first.weight, second, weight, shift, added,
                           out.matrix(), rows, workspace_);
  } else {
    residual_relu_(part(first.from), first.mean, first.scale, shift, added, out.matrix(), rows);
  }
}

void Forward::output(const OptionalTensor& residual, const Tensor& out, const Tensor& mask) {
  arrange_terms();
  const Tensor sum = shift(out);
  if (is_channels_last(out)) return images(residual, sum, 0, sizes_.count, Pixels(out), mask);
  const int64_t size = sizes_.out_height * sizes_.out_width, channels = sizes_.out_channels;
  const Tensor planes = view_of(out.const_data_ptr(), {sizes_.count, channels, size},
                                {channels * size, size, 1}, ScalarType::Float);
  for (int64_t begin = 0; begin < sizes_.count; begin += chunk_) {
    const int64_t end = std::min(begin + chunk_, sizes_.count);
    const Pixels rows = sizes_.after(scratch(at.images), channels).images(0, end - begin);
    images(residual, sum, begin, end, rows, mask);
    transpose_(view_of(rows.data, {end - begin, size, channels}, {rows.image(), channels, 1},
                       ScalarType::Float),
               planes, begin);
  }
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> block_forward_(
    const Tensor& x, const OptionalTensor& residual, const std::vector<Tensor>& weights,
    const std::vector<OptionalTensor>& biases, const std::vector<OptionalTensor>& gammas,
    const std::vector<OptionalTensor>& betas, const std::vector<double>& eps,
    const std::vector<int64_t>& sizes, const std::vector<int64_t>& images, int64_t chunk,
    double most_cancellation, const Tensor& y1, const Tensor& y2, const std::vector<Tensor>& kept,
    const Tensor& out, const Tensor& mask, const Tensor& scratch) {
  const BlockSizes block(sizes, images);
  block.check("block_forward_", x, y1, y2, weights.size());
  check_images("block_forward_", "out", out,
               {block.count, block.out_channels, block.out_height, block.out_width}, true);
  STD_TORCH_CHECK(biases.size() == weights.size() && gammas.size() == weights.size() &&
                      betas.size() == weights.size() && eps.size() == weights.size() &&
                      kept.size() == images.size(),
                  "block_forward_: expected lists with an entry per unit");
  const auto unit = [&](size_t i) {
    return Unit{weights[i], biases[i], gammas[i], betas[i], eps[i]};
  };
  Forward forward(block, chunk, most_cancellation, scratch);
  const Norm norm1 = forward.conv1(x, unit(0), y1);
  const Norm norm2 = forward.conv2(y1, norm1, unit(1), y2);
  const Pixels operand = block.after(forward.scratch(forward.at.operand), block.width);
  OptionalTensor centre;
  if (block.is_gram(0)) centre = relu_of_shift(norm2.beta, norm2.mean);
  bn_apply_(y2, norm2.mean, norm2.scale, norm2.beta, centre, true, operand.matrix());
  forward.tail(0, unit(2), operand, centre, kept[0]);
  if (block.has_downsample()) {
    centre = std::nullopt;
    if (block.is_gram(1)) centre = sampled_centre(x, block.downsample_stride);
    const Pixels seen = block.strided_operand(x, forward.scratch(forward.at.strided), centre);
    forward.tail(1, unit(3), seen, centre, kept[1]);
  }
  forward.output(residual, out, mask);
  return {forward.states, forward.reported};
}

int64_t block_scratch(const std::vector<int64_t>& sizes, const std::vector<int64_t>& images,
                      int64_t chunk, bool backward) {
  const BlockSizes block(sizes, images);
  return backward ? BackwardScratch(block).layout.bytes : ForwardScratch(block, chunk).layout.bytes;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("block_forward_", TORCH_BOX(&block_forward_));
}

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CompositeExplicitAutograd, m) {
  m.impl("block_scratch", TORCH_BOX(&block_scratch));
}

}  // namespace fused_bottleneck::cpu
