// Argument checks on libtorch's stable ABI, with one form of message:
//   <op>: expected <argument> to be <dtype> [<sizes>] ..., got <dtype> [<sizes>] ...
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

inline std::string describe(const Tensor& t) {
  std::string text = dtype_name(t.scalar_type()) + " " + shape_name(t.sizes());
  if (!t.is_contiguous()) text += ", not contiguous, strides " + shape_name(t.strides());
  if (!t.is_cpu()) text += ", not on the CPU";
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

// Throws unless t is a contiguous CPU tensor of exactly this dtype and these sizes.
inline void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                         std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == dtype && has_sizes(t, sizes) && t.is_contiguous(), op,
      ": expected ", name, " to be ", dtype_name(dtype), " ", shape_name(sizes),
      ", contiguous, on the CPU, got ", describe(t));
}

// Throws unless t is a contiguous CPU tensor of a supported dtype with so many dimensions (named in
// the message by `form`), none of them empty.
inline void check_dense(const char* op, const char* name, const Tensor& t, int64_t dim,
                        const char* form) {
  const ScalarType dtype = t.scalar_type();
  const bool supported = dtype == ScalarType::Float || dtype == ScalarType::Double ||
                         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  STD_TORCH_CHECK(t.is_cpu() && supported && t.dim() == dim && t.is_contiguous(), op, ": expected ",
                  name, " to be ", form,
                  " of float32, float64, bfloat16 or float16, contiguous, "
                  "on the CPU, got ",
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
