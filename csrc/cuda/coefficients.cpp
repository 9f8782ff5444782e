// The CUDA implementation of the coefficient ops in ops.cpp: checks and memory.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "runtime.h"

namespace fused_bottleneck::cuda {
namespace {

// The arguments of a call around a weight [W, K] or, with `first` a vector [C], around vectors.
class CoefficientArguments : public Arguments {
 public:
  using Arguments::Arguments;

  static CoefficientArguments of_vectors(const char* op, const char* name, const Tensor& first) {
    const ScalarType dtype = accumulation_dtype(first.scalar_type());
    check_tensor(op, name, first, dtype, {first.numel()});
    return CoefficientArguments(op, name, first, 1, first.numel());
  }

  using Sizes = std::initializer_list<int64_t>;

  const void* sized(const char* name, const Tensor& t, Sizes sizes) const {
    return of_dtype(name, t, acc_dtype, sizes);
  }

  const void* of_dtype(const char* name, const Tensor& t, ScalarType own, Sizes sizes) const {
    check(name, t, own, sizes);
    return t.const_data_ptr();
  }

  const void* sized(const char* name, const OptionalTensor& t, Sizes sizes) const {
    return t.has_value() ? sized(name, *t, sizes) : nullptr;
  }

  // The junctions count the elements of a matrix in 32 bits.
  void check_size() const {
    STD_TORCH_CHECK(std::max(rows, channels) * channels < int64_t{1} << 31, op_,
                    ": expected fewer than 2^31 coefficients, got a weight of ", rows, " x ",
                    channels);
  }

