// Argument checks on libtorch's stable ABI, with one form of message:
//   <op>: expected <argument> to be <dtype> [<sizes>] ..., got <dtype> [<sizes>] ...
//
// FUSED_BOTTLENECK_CUDA_LIBRARY is defined where the library for CUDA is built: its tensors are on
// a GPU, those of the other one on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

namespace fused_bottleneck {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Byte:
      return "uint8";
    default:
      return torch::headeronly::toString(dtype);
  }
}

template <class Sizes>
std::string shape_name(const Sizes& sizes) {
  std::ostringstream out;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    out << separator << size;
    separator = ", ";
  }
  out << (sizes.size() == 0 ? "[]" : "]");
  return out.str();
}

#if defined(FUSED_BOTTLENECK_CUDA_LIBRARY)
#define FUSED_BOTTLENECK_DISPATCH_KEY CUDA
constexpr const char* kOnDevice = "on the GPU";
inline bool is_on_device(const Tensor& t) { return t.is_cuda(); }
#else
#define FUSED_BOTTLENECK_DISPATCH_KEY CPU
constexpr const char* kOnDevice = "on the CPU";
inline bool is_on_device(const Tensor& t) { return t.is_cpu(); }
#endif

inline std::string describe(const Tensor& t) {
  std::string text = dtype_name(t.scalar_type()) + " " + shape_name(t.sizes());
  if (!t.is_contiguous()) text += ", not contiguous, strides " + shape_name(t.strides());
  if (!is_on_device(t)) text += std::string(", not ") + kOnDevice;
  return text;
}

inline ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool has_sizes(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t dim = 0;
  for (const int64_t size : sizes)
    if (t.size(dim++) != size) return false;
  return true;
}

// Throws unless t is a contiguous tensor of exactly this dtype and these sizes.
inline void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                         std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(
      is_on_device(t) && t.scalar_type() == dtype && has_sizes(t, sizes) && t.is_contiguous(), op,
      ": expected ", name, " to be ", dtype_name(dtype), " ", shape_name(sizes), ", contiguous, ",
      kOnDevice, ", got ", describe(t));
}

// Whether t is [N, C, H, W] with the channels of a pixel next to each other, pixels in order.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) return false;
  int64_t step = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != step) return false;
    step *= t.size(dim);
  }
  return true;
}

// A matrix is [P, C], contiguous, or [N, C, H, W] in channels_last memory: its P = N H W pixels.
inline bool is_matrix(const Tensor& t) {
  return t.dim() == 2 ? t.is_contiguous() : is_channels_last(t);
}
inline int64_t matrix_rows(const Tensor& t) {
  return t.dim() == 4 ? t.size(0) * t.size(2) * t.size(3) : t.size(0);
}
inline int64_t matrix_channels(const Tensor& t) { return t.size(1); }

constexpr const char* kMatrixLayout = ", contiguous (or pixels of a channels_last [N, C, H, W]), ";

// Throws unless t is a matrix of exactly this dtype and these sizes.
inline void check_matrix(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                         int64_t rows, int64_t channels) {
  const bool right = is_on_device(t) && t.scalar_type() == dtype && is_matrix(t);
  STD_TORCH_CHECK(right && matrix_rows(t) == rows && matrix_channels(t) == channels, op,
                  ": expected ", name, " to be ", dtype_name(dtype), " ",
                  shape_name(std::initializer_list<int64_t>{rows, channels}), kMatrixLayout,
                  kOnDevice, ", got ", describe(t));
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Throws unless t is of a supported dtype, not empty, and `right` in its form and layout, which the
// message names.
inline void check_dense(const char* op, const char* name, const Tensor& t, bool right,
                        const char* form, const char* layout) {
  STD_TORCH_CHECK(right && is_on_device(t) && is_supported(t.scalar_type()), op, ": expected ",
                  name, " to be ", form, " of float32, float64, bfloat16 or float16", layout,
                  kOnDevice, ", got ", describe(t));
  STD_TORCH_CHECK(t.numel() > 0, op, ": expected ", name,
                  " to have at least one row and one channel, got ", describe(t));
}

// Throws unless t is a matrix of a supported dtype.
inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  check_dense(op, name, t, is_matrix(t), "a matrix [P, C]", kMatrixLayout);
}

inline bool are_disjoint(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
  const auto end = [&](const Tensor& t) { return begin(t) + t.numel() * t.element_size(); };
  return end(a) <= begin(b) || end(b) <= begin(a);
}

inline void check_disjoint(const char* op, const char* out_name, const Tensor& out,
                           const char* name, const Tensor& input) {
  STD_TORCH_CHECK(are_disjoint(out, input), op, ": expected ", out_name, " to be separate from ",
                  name, ", got an overlap");
}

// Throws if out overlaps the input in any other way than being exactly the same memory.
inline void check_overlap(const char* op, const char* out_name, const Tensor& out, const char* name,
                          const Tensor& input) {
  const auto bytes = [](const Tensor& t) { return t.numel() * t.element_size(); };
  const bool same = out.const_data_ptr() == input.const_data_ptr() && bytes(out) == bytes(input);
  STD_TORCH_CHECK(same || are_disjoint(out, input), op, ": expected ", out_name,
                  " to be separate from, or exactly the same memory as, ", name,
                  ", got a partial overlap");
}

}  // namespace fused_bottleneck
