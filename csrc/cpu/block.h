// What the block's two programs on CPU share: its sizes, the scratch that they lay out in memory
// that the caller lent, and the small algebra between the ops.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "../stable_utils.h"

namespace fused_bottleneck::cpu {

// --- tensors over memory that outlives them ---

inline Tensor view_of(const void* data, std::initializer_list<int64_t> sizes,
                      std::initializer_list<int64_t> strides, ScalarType dtype) {
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<void*>(data), {sizes.begin(), sizes.size()},
                                  {strides.begin(), strides.size()}, cpu, dtype);
}

// A contiguous float32 matrix [rows, channels].
inline Tensor matrix_over(const float* data, int64_t rows, int64_t channels) {
  return view_of(data, {rows, channels}, {channels, 1}, ScalarType::Float);
}

// [N, C, H, W] float32 images in channels_last memory.
struct Pixels {
  // Of a tensor in channels_last memory.
  explicit Pixels(const Tensor& t)
      : data(static_cast<float*>(t.mutable_data_ptr())),
        count(t.size(0)),
        height(t.size(2)),
        width(t.size(3)),
        channels(t.size(1)) {}
  Pixels(float* data, int64_t count, int64_t height, int64_t width, int64_t channels)
      : data(data), count(count), height(height), width(width), channels(channels) {}

  int64_t rows() const { return count * height * width; }
  int64_t image() const { return height * width * channels; }
  Tensor matrix() const { return matrix_over(data, rows(), channels); }
  Tensor nhwc() const {
    return view_of(data, {count, height, width, channels}, {image(), width * channels, channels, 1},
                   ScalarType::Float);
  }
  Pixels images(int64_t begin, int64_t end) const {
    return {data + begin * image(), end - begin, height, width, channels};
  }

  float* data;
  int64_t count, height, width, channels;
};

// A 1x1 weight [W, K, 1, 1] that is dense, as [W, K] and as [K, W].
inline Tensor weight_rows(const Tensor& weight) {
  return matrix_over(static_cast<const float*>(weight.const_data_ptr()), weight.size(0),
                     weight.size(1));
}
inline Tensor weight_columns(const Tensor& weight) {
  const int64_t width = weight.size(0), depth = weight.size(1);
  return view_of(weight.const_data_ptr(), {depth, width}, {1, depth}, ScalarType::Float);
}

inline const float* floats(const Tensor& t) {
  return static_cast<const float*>(t.const_data_ptr());
}
inline float* data_of(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline Tensor new_vector(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Float);
}

// The vector of f(i).
template <class F>
Tensor vector_of(const Tensor& like, int64_t size, const F& f) {
  const Tensor v = new_vector(like, size);
  float* to = data_of(v);
  for (int64_t i = 0; i < size; ++i) to[i] = f(i);
  return v;
}

// --- sizes ---

// What is kept of a tail unit's output: of so many first images, or nothing as it goes the gram
// way (tail_plan.py).
constexpr int64_t kGram = -1;

// How many tensors backward gets: y1, y2, the mask and mean and invstd of two normalisations; of a
// tail unit by its way.
constexpr size_t kSavedOfConvs = 7, kSavedOfGram = 5, kSavedOfProduct = 3;

// The block's sizes, from ops.cpp's list of them. The downsample's stride is 0 without one.
struct BlockSizes {
  explicit BlockSizes(const std::vector<int64_t>& s, const std::vector<int64_t>& images)
      : images(images) {
    STD_TORCH_CHECK(s.size() == 10 && images.size() == (s[9] > 0 ? 2u : 1u),
                    "block: expected 10 sizes and images of each tail unit, got ", s.size(),
                    " and ", images.size());
    count = s[0], in_channels = s[1], in_height = s[2], in_width = s[3], width = s[4],
    out_channels = s[5], out_height = s[6], out_width = s[7], stride = s[8],
    downsample_stride = s[9];
  }

  bool has_downsample() const { return downsample_stride > 0; }
  bool is_gram(size_t unit) const { return images[unit] == kGram; }
  size_t saved() const {
    size_t count = kSavedOfConvs;
    for (size_t unit = 0; unit < images.size(); ++unit)
      count += is_gram(unit) ? kSavedOfGram : kSavedOfProduct;
    return count;
  }
  // Whether the downsample's operand is written: its pixels are apart, or it is centred.
  bool writes_strided() const { return has_downsample() && (downsample_stride > 1 || is_gram(1)); }
  // Throws unless these are x and the narrow tensors of such a block, and units its lists' length.
  void check(const char* op, const Tensor& x, const Tensor& y1, const Tensor& y2,
             size_t units) const;

  int64_t in_rows() const { return count * in_height * in_width; }
  int64_t out_rows() const { return count * out_height * out_width; }

  Pixels before(float* data, int64_t channels) const {
    return {data, count, in_height, in_width, channels};
  }
  Pixels after(float* data, int64_t channels) const {
    return {data, count, out_height, out_width, channels};
  }

  // The pixels of x that the downsample sees, less the centre if there is one: those of x itself,
  // or written into memory for them.
  Pixels strided_operand(const Tensor& x, float* memory, const OptionalTensor& centre) const;

  // Bytes for any product, or 3x3 convolution, of the block; chunk: how many images of the output
  // at a time, 0 for all.
  int64_t workspace_bytes(int64_t chunk) const;

  int64_t count, in_channels, in_height, in_width, width, out_channels, out_height, out_width;
  int64_t stride, downsample_stride;
  const std::vector<int64_t> images;
};

