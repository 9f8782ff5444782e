// All schemas of the library; implementations register themselves per device (cpu/passes.cpp).
//
// Matrices are [P, C] (pixels x channels), contiguous, float32, float64, bfloat16 or float16.
// Vectors are [C] in the accumulation dtype: float64 for float64, float32 for the others.
// A mask is uint8 [P, ceil(C / 8)]: bit k of byte j belongs to channel 8 j + k, spare bits are 0.
// relu(v) = v <= 0 ? 0 : v, and an element is live when !(v <= 0): NaN passes and is live.
// `out` and `g` may be the same memory as an input matrix, element for element.
// Reductions have a fixed order that depends on the shape only: same bits for any thread count.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fused_bottleneck, m) {
  // mean over the rows and m2 = sum (y - mean)^2, two-pass in a tile, tiles by Chan's formula.
  m.def("channel_moments(Tensor y) -> (Tensor mean, Tensor m2)");

  // v = (y - mean) * scale + beta; if relu, v = relu(v); out = v - centre. None counts as 0.
  m.def(
      "bn_apply_(Tensor y, Tensor mean, Tensor scale, Tensor? beta, Tensor? centre, bool relu, "
      "Tensor(a!) out) -> ()");

  // v = (y - mean) * scale + shift + residual (y + shift + residual without mean and scale);
  // out = relu(v); mask bit = live(v).
  m.def(
      "residual_relu_(Tensor y, Tensor? mean, Tensor? scale, Tensor shift, Tensor? residual, "
      "Tensor(a!) out, Tensor(b!) mask) -> ()");

  // g = mask bit ? grad_out : 0; sum_g = column sums of g.
  m.def("mask_grad_(Tensor grad_out, Tensor mask, Tensor(a!) g) -> Tensor sum_g");

  // out = value + (mask bit ? grad_out : 0).
  m.def("masked_add_(Tensor value, Tensor grad_out, Tensor mask, Tensor(a!) out) -> ()");

  // v = grad + addend + shift; if relu, v = live((y - mean) * scale + beta) ? v : 0;
  // g = v rounded; the column sums of g and of g * (y - mean) * invstd.
  m.def(
      "bn_backward_reduce_(Tensor grad, Tensor? addend, Tensor? shift, Tensor y, Tensor mean, "
      "Tensor invstd, Tensor? scale, Tensor? beta, bool relu, Tensor(a!) g) -> "
      "(Tensor sum_g, Tensor sum_g_xhat)");

  // out = scale * (g - k0 - (y - mean) * k1), or scale * g without k0 and k1 (y is not read).
  m.def(
      "bn_backward_(Tensor g, Tensor y, Tensor mean, Tensor scale, Tensor? k0, Tensor? k1, "
      "Tensor(a!) out) -> ()");

  // out[b] = x[b]^T, contiguous [B, R, C] to [B, C, R]: between contiguous and channels_last.
  m.def("transpose_(Tensor x, Tensor(a!) out) -> ()");

  // Asks for huge pages for t's memory before its first touch; a hint, never an error.
  m.def("advise_huge_pages_(Tensor(a!) t) -> ()");

  // The instruction set in use: default, avx2 or avx512.
  m.def("cpu_capability() -> str");
}
