// The CUDA implementation of the coefficient ops in ops.cpp: checks and memory.
#include <torch/csrc/stable/library.h>

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
    check(name, t, acc_dtype, sizes);
    return t.const_data_ptr();
  }

  const void* in_dtype(const char* name, const Tensor& t, Sizes sizes) const {
    check(name, t, dtype, sizes);
    return t.const_data_ptr();
  }

  const void* sized(const char* name, const OptionalTensor& t, Sizes sizes) const {
    return t.has_value() ? sized(name, *t, sizes) : nullptr;
  }

  Parameter parameter(const char* name, const OptionalTensor& t, int64_t size) const {
    if (!t.has_value()) return {nullptr, Dtype::float32};
    const ScalarType own = t->scalar_type();
    STD_TORCH_CHECK(is_supported(own), op_, ": expected ", name,
                    " to be float32, float64, bfloat16 or float16, got ", dtype_name(own));
    check(name, *t, own, {size});
    return {t->const_data_ptr(), dtype_of(own)};
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

std::tuple<Tensor, Tensor> fold_rows(const Tensor& weight, const Tensor& product,
                                     const OptionalTensor& gamma, const OptionalTensor& beta,
                                     double eps, const Tensor& centre, const Tensor& mean_d) {
  const CoefficientArguments args("fold_rows", "weight", weight);
  const int64_t width = args.rows, channels = args.channels;
  const Tensor folded = args.new_tensor({width, channels}, args.dtype);
  const Tensor vectors = args.new_tensor({5, width}, args.acc_dtype);
  run(launch_fold_rows, args,
      FoldRows{weight.const_data_ptr(), args.sized("product", product, {width, channels}),
               args.parameter("gamma", gamma, width), args.parameter("beta", beta, width), eps,
               args.vector("centre", centre), args.vector("mean_d", mean_d),
               folded.mutable_data_ptr(), vectors.mutable_data_ptr()});
  return {folded, vectors};
}

std::tuple<Tensor, Tensor, Tensor> fold_backward_rows(
    const Tensor& weight, const OptionalTensor& gamma, const Tensor& invstd, const Tensor& offset,
    const Tensor& centre, const OptionalTensor& mean_d, const OptionalTensor& product,
    const Tensor& s, const Tensor& sum_g, int64_t count) {
  const CoefficientArguments args("fold_backward_rows", "weight", weight);
  args.together("mean_d", mean_d, "product", product);
  const int64_t width = args.rows, channels = args.channels;
  const Tensor grad_weight = args.new_tensor({width, channels}, args.dtype);
  const Tensor dgamma = args.new_tensor({width}, args.acc_dtype);
  const Tensor scaled =
      args.new_tensor({product.has_value() ? width : 0, channels}, args.acc_dtype);
  run(launch_fold_backward_rows, args,
      FoldBackwardRows{weight.const_data_ptr(), args.parameter("gamma", gamma, width),
                       args.sized("invstd", invstd, {width}), args.sized("offset", offset, {width}),
                       args.vector("centre", centre), args.vector_or_null("mean_d", mean_d),
                       args.sized("product", product, {width, channels}),
                       args.sized("s", s, {width, channels}), args.sized("sum_g", sum_g, {width}),
                       count, grad_weight.mutable_data_ptr(), dgamma.mutable_data_ptr(),
                       scaled.mutable_data_ptr()});
  return {grad_weight, dgamma, scaled};
}

Tensor operand_shift(const Tensor& a, const Tensor& b, const Tensor& sum_g, const Tensor& mean_d,
                     int64_t count) {
  const CoefficientArguments args("operand_shift", "a", a);
  const int64_t channels = args.channels;
  const Tensor shift = args.new_vector();
  run(launch_operand_shift, args,
      OperandShift{a.const_data_ptr(), args.in_dtype("b", b, {channels, channels}),
                   args.sized("sum_g", sum_g, {args.rows}), args.vector("mean_d", mean_d), count,
                   shift.mutable_data_ptr()});
  return shift;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, FUSED_BOTTLENECK_DISPATCH_KEY, m) {
  m.impl("bn_coefficients", TORCH_BOX(&bn_coefficients));
  m.impl("bn_backward_coefficients", TORCH_BOX(&bn_backward_coefficients));
  m.impl("fold_rows", TORCH_BOX(&fold_rows));
  m.impl("fold_backward_rows", TORCH_BOX(&fold_backward_rows));
  m.impl("operand_shift", TORCH_BOX(&operand_shift));
}

}  // namespace fused_bottleneck::cuda
