// The CUDA implementation of the passes in ops.cpp: checks and memory; the kernels are in *.cu.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "runtime.h"

namespace fused_bottleneck::cuda {
namespace {

// What a reduction's blocks leave for its second kernel.
Tensor new_partials(const Arguments& args, int64_t sums) {
  const int64_t parts = reduction_parts(args.rows, args.channels);
  return args.new_tensor({sums, args.channels, parts}, ScalarType::Double);
}

double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> channel_moments(const Tensor& y) {
  const Arguments args("channel_moments", "y", y);
  const Tensor mean = args.new_vector(), m2 = args.new_vector(), partial = new_partials(args, 2);
  run(launch_channel_moments, args,
      ChannelMoments{y.const_data_ptr(), doubles(partial), mean.mutable_data_ptr(),
                     m2.mutable_data_ptr()});
  return {mean, m2};
}

void bn_apply_(const Tensor& y, const Tensor& mean, const Tensor& scale, const OptionalTensor& beta,
               const OptionalTensor& centre, bool relu, const Tensor& out) {
  const Arguments args("bn_apply_", "y", y);
  run(launch_bn_apply, args,
      BnApply{y.const_data_ptr(), args.vector("mean", mean), args.vector("scale", scale),
              args.vector_or_null("beta", beta), args.vector_or_null("centre", centre), relu,
              args.output("out", out, {})});
}

void residual_relu_(const Tensor& y, const OptionalTensor& mean, const OptionalTensor& scale,
                    const Tensor& shift, const OptionalTensor& residual, const Tensor& out,
                    const Tensor& mask) {
  const Arguments args("residual_relu_", "y", y);
  args.together("mean", mean, "scale", scale);
  run(launch_residual_relu, args,
      ResidualRelu{y.const_data_ptr(), args.vector_or_null("mean", mean),
                   args.vector_or_null("scale", scale), args.vector("shift", shift),
                   args.matrix("residual", residual),
                   args.output("out", out, {{"residual", residual}}),
                   args.mask_output(mask, {{"y", y}, {"residual", residual}, {"out", out}})});
}

Tensor mask_grad_(const Tensor& grad_out, const Tensor& mask, const Tensor& g) {
  const Arguments args("mask_grad_", "grad_out", grad_out);
  const uint8_t* bits = args.mask(mask);
  void* out = args.output("g", g, {{"mask", mask}});
  const Tensor sum_g = args.new_vector(), partial = new_partials(args, 1);
  run(launch_mask_grad, args,
      MaskGrad{grad_out.const_data_ptr(), bits, out, doubles(partial), sum_g.mutable_data_ptr()});
  return sum_g;
}

void masked_add_(const Tensor& value, const Tensor& grad_out, const Tensor& mask,
                 const Tensor& out) {
  const Arguments args("masked_add_", "value", value);
  run(launch_masked_add, args,
      MaskedAdd{value.const_data_ptr(), args.matrix("grad_out", grad_out), args.mask(mask),
                args.output("out", out, {{"grad_out", grad_out}, {"mask", mask}})});
}

std::tuple<Tensor, Tensor> bn_backward_reduce_(const Tensor& grad, const OptionalTensor& addend,
                                               const OptionalTensor& shift, const Tensor& y,
                                               const Tensor& mean, const Tensor& invstd,
                                               const Tensor& scale, const OptionalTensor& beta,
                                               const Tensor& g) {
  const Arguments args("bn_backward_reduce_", "grad", grad);
  BnBackwardReduce call{grad.const_data_ptr(),
                        args.matrix("addend", addend),
                        args.vector_or_null("shift", shift),
                        args.matrix("y", y),
                        args.vector("mean", mean),
                        args.vector("invstd", invstd),
                        args.vector("scale", scale),
                        args.vector_or_null("beta", beta),
                        args.output("g", g, {{"addend", addend}, {"y", y}}),
                        nullptr,
                        nullptr};
  const Tensor sum_g = args.new_vector(), sum_g_xhat = args.new_vector();
  const Tensor partial = new_partials(args, 2);
  call.partial = doubles(partial);
  call.sum_g = sum_g.mutable_data_ptr();
  call.sum_g_xhat = sum_g_xhat.mutable_data_ptr();
  run(launch_bn_backward_reduce, args, call);
  return {sum_g, sum_g_xhat};
}

void bn_backward_(const Tensor& g, const Tensor& y, const Tensor& mean, const Tensor& scale,
                  const OptionalTensor& k0, const OptionalTensor& k1, const Tensor& out) {
  const Arguments args("bn_backward_", "g", g);
  args.together("k0", k0, "k1", k1);
  run(launch_bn_backward, args,
      BnBackward{g.const_data_ptr(), args.matrix("y", y), args.vector("mean", mean),
                 args.vector("scale", scale), args.vector_or_null("k0", k0),
                 args.vector_or_null("k1", k1), args.output("out", out, {{"y", y}})});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, FUSED_BOTTLENECK_DISPATCH_KEY, m) {
  m.impl("channel_moments", TORCH_BOX(&channel_moments));
  m.impl("bn_apply_", TORCH_BOX(&bn_apply_));
  m.impl("residual_relu_", TORCH_BOX(&residual_relu_));
  m.impl("mask_grad_", TORCH_BOX(&mask_grad_));
  m.impl("masked_add_", TORCH_BOX(&masked_add_));
  m.impl("bn_backward_reduce_", TORCH_BOX(&bn_backward_reduce_));
  m.impl("bn_backward_", TORCH_BOX(&bn_backward_));
}

}  // namespace fused_bottleneck::cuda