  Parameter parameter(const char* name, const OptionalTensor& t, int64_t size) const {
    if (!t.has_value()) return {nullptr, Dtype::float32};
    const ScalarType own = t->scalar_type();
    STD_TORCH_CHECK(is_supported(own), op_, ": expected ", name,
                    " to be float32, float64, bfloat16 or float16, got ", dtype_name(own));
    return {of_dtype(name, *t, own, {size}), dtype_of(own)};
  }
};

Tensor bn_coefficients(const Tensor& mean, const Tensor& var, const OptionalTensor& gamma,
                       const OptionalTensor& beta, const OptionalTensor& bias, double eps) {
  const auto args = CoefficientArguments::of_vectors("bn_coefficients", "mean", mean);
  const int64_t channels = args.channels;
  const Tensor coefficients = args.new_tensor({4, channels}, args.acc_dtype);
  run(launch_bn_coefficients, args,
      BnCoefficients{mean.const_data_ptr(), args.vector("var", var),
                     args.parameter("gamma", gamma, channels),
                     args.parameter("beta", beta, channels), args.parameter("bias", bias, channels),
                     eps, coefficients.mutable_data_ptr()});
  return coefficients;
}

Tensor bn_backward_coefficients(const Tensor& invstd, const Tensor& sum_g, const Tensor& sum_g_xhat,
                                int64_t count) {
  const auto args = CoefficientArguments::of_vectors("bn_backward_coefficients", "invstd", invstd);
  const Tensor coefficients = args.new_tensor({2, args.channels}, args.acc_dtype);
  run(launch_bn_backward_coefficients, args,
      BnBackwardCoefficients{invstd.const_data_ptr(), args.vector("sum_g", sum_g),
                             args.vector("sum_g_xhat", sum_g_xhat), count,
                             coefficients.mutable_data_ptr()});
  return coefficients;
}

Tensor folded_weight(const Tensor& weight, const OptionalTensor& gamma, const Tensor& invstd) {
  const CoefficientArguments args("folded_weight", "weight", weight);
  const Tensor folded = args.new_tensor({args.rows, args.channels}, args.dtype);
  run(launch_folded_weight, args,
      FoldedWeight{weight.const_data_ptr(), args.parameter("gamma", gamma, args.rows),
                   args.sized("invstd", invstd, {args.rows}), folded.mutable_data_ptr()});
  return folded;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fold(const Tensor& weight, const Tensor& cov,
                                                const OptionalTensor& gamma,
                                                const OptionalTensor& beta,
                                                const OptionalTensor& bias, double eps,
                                                const Tensor& centre, const Tensor& mean_d) {
  const CoefficientArguments args("fold", "weight", weight);
  args.check_size();
  const int64_t width = args.rows, channels = args.channels;
  const bool is_cov_double = cov.scalar_type() == ScalarType::Double;
  args.of_dtype("cov", cov, is_cov_double ? ScalarType::Double : args.acc_dtype,
                {channels, channels});
  const Tensor folded = args.new_tensor({width, channels}, args.dtype);
  const Tensor weight_cov = args.new_tensor({width, channels}, args.acc_dtype);
  const Tensor reported = args.new_tensor({2, width}, args.acc_dtype);
  const Tensor vectors = args.new_tensor({3, width}, args.acc_dtype);
  const Tensor partial = args.new_tensor({fold_partials(width, channels)}, ScalarType::Double);
  run(launch_fold, args,
      Fold{weight.const_data_ptr(), cov.const_data_ptr(), is_cov_double,
           args.parameter("gamma", gamma, width), args.parameter("beta", beta, width),
           args.parameter("bias", bias, width), eps, args.vector("centre", centre),
           args.vector("mean_d", mean_d), static_cast<double*>(partial.mutable_data_ptr()),
           folded.mutable_data_ptr(), weight_cov.mutable_data_ptr(), reported.mutable_data_ptr(),
           vectors.mutable_data_ptr()});
  return {folded, weight_cov, reported, vectors};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fold_backward(
    const Tensor& weight, const OptionalTensor& gamma, const Tensor& invstd, const Tensor& offset,
    const Tensor& centre, const OptionalTensor& mean_d, const OptionalTensor& weight_cov,
    const Tensor& a, const Tensor& s, const Tensor& sum_g, int64_t count) {
  const CoefficientArguments args("fold_backward", "weight", weight);
  args.check_size();
  args.together("mean_d", mean_d, "weight_cov", weight_cov);
  const int64_t width = args.rows, channels = args.channels;
  const int64_t side = mean_d.has_value() ? channels : 0;
  const int64_t elements = side == 0 ? 0 : fold_backward_workspace(width, channels);
  const Tensor workspace = args.new_tensor({elements}, args.acc_dtype);
  const Tensor grad_weight = args.new_tensor({width, channels}, args.dtype);
  const Tensor grads = args.new_tensor({2, width}, args.acc_dtype);
  const Tensor b = args.new_tensor({side, side}, args.dtype);
  const Tensor shift = args.new_tensor({side}, args.acc_dtype);
  run(launch_fold_backward, args,
      FoldBackward{weight.const_data_ptr(), args.parameter("gamma", gamma, width),
                   args.sized("invstd", invstd, {width}), args.sized("offset", offset, {width}),
                   args.vector("centre", centre), args.vector_or_null("mean_d", mean_d),
                   args.sized("weight_cov", weight_cov, {width, channels}), args.matrix("a", a),
                   args.sized("s", s, {width, channels}), args.sized("sum_g", sum_g, {width}),
                   count, workspace.mutable_data_ptr(), grad_weight.mutable_data_ptr(),
                   grads.mutable_data_ptr(), b.mutable_data_ptr(), shift.mutable_data_ptr()});
  return {grad_weight, grads, b, shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, FUSED_BOTTLENECK_DISPATCH_KEY, m) {
  m.impl("bn_coefficients", TORCH_BOX(&bn_coefficients));
  m.impl("bn_backward_coefficients", TORCH_BOX(&bn_backward_coefficients));
  m.impl("folded_weight", TORCH_BOX(&folded_weight));
  m.impl("fold", TORCH_BOX(&fold));
  m.impl("fold_backward", TORCH_BOX(&fold_backward));
}

}  // namespace fused_bottleneck::cuda
