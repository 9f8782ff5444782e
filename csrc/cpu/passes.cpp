// The CPU implementation of the passes in ops.cpp: checks, threads, and the order of reductions.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cpu_ops.h"
#include "parallel.h"

namespace fused_bottleneck::cpu {
std::tuple<Tensor, Tensor> channel_moments(const Tensor& y) {
  const Arguments args("channel_moments", "y", y);
  const ChannelMoments call{args.channels, y.const_data_ptr()};
  const Kernels& kernels = kernels_for(args.dtype);
  const Chunks chunks = matrix_chunks(args);
  const Partials partials(chunks.count, args.channels);
  parallel_chunks(chunks, [&](int64_t chunk) {
    kernels.channel_moments(call, chunks.begin(chunk), chunks.end(chunk), partials.first(chunk),
                            partials.second(chunk));
  });
  for (int64_t chunk = 1; chunk < chunks.count; ++chunk)
    kernels.merge_moments(args.channels, chunks.begin(chunk), partials.first(0), partials.second(0),
                          chunks.end(chunk) - chunks.begin(chunk), partials.first(chunk),
                          partials.second(chunk));
  return {to_vector(args, partials.first(0)), to_vector(args, partials.second(0))};
}

void bn_apply_(const Tensor& y, const Tensor& mean, const Tensor& scale, const OptionalTensor& beta,
               const OptionalTensor& centre, bool relu, const Tensor& out) {
  Arguments args("bn_apply_", "y", y);
  const BnApply call{args.channels,
                     y.const_data_ptr(),
                     args.vector("mean", mean),
                     args.vector("scale", scale),
                     args.vector_or(0, "beta", beta),
                     args.vector_or(0, "centre", centre),
                     relu,
                     args.output("out", out, {})};
  const auto kernel = kernels_for(args.dtype).bn_apply;
  parallel_rows(args, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

void residual_relu_(const Tensor& y, const OptionalTensor& mean, const OptionalTensor& scale,
                    const Tensor& shift, const OptionalTensor& residual, const Tensor& out,
                    const Tensor& mask) {
  Arguments args("residual_relu_", "y", y);
  args.together("mean", mean, "scale", scale);
  // (y - 0) * 1 is y to the last bit.
  const ResidualRelu call{args.channels,
                          y.const_data_ptr(),
                          args.vector_or(0, "mean", mean),
                          args.vector_or(1, "scale", scale),
                          args.vector("shift", shift),
                          args.matrix("residual", residual),
                          args.output("out", out, {{"residual", residual}}),
                          args.mask_output(mask, {{"y", y}, {"residual", residual}, {"out", out}})};
  const auto kernel = kernels_for(args.dtype).residual_relu;
  parallel_rows(args, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

Tensor mask_grad_(const Tensor& grad_out, const Tensor& mask, const Tensor& g) {
  const Arguments args("mask_grad_", "grad_out", grad_out);
  const MaskGrad call{args.channels, grad_out.const_data_ptr(), args.mask(mask),
                      args.output("g", g, {{"mask", mask}})};
  const auto kernel = kernels_for(args.dtype).mask_grad;
  const Chunks chunks = matrix_chunks(args);
  const Partials partials(chunks.count, args.channels);
  parallel_chunks(chunks, [&](int64_t chunk) {
    kernel(call, chunks.begin(chunk), chunks.end(chunk), partials.first(chunk));
  });
  return sum_parts(args, chunks.count, [&](int64_t chunk) { return partials.first(chunk); });
}

void masked_add_(const Tensor& value, const Tensor& grad_out, const Tensor& mask,
                 const Tensor& out) {
  const Arguments args("masked_add_", "value", value);
  const MaskedAdd call{args.channels, value.const_data_ptr(), args.matrix("grad_out", grad_out),
                       args.mask(mask),
                       args.output("out", out, {{"grad_out", grad_out}, {"mask", mask}})};
  const auto kernel = kernels_for(args.dtype).masked_add;
  parallel_rows(args, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

namespace {

std::tuple<Tensor, Tensor> reduce(const Arguments& args, const BnBackwardReduce& call) {
  const auto kernel = kernels_for(args.dtype).bn_backward_reduce;
  const Chunks chunks = matrix_chunks(args);
  const Partials partials(chunks.count, args.channels);
  parallel_chunks(chunks, [&](int64_t chunk) {
    kernel(call, chunks.begin(chunk), chunks.end(chunk), partials.first(chunk),
           partials.second(chunk));
  });
  return sum_both_parts(args, partials);
}

}  // namespace

std::tuple<Tensor, Tensor> bn_backward_reduce_(const Tensor& grad, const OptionalTensor& addend,
                                               const OptionalTensor& shift, const Tensor& y,
                                               const Tensor& mean, const Tensor& invstd,
                                               const Tensor& scale, const OptionalTensor& beta,
                                               const Tensor& g) {
  Arguments args("bn_backward_reduce_", "grad", grad);
  return reduce(args, {args.channels, grad.const_data_ptr(), args.matrix("addend", addend),
                       args.vector_or(0, "shift", shift), args.matrix("y", y),
                       args.vector("mean", mean), args.vector("invstd", invstd),
                       args.vector("scale", scale), args.vector_or(0, "beta", beta), nullptr,
                       args.output("g", g, {{"addend", addend}, {"y", y}})});
}

std::tuple<Tensor, Tensor> masked_bn_backward_reduce(const Tensor& grad_out, const Tensor& mask,
                                                     const Tensor& y, const Tensor& mean,
                                                     const Tensor& invstd) {
  Arguments args("masked_bn_backward_reduce", "grad_out", grad_out);
  const void* zeros = args.vector_or(0, "shift", std::nullopt);
  return reduce(args, {args.channels, grad_out.const_data_ptr(), nullptr, zeros,
                       args.matrix("y", y), args.vector("mean", mean),
                       args.vector("invstd", invstd), zeros, zeros, args.mask(mask), nullptr});
}

namespace {

void apply(const Arguments& args, const BnBackward& call) {
  const auto kernel = kernels_for(args.dtype).bn_backward;
  parallel_rows(args, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

}  // namespace

void bn_backward_(const Tensor& g, const Tensor& y, const Tensor& mean, const Tensor& scale,
                  const OptionalTensor& k0, const OptionalTensor& k1, const Tensor& out) {
  Arguments args("bn_backward_", "g", g);
  args.together("k0", k0, "k1", k1);
  apply(args, {args.channels, g.const_data_ptr(), args.matrix("y", y), args.vector("mean", mean),
               args.vector("scale", scale), args.vector_or_null("k0", k0),
               args.vector_or_null("k1", k1), nullptr, args.output("out", out, {{"y", y}})});
}

void masked_bn_backward_(const Tensor& grad_out, const Tensor& mask, const Tensor& y,
                         const Tensor& mean, const Tensor& scale, const Tensor& k0,
                         const Tensor& k1, const Tensor& out) {
  const Arguments args("masked_bn_backward_", "grad_out", grad_out);
  apply(args,
        {args.channels, grad_out.const_data_ptr(), args.matrix("y", y), args.vector("mean", mean),
         args.vector("scale", scale), args.vector("k0", k0), args.vector("k1", k1), args.mask(mask),
         args.output("out", out, {{"y", y}, {"mask", mask}})});
}

std::string cpu_capability() { return capability().name; }

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&channel_moments));
  m.impl("bn_apply_", TORCH_BOX(&bn_apply_));
  m.impl("residual_relu_", TORCH_BOX(&residual_relu_));
  m.impl("mask_grad_", TORCH_BOX(&mask_grad_));
  m.impl("masked_add_", TORCH_BOX(&masked_add_));
  m.impl("bn_backward_reduce_", TORCH_BOX(&bn_backward_reduce_));
  m.impl("bn_backward_", TORCH_BOX(&bn_backward_));
  m.impl("masked_bn_backward_reduce", TORCH_BOX(&masked_bn_backward_reduce));
  m.impl("masked_bn_backward_", TORCH_BOX(&masked_bn_backward_));
}

// No tensor argument decides the device of this one.
STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace fused_bottleneck::cpu