// Arrays behind one another in memory that the caller lent; one that is not wanted is empty.
class Scratch {
 public:
  // Takes an array of floats: returns where it begins.
  int64_t take(int64_t floats, bool wanted = true) {
    const int64_t begin = bytes;
    if (wanted) bytes += (floats * static_cast<int64_t>(sizeof(float)) + kLine - 1) / kLine * kLine;
    return begin;
  }

  static constexpr int64_t kLine = 64;
  int64_t bytes = 0;
};

// The scratch of forward: the operands of conv3 and the downsample, outputs of the product way, and
// images of the block's output where that is contiguous.
struct ForwardScratch {
  ForwardScratch(const BlockSizes& s, int64_t chunk);

  Scratch layout;
  int64_t operand, strided, outputs[2], images, workspace;
};

// That of backward. Of each tail unit `wide` is its output (product way) and `product` g a, which
// becomes the gradient of its operand; `grad`, that of conv2's input, begins where the operands and
// outputs were, which nothing reads any more.
struct BackwardScratch {
  explicit BackwardScratch(const BlockSizes& s);

  Scratch layout;
  int64_t operand, strided, wide[2], products[2], grad, workspace;
};

// The last array of scratch, from `offset` on; throws unless there are `bytes` of it.
inline Tensor workspace_of(const char* op, const Tensor& scratch, int64_t bytes, int64_t offset) {
  STD_TORCH_CHECK(scratch.is_cpu() && scratch.scalar_type() == ScalarType::Byte &&
                      scratch.is_contiguous() && scratch.numel() >= bytes,
                  op, ": expected scratch to have ", bytes, " bytes on the CPU, got ",
                  describe(scratch));
  return view_of(static_cast<const char*>(scratch.const_data_ptr()) + offset,
                 {scratch.numel() - offset}, {1}, ScalarType::Byte);
}

// Throws unless t is float32 [N, C, H, W] of these sizes in channels_last memory, or contiguous if
// that may be.
inline void check_images(const char* op, const char* name, const Tensor& t,
                         std::initializer_list<int64_t> sizes, bool contiguous_too = false) {
  const bool right = t.is_cpu() && t.scalar_type() == ScalarType::Float && has_sizes(t, sizes);
  STD_TORCH_CHECK(right && (is_channels_last(t) || (contiguous_too && t.is_contiguous())), op,
                  ": expected ", name, " to be float32 ", shape_name(sizes),
                  ", channels_last, on the CPU, got ", describe(t));
}

// --- algebra ---

// relu((y - mean) * scale + beta): a normalisation with the statistics of a batch.
struct Norm {
  Tensor mean, invstd, scale;
  OptionalTensor beta;
};

inline float gamma_at(const OptionalTensor& gamma, int64_t c) {
  return gamma.has_value() ? floats(*gamma)[c] : 1.0f;
}

inline Tensor scale_of(const OptionalTensor& gamma, const Tensor& invstd) {
  const float* s = floats(invstd);
  return vector_of(invstd, invstd.numel(), [&](int64_t c) { return gamma_at(gamma, c) * s[c]; });
}

// The normalisation of rows with that mean and sum of squared deviations, and in `reported` what
// the running statistics see: the mean with the convolution's bias, the unbiased variance.
inline Norm norm_of(const std::tuple<Tensor, Tensor>& moments, int64_t rows,
                    const OptionalTensor& gamma, const OptionalTensor& beta,
                    const OptionalTensor& bias, double eps, std::vector<Tensor>& reported) {
  const auto& [mean, m2] = moments;
  const float *m = floats(mean), *squares = floats(m2);
  const auto count = static_cast<float>(rows);
  const auto variance = [&](int64_t c) { return squares[c] / count; };
  const int64_t channels = mean.numel();
  const Tensor invstd = vector_of(mean, channels, [&](int64_t c) {
    return 1.0f / std::sqrt(variance(c) + static_cast<float>(eps));
  });
  const auto bessel = static_cast<float>(static_cast<double>(rows) / static_cast<double>(rows - 1));
  reported.push_back(vector_of(mean, channels, [&](int64_t c) {
    return bias.has_value() ? m[c] + floats(*bias)[c] : m[c];
  }));
  reported.push_back(vector_of(mean, channels, [&](int64_t c) { return variance(c) * bessel; }));
  return {mean, invstd, scale_of(gamma, invstd), beta};
}

// The coefficients k0, k1 of a normalisation's gradient, from the two sums over its rows.
inline std::tuple<Tensor, Tensor> grad_coefficients(const std::tuple<Tensor, Tensor>& sums,
                                                    const Tensor& invstd, int64_t rows) {
  const auto& [sum_g, sum_g_xhat] = sums;
  const float *g = floats(sum_g), *g_xhat = floats(sum_g_xhat), *s = floats(invstd);
  const auto count = static_cast<float>(rows);
  const int64_t channels = invstd.numel();
  return {vector_of(invstd, channels, [&](int64_t c) { return g[c] / count; }),
          vector_of(invstd, channels, [&](int64_t c) { return s[c] * g_xhat[c] / count; })};
}

// relu(beta): what conv3's operand is centred at.
inline Tensor relu_of_shift(const OptionalTensor& beta, const Tensor& like) {
  return vector_of(like, like.numel(), [&](int64_t c) {
    const float b = beta.has_value() ? floats(*beta)[c] : 0.0f;
    return b <= 0 ? 0.0f : b;
  });
}

// A constant near the channel means of the pixels that a stride leaves of x: those of a sample of
// them (Stages.centre).
Tensor sampled_centre(const Tensor& x, int64_t stride);
// to = from, in parallel.
void copy_all(const float* from, float* to, int64_t count);
// The pixels of grad_x that a stride leaves += value.
void add_strided(const Pixels& value, int64_t stride, const Pixels& grad_x);

}  // namespace fused_bottleneck::cpu
