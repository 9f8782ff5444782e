// The fused products over pixels of ops.cpp on CPU, float32 or bfloat16: gradients of 1x1 weights,
// covariances.
//
// FLOPs: 2 rows * wide * narrow each, half of it where it is symmetric. Bytes: every operand and
// every result once; the sums stay in the caches.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu_ops.h"
#include "pixel_product.h"

namespace fused_bottleneck::cpu {
void transposed_product_into(const Tensor& a, const Tensor& b, const Tensor& out,
                             const Tensor& lent) {
  constexpr const char* op = "transposed_product";
  check_matrix(op, "a", a);
  const int64_t rows = matrix_rows(a);
  const ScalarType dtype = product_dtype(a);
  const ProductMatrix sources[] = {product_matrix(op, "a", a, dtype, rows),
                                   product_matrix(op, "b", b, dtype, rows)};
  const bool swapped = sources[0].channels < sources[1].channels;  // the narrower one on the right
  const ProductMatrix &left = sources[swapped], &right = sources[!swapped];
  const int64_t wide = left.channels, narrow = right.channels;
  const ProductKernels& kernels = product_kernels_for(dtype);
  PixelProduct product(kernels, rows, wide, narrow, Split::of(wide * narrow));
  Workspace workspace(op, lent, transposed_bytes(rows, wide, narrow));
  product.take(workspace);
  parallel_blocks(product.blocks, product.split.channel_parts, [&](const Block& block) {
    const ChannelRange range = product.channels(block);
    kernels.pack_left({left.row(block.begin) + range.begin * a.element_size(), block.rows,
                       range.size(), wide, product.left_rows, nullptr, product.left(block),
                       nullptr});
    kernels.pack_right({right.row(block.begin), block.rows, narrow, narrow, product.right_rows,
                        nullptr, product.right(block), nullptr});
    product.add(block, &left, &right);
  });
  product.total_into(out, swapped);
}

Tensor transposed_product(const Tensor& a, const Tensor& b, const Tensor& lent) {
  check_matrix("transposed_product", "a", a);
  check_matrix("transposed_product", "b", b);
  Tensor out =
      torch::stable::new_empty(a, {matrix_channels(a), matrix_channels(b)}, ScalarType::Float);
  transposed_product_into(a, b, out, lent);
  return out;
}

namespace {

std::tuple<Tensor, Tensor> symmetric_product(const char* op, const Tensor& d, const Tensor& lent,
                                             ScalarType dtype, bool in_double) {
  check_matrix(op, "d", d);
  const int64_t rows = matrix_rows(d), channels = matrix_channels(d);
  const ProductMatrix source = product_matrix(op, "d", d, dtype, rows);
  const Split split = Split::by_rows(channels * channels);
  const ProductKernels& kernels = product_kernels_for(dtype);
  PixelProduct product(kernels, rows, channels, channels, split, Symmetry::covariance, in_double);
  Workspace workspace(op, lent, summed_bytes(rows, channels, channels));
  product.take(workspace);
  const int64_t threads = product.blocks.threads;
  const Partials sums(threads, channels);
  std::fill_n(sums.first(0), threads * channels, 0.0);
  parallel_blocks(product.blocks, [&](const Block& block) {
    const char* from = source.row(block.begin);
    kernels.pack_left({from, block.rows, channels, channels, product.left_rows, nullptr,
                       product.left(block), sums.first(block.worker)});
    kernels.pack_right({from, block.rows, channels, channels, product.right_rows, nullptr,
                        product.right(block), nullptr});
    product.add(block, &source, nullptr);
  });
  const auto thread_sums = [&](int64_t thread) { return sums.first(thread); };
  Tensor sum_d = torch::stable::new_empty(d, {channels}, ScalarType::Double);
  std::copy_n(add_parts(channels, threads, thread_sums), channels,
              static_cast<double*>(sum_d.mutable_data_ptr()));
  return {sum_d, product.symmetric_total<double>(d)};
}

}  // namespace

std::tuple<Tensor, Tensor> gram(const Tensor& d, const Tensor& workspace) {
  return symmetric_product("gram", d, workspace, product_dtype(d), false);
}

std::tuple<Tensor, Tensor> gram_in_double(const Tensor& d, const Tensor& workspace) {
  return symmetric_product("gram_in_double", d, workspace, ScalarType::Float, true);
}

Tensor masked_products_into(const Tensor& grad_out, const Tensor& mask, const Tensor& d,
                            const Tensor& weight, const Tensor& out, const Tensor& total,
                            const Tensor& lent) {
  constexpr const char* op = "masked_products_";
  const Arguments args(op, "grad_out", grad_out);
  const ScalarType dtype = product_dtype(grad_out);
  const ProductMatrix source = product_matrix(op, "grad_out", grad_out, dtype, args.rows);
  const uint8_t* bits = args.mask(mask);
  const ProductMatrix from_d = product_matrix(op, "d", d, dtype, args.rows);
  const int64_t wide = args.channels, narrow = from_d.channels, mask_stride = (wide + 7) / 8;
  check_matrix(op, "out", out, dtype, args.rows, narrow);
  check_disjoint(op, "out", out, "grad_out", grad_out);
  check_disjoint(op, "out", out, "d", d);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const ProductKernels& kernels = product_kernels_for(dtype);
  PackWeight packed = product_weight(op, "weight", weight, dtype, wide, narrow);
  Workspace workspace(op, lent, summed_bytes(args.rows, wide, narrow));
  packed.panels = workspace.take<float>(wide * narrow);
  pack(kernels, packed);
  PixelProduct s(kernels, args.rows, wide, narrow, Split::by_rows(wide * narrow));
  s.take(workspace);
  const Blocks& blocks = s.blocks;
  const Partials sums(blocks.threads, wide);
  const int64_t most = row_limit(kLeftBytes, wide);
  std::fill_n(sums.first(0), blocks.threads * wide, 0.0);
  parallel_blocks(blocks, [&](const Block& block) {
    float *left = s.left(block), *values = s.values(block);
    PackRows rows{source.row(block.begin),
                  block.rows,
                  wide,
                  wide,
                  s.left_rows,
                  bits + block.begin * mask_stride,
                  left,
                  sums.first(block.worker)};
    kernels.pack_left(rows);
    kernels.pack_right({from_d.row(block.begin), block.rows, narrow, narrow, s.right_rows, nullptr,
                        s.right(block), nullptr});
    s.add(block, &source, &from_d);
    if (kernels.per_word > 1) {
      rows.stride = left_stride(block.rows);
      kernels.pack_depth(rows);
    }
    for (int64_t row = 0; row < block.rows; row += most) {
      const int64_t part = std::min(most, block.rows - row);
      char* result = to + (block.begin + row) * from_d.row_bytes;
      // Whole tiles of float32 are computed where they belong.
      const bool in_place = dtype == ScalarType::Float && part % kRowMultiple == 0;
      float* computed = in_place ? reinterpret_cast<float*>(result) : values;
      kernels.multiply({round_up(part, kRowMultiple),
                        wide / kernels.per_word,
                        narrow,
                        left + row * kLeft,
                        rows.stride,
                        packed.panels,
                        computed,
                        {}});
      if (!in_place) kernels.write_values({part, narrow, computed, result});
    }
  });
  s.total_into(total, false);
  return sum_parts(args, blocks.threads, [&](int64_t thread) { return sums.first(thread); });
}

std::tuple<Tensor, Tensor> masked_products_(const Tensor& grad_out, const Tensor& mask,
                                            const Tensor& d, const Tensor& weight,
                                            const Tensor& out, const Tensor& workspace) {
  check_matrix("masked_products_", "grad_out", grad_out);
  check_matrix("masked_products_", "d", d);
  const Tensor s = torch::stable::new_empty(
      grad_out, {matrix_channels(grad_out), matrix_channels(d)}, ScalarType::Float);
  return {masked_products_into(grad_out, mask, d, weight, out, s, workspace), s};
}

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("transposed_product", TORCH_BOX(&transposed_product));
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("gram_in_double", TORCH_BOX(&gram_in_double));
  m.impl("masked_products_", TORCH_BOX(&masked_products_));
}

}  // namespace fused_bottleneck::cpu
