// The fused products over pixels of ops.cpp on CPU, float32: gradients of 1x1 weights, covariances.
//
// FLOPs: 2 rows * wide * narrow each, half of it where it is symmetric. Bytes: every operand and
// every result once; the sums stay in the caches.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu_ops.h"
#include "pixel_product.h"

namespace fused_bottleneck::cpu {
Tensor transposed_product(const Tensor& a, const Tensor& b, const Tensor& lent) {
  constexpr const char* op = "transposed_product";
  check_matrix(op, "a", a);
  const int64_t rows = matrix_rows(a);
  const float* sources[] = {product_matrix(op, "a", a, rows), product_matrix(op, "b", b, rows)};
  const int64_t sizes[] = {matrix_channels(a), matrix_channels(b)};
  const bool swapped = sizes[0] < sizes[1];  // the narrower one on the right
  const int64_t wide = sizes[swapped], narrow = sizes[!swapped];
  PixelProduct product(rows, wide, narrow, Split::of(wide * narrow));
  Workspace workspace(op, lent, transposed_bytes(rows, wide, narrow));
  product.take(workspace);
  const ProductKernels& kernels = kernels_in_use();
  const float *from_wide = sources[swapped], *from_narrow = sources[!swapped];
  parallel_blocks(product.blocks, product.split.channel_parts, [&](const Block& block) {
    const ChannelRange range = product.channels(block);
    kernels.pack_left({from_wide + block.begin * wide + range.begin, block.rows, range.size(), wide,
                       product.left_rows, nullptr, product.left(block), nullptr});
    kernels.pack_right({from_narrow + block.begin * narrow, block.rows, narrow, narrow,
                        product.right_rows, nullptr, product.right(block), nullptr});
    product.add(block, from_wide, from_narrow);
  });
  return product.total(a, swapped);
}

namespace {

std::tuple<Tensor, Tensor> symmetric_product(const char* op, const Tensor& d, const Tensor& lent,
                                             bool in_double) {
  check_matrix(op, "d", d);
  const int64_t rows = matrix_rows(d), channels = matrix_channels(d);
  const float* source = product_matrix(op, "d", d, rows);
  const Split split = Split::by_rows(channels * channels);
  PixelProduct product(rows, channels, channels, split, Symmetry::covariance, in_double);
  Workspace workspace(op, lent, summed_bytes(rows, channels, channels));
  product.take(workspace);
  const int64_t threads = product.blocks.threads;
  const Partials sums(threads, channels);
  std::fill_n(sums.first(0), threads * channels, 0.0);
  const ProductKernels& kernels = kernels_in_use();
  parallel_blocks(product.blocks, [&](const Block& block) {
    const float* from = source + block.begin * channels;
    kernels.pack_left({from, block.rows, channels, channels, product.left_rows, nullptr,
                       product.left(block), sums.first(block.worker)});
    kernels.pack_right({from, block.rows, channels, channels, product.right_rows, nullptr,
                        product.right(block), nullptr});
    product.add(block, source, nullptr);
  });
  const auto thread_sums = [&](int64_t thread) { return sums.first(thread); };
  Tensor sum_d = torch::stable::new_empty(d, {channels}, ScalarType::Double);
  std::copy_n(add_parts(channels, threads, thread_sums), channels,
              static_cast<double*>(sum_d.mutable_data_ptr()));
  return {sum_d, product.symmetric_total<double>(d)};
}

}  // namespace

std::tuple<Tensor, Tensor> gram(const Tensor& d, const Tensor& workspace) {
  return symmetric_product("gram", d, workspace, false);
}

std::tuple<Tensor, Tensor> gram_in_double(const Tensor& d, const Tensor& workspace) {
  return symmetric_product("gram_in_double", d, workspace, true);
}

std::tuple<Tensor, Tensor> masked_products_(const Tensor& grad_out, const Tensor& mask,
                                            const Tensor& d, const Tensor& weight,
                                            const Tensor& out, const Tensor& lent) {
  constexpr const char* op = "masked_products_";
  const Arguments args(op, "grad_out", grad_out);
  const float* source = product_matrix(op, "grad_out", grad_out, args.rows);
  const uint8_t* bits = args.mask(mask);
  const float* from_d = product_matrix(op, "d", d, args.rows);
  const int64_t wide = args.channels, narrow = matrix_channels(d), mask_stride = (wide + 7) / 8;
  check_matrix(op, "out", out, ScalarType::Float, args.rows, narrow);
  check_disjoint(op, "out", out, "grad_out", grad_out);
  check_disjoint(op, "out", out, "d", d);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  PackWeight packed = product_weight(op, "weight", weight, wide, narrow);
  Workspace workspace(op, lent, summed_bytes(args.rows, wide, narrow));
  packed.panels = workspace.take<float>(wide * narrow);
  pack(packed);
  PixelProduct s(args.rows, wide, narrow, Split::by_rows(wide * narrow));
  s.take(workspace);
  const Blocks& blocks = s.blocks;
  const Partials sums(blocks.threads, wide);
  const ProductKernels& kernels = kernels_in_use();
  const int64_t most = row_limit(kLeftBytes, wide);
  std::fill_n(sums.first(0), blocks.threads * wide, 0.0);
  parallel_blocks(blocks, [&](const Block& block) {
    float *left = s.left(block), *values = s.values(block);
    kernels.pack_left({source + block.begin * wide, block.rows, wide, wide, s.left_rows,
                       bits + block.begin * mask_stride, left, sums.first(block.worker)});
    kernels.pack_right({from_d + block.begin * narrow, block.rows, narrow, narrow, s.right_rows,
                        nullptr, s.right(block), nullptr});
    s.add(block, source, from_d);
    for (int64_t row = 0; row < block.rows; row += most) {
      const int64_t part = std::min(most, block.rows - row);
      float* rows = to + (block.begin + row) * narrow;
      // Whole tiles are computed where they belong.
      float* result = part % kRowMultiple == 0 ? rows : values;
      kernels.multiply({round_up(part, kRowMultiple),
                        wide,
                        narrow,
                        left + row * kLeft,
                        s.left_rows,
                        packed.panels,
                        result,
                        {}});
      if (result != rows) std::copy_n(result, part * narrow, rows);
    }
  });
  return {sum_parts(args, blocks.threads, [&](int64_t thread) { return sums.first(thread); }),
          s.total(grad_out, false)};
}

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("transposed_product", TORCH_BOX(&transposed_product));
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("gram_in_double", TORCH_BOX(&gram_in_double));
  m.impl("masked_products_", TORCH_BOX(&masked_products_));
}

}  // namespace fused_bottleneck::cpu
