// The CPU ops of ops.cpp that the block's programs (block_forward.cpp, block_backward.cpp) call as
// functions; ops.cpp says what each computes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "../stable_utils.h"

namespace fused_bottleneck::cpu {

// passes.cpp
std::tuple<Tensor, Tensor> channel_moments(const Tensor& y);
void bn_apply_(const Tensor& y, const Tensor& mean, const Tensor& scale, const OptionalTensor& beta,
               const OptionalTensor& centre, bool relu, const Tensor& out);
void residual_relu_(const Tensor& y, const OptionalTensor& mean, const OptionalTensor& scale,
                    const Tensor& shift, const OptionalTensor& residual, const Tensor& out,
                    const Tensor& mask);
std::tuple<Tensor, Tensor> bn_backward_reduce_(const Tensor& grad, const OptionalTensor& addend,
                                               const OptionalTensor& shift, const Tensor& y,
                                               const Tensor& mean, const Tensor& invstd,
                                               const Tensor& scale, const OptionalTensor& beta,
                                               const Tensor& g);
std::tuple<Tensor, Tensor> masked_bn_backward_reduce(const Tensor& grad_out, const Tensor& mask,
                                                     const Tensor& y, const Tensor& mean,
                                                     const Tensor& invstd);
void bn_backward_(const Tensor& g, const Tensor& y, const Tensor& mean, const Tensor& scale,
                  const OptionalTensor& k0, const OptionalTensor& k1, const Tensor& out);
void masked_bn_backward_(const Tensor& grad_out, const Tensor& mask, const Tensor& y,
                         const Tensor& mean, const Tensor& scale, const Tensor& k0,
                         const Tensor& k1, const Tensor& out);

// products.cpp
void product_(const Tensor& a, const Tensor& weight, const Tensor& out, const Tensor& workspace);
void product_add_(const Tensor& a, const Tensor& weight, const Tensor& addend,
                  const OptionalTensor& shift, const Tensor& out, const Tensor& workspace);
std::tuple<Tensor, Tensor> product_moments_(const Tensor& a, const Tensor& weight,
                                            const Tensor& out, const Tensor& workspace);
void product_residual_relu_(const Tensor& a, const Tensor& weight, const OptionalTensor& a2,
                            const OptionalTensor& weight2, const Tensor& shift,
                            const OptionalTensor& residual, const Tensor& out, const Tensor& mask,
                            const Tensor& workspace);
void product_masked_add_(const Tensor& a, const Tensor& weight, const Tensor& grad_out,
                         const Tensor& mask, const Tensor& out, const Tensor& workspace);
std::tuple<Tensor, Tensor> product_bn_backward_reduce_(
    const Tensor& a, const Tensor& weight, const OptionalTensor& addend,
    const OptionalTensor& shift, const Tensor& y, const Tensor& mean, const Tensor& invstd,
    const Tensor& scale, const OptionalTensor& beta, const Tensor& g, const Tensor& workspace);

// pixel_products.cpp
void transposed_product_into(const Tensor& a, const Tensor& b, const Tensor& out,
                             const Tensor& workspace);
std::tuple<Tensor, Tensor> gram(const Tensor& d, const Tensor& workspace);
std::tuple<Tensor, Tensor> gram_in_double(const Tensor& d, const Tensor& workspace);
// s into `total`; returns sum_g.
Tensor masked_products_into(const Tensor& grad_out, const Tensor& mask, const Tensor& d,
                            const Tensor& weight, const Tensor& out, const Tensor& total,
                            const Tensor& workspace);

// fold.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fold_product(
    const Tensor& weight, const Tensor& weight_cov, const Tensor& cov, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& bias, double eps, const Tensor& centre,
    const Tensor& mean_d);
std::tuple<Tensor, Tensor, Tensor> fold_backward_(const Tensor& weight, const OptionalTensor& gamma,
                                                  const Tensor& invstd, const Tensor& offset,
                                                  const Tensor& mean_d, const Tensor& weight_cov,
                                                  const Tensor& a, const Tensor& s,
                                                  const Tensor& sum_g, int64_t count,
                                                  const Tensor& workspace);

// winograd.cpp
int64_t winograd_workspace(int64_t count, int64_t height, int64_t width, int64_t depth,
                           int64_t channels, int64_t stride, bool transposed);
void winograd_conv_(const Tensor& x, const Tensor& weight, int64_t stride, bool transposed,
                    const Tensor& out, const Tensor& workspace, const OptionalTensor& mean,
                    const OptionalTensor& scale, const OptionalTensor& beta);
void winograd_weight_grad_into(const Tensor& grad, const Tensor& x, int64_t stride,
                               const Tensor& out, const Tensor& workspace,
                               const OptionalTensor& mean, const OptionalTensor& scale,
                               const OptionalTensor& beta);

// transpose.cpp
void transpose_(const Tensor& x, const Tensor& out, int64_t first);

}  // namespace fused_bottleneck::cpu
