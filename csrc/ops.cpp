// All schemas of the library; implementations register themselves per device (cpu/passes.cpp,
// cuda/passes.cpp; coefficients.py and cuda/coefficients.cpp).
//
// Matrices are [P, C] (pixels x channels), contiguous, float32, float64, bfloat16 or float16; an
// [N, C, H, W] tensor in channels_last memory stands for the matrix of its pixels.
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

  // v = live((y - mean) * scale + beta) ? grad + addend + shift : 0; g = v rounded; the column sums
  // of g and of g * (y - mean) * invstd.
  m.def(
      "bn_backward_reduce_(Tensor grad, Tensor? addend, Tensor? shift, Tensor y, Tensor mean, "
      "Tensor invstd, Tensor scale, Tensor? beta, Tensor(a!) g) -> "
      "(Tensor sum_g, Tensor sum_g_xhat)");

  // out = scale * (g - k0 - (y - mean) * k1), or scale * g without k0 and k1 (y is not read).
  m.def(
      "bn_backward_(Tensor g, Tensor y, Tensor mean, Tensor scale, Tensor? k0, Tensor? k1, "
      "Tensor(a!) out) -> ()");

  // These two with g = mask bit ? grad_out : 0, which is not stored. CPU only: the gram way, which
  // others take, has no use for them.
  m.def(
      "masked_bn_backward_reduce(Tensor grad_out, Tensor mask, Tensor y, Tensor mean, "
      "Tensor invstd) -> (Tensor sum_g, Tensor sum_g_xhat)");
  m.def(
      "masked_bn_backward_(Tensor grad_out, Tensor mask, Tensor y, Tensor mean, Tensor scale, "
      "Tensor k0, Tensor k1, Tensor(a!) out) -> ()");

  // --- Max pooling behind a normalisation and ReLU, CPU only. y [N, C, H, W]; out, grad_out and
  // index [N, C, H', W'], all in channels_last memory. pool: kernel, stride, padding and dilation,
  // height and width of each; at most 255 elements, and one at least of each window is inside.
  // index: uint8, which element of the window, row by row, out is; 255: none, it is 0.
  // v = relu((y - mean) * scale + beta), rounded; out = the first maximum of a window, or its last
  // NaN.
  m.def(
      "bn_relu_pool_(Tensor y, Tensor mean, Tensor scale, Tensor? beta, int[] pool, "
      "Tensor(a!) out, Tensor(b!) index) -> ()");

  // g = the sum of grad_out where an element is the one that index names: bn_backward_reduce_'s
  // sums, and bn_backward_ of it; g is not stored.
  m.def(
      "pool_bn_backward_reduce(Tensor grad_out, Tensor index, int[] pool, Tensor y, Tensor mean, "
      "Tensor invstd) -> (Tensor sum_g, Tensor sum_g_xhat)");
  m.def(
      "pool_bn_backward_(Tensor grad_out, Tensor index, int[] pool, Tensor y, Tensor mean, "
      "Tensor scale, Tensor? k0, Tensor? k1, Tensor(a!) out) -> ()");

  // --- The algebra between the stages (algebra.py), one call per junction. A parameter (gamma,
  // beta, bias) has any floating dtype; absent ones count as 1, 0, 0. Results are in the
  // accumulation dtype but where they have the weight's, which is that of the products that read
  // them.

  // invstd = 1 / sqrt(var + eps), scale = gamma invstd, beta, mean + bias: [4, C].
  m.def(
      "bn_coefficients(Tensor mean, Tensor var, Tensor? gamma, Tensor? beta, Tensor? bias, "
      "float eps) -> Tensor");

  // k0 = sum_g / count, k1 = invstd sum_g_xhat / count: [2, C].
  m.def(
      "bn_backward_coefficients(Tensor invstd, Tensor sum_g, Tensor sum_g_xhat, int count) -> "
      "Tensor");

  // round(gamma invstd weight) [W, K].
  m.def("folded_weight(Tensor weight, Tensor? gamma, Tensor invstd) -> Tensor");

  // Of a weight [W, K], cov [K, K] in the accumulation dtype or in float64, centre and mean_d [K]:
  // the folded weight [W, K] in the weight's dtype; weight cov [W, K]; mean + bias and var [2, W];
  // invstd, offset, shift [3, W].
  m.def(
      "fold(Tensor weight, Tensor cov, Tensor? gamma, Tensor? beta, Tensor? bias, float eps, "
      "Tensor centre, Tensor mean_d) -> "
      "(Tensor folded, Tensor weight_cov, Tensor reported, Tensor vectors)");

  // The weight's gradient [W, K] in its dtype; those of gamma and the bias [2, W]; b = -weight^T
  // diag(k) weight [K, K] in the weight's dtype, where k = scale invstd dgamma / count; shift =
  // -(sum_g / count) a - mean_d b [K]. Without mean_d and weight_cov (fixed statistics): b and
  // shift are empty.
  m.def(
      "fold_backward(Tensor weight, Tensor? gamma, Tensor invstd, Tensor offset, Tensor centre, "
      "Tensor? mean_d, Tensor? weight_cov, Tensor a, Tensor s, Tensor sum_g, int count) -> "
      "(Tensor grad_weight, Tensor grads, Tensor b, Tensor shift)");

  // --- Fused 1x1 products, channels in multiples of 16. ---
  // Matrices and weights are float32 (has_products: on this CPU) or bfloat16 (has_pair_products),
  // but where it says otherwise.
  // A weight is [K, C] with any strides. Products are summed in float32, those over pixels in a
  // block of rows, in float64 over the blocks; what they return is float32 if not float64. Same
  // bits for one thread count. workspace: uint8, at least
  // product_workspace(P, K, C) long, with any content.

  m.def("has_products() -> bool");
  m.def("has_pair_products() -> bool");
  m.def("product_workspace(int rows, int depth, int channels) -> int");

  // out = a weight.
  m.def("product_(Tensor a, Tensor weight, Tensor(a!) out, Tensor(b!) workspace) -> ()");

  // out = a weight + addend + shift.
  m.def(
      "product_add_(Tensor a, Tensor weight, Tensor addend, Tensor? shift, Tensor(a!) out, "
      "Tensor(b!) workspace) -> ()");

  // out = a weight, and the moments of out as channel_moments has them.
  m.def(
      "product_moments_(Tensor a, Tensor weight, Tensor(a!) out, Tensor(b!) workspace) -> "
      "(Tensor mean, Tensor m2)");

  // v = a weight + a2 weight2 + shift + residual; out = relu(v); mask bit = live(v).
  m.def(
      "product_residual_relu_(Tensor a, Tensor weight, Tensor? a2, Tensor? weight2, Tensor shift, "
      "Tensor? residual, Tensor(a!) out, Tensor(b!) mask, Tensor(c!) workspace) -> ()");

  // out = a weight + (mask bit ? grad_out : 0).
  m.def(
      "product_masked_add_(Tensor a, Tensor weight, Tensor grad_out, Tensor mask, Tensor(a!) out, "
      "Tensor(b!) workspace) -> ()");

  // bn_backward_reduce_ of grad = a weight.
  m.def(
      "product_bn_backward_reduce_(Tensor a, Tensor weight, Tensor? addend, Tensor? shift, "
      "Tensor y, Tensor mean, Tensor invstd, Tensor scale, Tensor? beta, Tensor(a!) g, "
      "Tensor(b!) workspace) -> (Tensor sum_g, Tensor sum_g_xhat)");

  // g = mask bit ? grad_out : 0: its column sums and g^T d; out = g weight.
  m.def(
      "masked_products_(Tensor grad_out, Tensor mask, Tensor d, Tensor weight, Tensor(a!) out, "
      "Tensor(b!) workspace) -> (Tensor sum_g, Tensor s)");

  // a^T b [A, B] of a [P, A] and b [P, B].
  m.def("transposed_product(Tensor a, Tensor b, Tensor(a!) workspace) -> Tensor");

  // Column sums [K] and d^T d [K, K] in float64: the products summed in float32 over a block of
  // rows, or all in double (of float32), for a variance that is small against the terms it comes
  // of.
  m.def("gram(Tensor d, Tensor(a!) workspace) -> (Tensor sum_d, Tensor s)");
  m.def("gram_in_double(Tensor d, Tensor(a!) workspace) -> (Tensor sum_d, Tensor s)");

  // What fold and fold_backward are, for the products above: of weight cov and cov, float32; s
  // becomes the gradient of the weight. cancellation []: the largest ratio of the variance that an
  // output would have, did the operand's channels not go together, to what it has. workspace: of a
  // product of W rows of K channels with K.
  m.def(
      "fold_product(Tensor weight, Tensor weight_cov, Tensor cov, Tensor? gamma, "
      "Tensor? beta, Tensor? bias, float eps, Tensor centre, Tensor mean_d) -> "
      "(Tensor folded, Tensor mean, Tensor var, Tensor invstd, Tensor offset, Tensor shift, "
      "Tensor cancellation)");
  m.def(
      "fold_backward_(Tensor weight, Tensor? gamma, Tensor invstd, Tensor offset, Tensor mean_d, "
      "Tensor weight_cov, Tensor a, Tensor(a!) s, Tensor sum_g, int count, Tensor(b!) workspace) "
      "-> (Tensor dgamma, Tensor b, Tensor shift)");

  // --- 3x3 convolutions of padding 1 and stride 1 or 2 by Winograd's filtering, as the products.
  // --- Enough for the next two, with an output (transposed: gradient of the input) [N, H, W, C]
  // from `depth` channels.
  m.def(
      "winograd_workspace(int count, int height, int width, int depth, int channels, int stride, "
      "bool transposed) -> int");

  // out [N, H', W', K] = conv(x [N, H, W, C], weight [K, C, 3, 3] with any strides); transposed:
  // the gradient of its input, from x [N, H', W', K] into out [N, H, W, C]. With mean and scale
  // [C], here and in the gradient of the weight, x stands for relu((x - mean) * scale + beta).
  m.def(
      "winograd_conv_(Tensor x, Tensor weight, int stride, bool transposed, Tensor(a!) out, "
      "Tensor(b!) workspace, Tensor? mean=None, Tensor? scale=None, Tensor? beta=None) -> ()");

  // The weight's gradient as [K, 3, 3, C], from grad [N, H', W', K] and x [N, H, W, C].
  m.def(
      "winograd_weight_grad(Tensor grad, Tensor x, int stride, Tensor(a!) workspace, "
      "Tensor? mean=None, Tensor? scale=None, Tensor? beta=None) -> Tensor");

  // --- The block's forward and backward in one call each (program.py), float32, statistics of the
  // --- batch, channels_last memory but for out, dense 1x1 weights, 3x3 weights for the
  // convolutions
  // --- above. Lists have an entry per unit: conv1, conv2, conv3 and the downsample, if any.
  // sizes: N, C, H, W of x; the widths of y1 and out; H', W'; the strides of conv2 and the
  // downsample (0: none). images: of how many first images of its output a tail unit keeps it; -1:
  // none, as it goes the gram way. chunk: images of out at a time where it is contiguous, else 0.
  m.def("block_scratch(int[] sizes, int[] images, int chunk, bool backward) -> int");

  // y1, y2, mask and kept are what backward needs, with the states: mean and invstd of the first
  // two normalisations; of a tail unit invstd, offset and, gram way, centre, mean_d and weight_cov.
  // reported: the mean and unbiased variance of each unit's batch.
  m.def(
      "block_forward_(Tensor x, Tensor? residual, Tensor[] weights, Tensor?[] biases, "
      "Tensor?[] gammas, Tensor?[] betas, float[] eps, int[] sizes, int[] images, int chunk, "
      "float most_cancellation, Tensor(a!) y1, Tensor(b!) y2, Tensor(c!)[] kept, Tensor(d!) out, "
      "Tensor(e!) mask, Tensor(f!) scratch) -> (Tensor[] states, Tensor[] reported)");

  // The gradients of bias, gamma and beta of each unit. weight_grads: of each unit's weight,
  // contiguous in the order of its memory, the 3x3 one's [M, 3, 3, M]; empty if it is not needed,
  // but for a tail unit in the gram way, which computes it anyway.
  m.def(
      "block_backward_(Tensor grad_out, Tensor x, bool identity, Tensor[] weights, "
      "Tensor?[] gammas, Tensor?[] betas, Tensor[] saved, int[] sizes, int[] images, "
      "bool[] needs_weight, Tensor(a!)[] weight_grads, Tensor(b!)? grad_x, Tensor(c!) scratch) -> "
      "Tensor[]");

  // out[first + b] = x[b]^T, contiguous [B, R, C] to [.., C, R]: between contiguous and
  // channels_last.
  m.def("transpose_(Tensor x, Tensor(a!) out, int first=0) -> ()");

  // Asks for huge pages for t's memory before its first touch; a hint, never an error.
  m.def("advise_huge_pages_(Tensor(a!) t) -> ()");
  // Gives t's memory back to the system, but for the ends of it; what it held is lost. Also a hint.
  m.def("discard_pages_(Tensor(a!) t) -> ()");

  // The instruction set in use: default, avx2, avx512 or avx512_bf16.
  m.def("cpu_capability() -> str");
}
