// A product over pixels (or other rows): panels, sums and their order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "product_operands.h"

namespace fused_bottleneck::cpu {

// left^T right, left [rows, wide] and right [rows, narrow]: float32 within a block and over few, or
// double.
enum class Symmetry {
  none,
  product,     // left^T right is symmetric: half of it is computed
  covariance,  // so it is, of left and right the same; its sums are double
};

class PixelProduct {
 public:
  PixelProduct(const ProductKernels& kernels, int64_t rows, int64_t wide, int64_t narrow,
               const Split& split, Symmetry symmetry = Symmetry::none, bool in_double = false)
      : split(split),
        blocks(pixel_blocks(rows, split)),
        left_rows(left_stride(words(kernels, blocks.block))),
        right_rows(right_stride(words(kernels, blocks.block))),
        kernels_(kernels),
        wide_(wide),
        narrow_(narrow),
        symmetric_(symmetry != Symmetry::none),
        in_double_(in_double),
        float_sums_(symmetry != Symmetry::covariance && has_few_blocks(blocks)) {}

  // Takes the panels of all threads and the sums.
  void take(Workspace& workspace) {
    floats_ = pixel_floats(blocks, wide_, narrow_);
    panels_ = workspace.take<float>(blocks.threads * split.channel_parts * floats_);
    sums_ = workspace.take_sums(blocks.threads * sums_step(), float_sums_);
  }

  // A thread's panels, and behind them room for values.
  float* left(const Block& block) const { return panels_ + block.worker * floats_; }
  float* right(const Block& block) const { return left(block) + wide_ * left_rows; }
  float* values(const Block& block) const { return right(block) + narrow_ * right_rows; }

  // The wide channels of the block's thread.
  ChannelRange channels(const Block& block) const {
    return ChannelRange(wide_, split.channel_parts, block.part);
  }

  // Adds the product of the panels of a block, and fetches the next rows of their sources.
  void add(const Block& block, const ProductMatrix* wide, const ProductMatrix* narrow) const {
    const ChannelRange range = channels(block);
    const bool whole = split.channel_parts == 1;
    kernels_.accumulate({0,
                         words(kernels_, block.rows),
                         range.size(),
                         narrow_,
                         left(block),
                         left_rows,
                         right(block),
                         right_rows,
                         in_double_,
                         symmetric_,
                         block.first,
                         sums_ + block.share * sums_step() + range.begin * narrow_,
                         {whole ? next_rows(block, wide) : Ahead{}, next_rows(block, narrow)}});
  }

  // Into a contiguous matrix [wide, narrow], or [narrow, wide] if transposed.
  void total_into(const Tensor& out, bool transposed) const {
    unpack({static_cast<float*>(out.mutable_data_ptr()), nullptr}, transposed);
  }

  // Of a symmetric product, in T: float or double.
  template <class T>
  Tensor symmetric_total(const Tensor& like) const {
    constexpr bool is_double = std::is_same_v<T, double>;
    const ScalarType dtype = is_double ? ScalarType::Double : ScalarType::Float;
    Tensor out = torch::stable::new_empty(like, {wide_, wide_}, dtype);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    if constexpr (is_double) {
      unpack({nullptr, to}, false);
    } else {
      unpack({to, nullptr}, false);
    }
    mirror(to);
    return out;
  }

  const Split split;
  const Blocks blocks;
  const int64_t left_rows, right_rows;  // of the panels

 private:
  int64_t sums_step() const { return round_up(wide_ * narrow_, kAlignment); }

  static int64_t words(const ProductKernels& kernels, int64_t rows) {
    return (rows + kernels.per_word - 1) / kernels.per_word;
  }

  static Ahead next_rows(const Block& block, const ProductMatrix* matrix) {
    if (matrix == nullptr) return {};
    return matrix->rows(block.begin + block.rows, block.next_rows);
  }

  // What is below the diagonal, from what is above.
  template <class T>
  void mirror(T* to) const {
    torch::stable::parallel_for(0, wide_ / kLeft, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kLeft; i < end * kLeft; i += kLeft)
        for (int64_t j = 0; j < i + kLeft; ++j)
          for (int64_t k = std::max(i, j + 1); k < i + kLeft; ++k)
            to[k * wide_ + j] = to[j * wide_ + k];
    });
  }

  void unpack(const Sums& out, bool transposed) const {
    torch::stable::parallel_for(0, wide_ / kLeft, 8, [&](int64_t begin, int64_t end) {
      kernels_.unpack_sums({begin * kLeft, end * kLeft, narrow_, sums_, blocks.threads, sums_step(),
                            symmetric_, transposed ? 1 : narrow_, transposed ? wide_ : 1, out});
    });
  }

  const ProductKernels& kernels_;
  int64_t wide_, narrow_, floats_ = 0;
  bool symmetric_, in_double_, float_sums_;
  float* panels_ = nullptr;
  Sums sums_;
};

}  // namespace fused_bottleneck::cpu
