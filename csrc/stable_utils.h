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

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Throws unless t is a contiguous tensor of a supported dtype with so many dimensions (named in the
// message by `form`), none of them empty.
inline void check_dense(const char* op, const char* name, const Tensor& t, int64_t dim,
                        const char* form) {
  const bool right = is_on_device(t) && is_supported(t.scalar_type()) && t.dim() == dim;
  STD_TORCH_CHECK(right && t.is_contiguous(), op, ": expected ", name, " to be ", form,
                  " of float32, float64, bfloat16 or float16, contiguous, ", kOnDevice, ", got ",
                  describe(t));
  STD_TORCH_CHECK(t.numel() > 0, op, ": expected ", name,
                  " to have at least one row and one channel, got ", describe(t));
}

inline void check_matrix(const char* op, const char* name, const Tensor& t) {
  check_dense(op, name, t, 2, "a matrix [P, C]");
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
