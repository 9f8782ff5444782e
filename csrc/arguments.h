// The arguments of a call of a pass, checked as they are taken.
#pragma once

#include <initializer_list>
#include <utility>

#include "stable_utils.h"

namespace fused_bottleneck {

// The arguments of one call, checked against its first matrix as they are taken.
class Arguments {
 public:
  Arguments(const char* op, const char* name, const Tensor& matrix)
      : op_(op), first_name_(name), first_(matrix) {
    check_matrix(op, name, matrix);
    rows = matrix_rows(matrix);
    channels = matrix_channels(matrix);
    dtype = matrix.scalar_type();
    acc_dtype = accumulation_dtype(dtype);
  }

  const void* matrix(const char* name, const Tensor& t) const {
    check_matrix(op_, name, t, dtype, rows, channels);
    check_device(name, t);
    return t.const_data_ptr();
  }

  const void* matrix(const char* name, const OptionalTensor& t) const {
    return t.has_value() ? matrix(name, *t) : nullptr;
  }

  const void* vector(const char* name, const Tensor& t) const {
    check(name, t, acc_dtype, {channels});
    return t.const_data_ptr();
  }

  const void* vector_or_null(const char* name, const OptionalTensor& t) const {
    return t.has_value() ? vector(name, *t) : nullptr;
  }

  const uint8_t* mask(const Tensor& t) const {
    check("mask", t, ScalarType::Byte, {rows, (channels + 7) / 8});
    return static_cast<const uint8_t*>(t.const_data_ptr());
  }

  using Others = std::initializer_list<std::pair<const char*, OptionalTensor>>;

  // The output matrix; it may share memory with an input matrix only exactly.
  void* output(const char* name, const Tensor& t, Others inputs) const {
    matrix(name, t);
    check_overlap(op_, name, t, first_name_, first_);
    for (const auto& [input_name, input] : inputs)
      if (input.has_value()) check_overlap(op_, name, t, input_name, *input);
    return t.mutable_data_ptr();
  }

  uint8_t* mask_output(const Tensor& t, Others others) const {
    mask(t);
    for (const auto& [other_name, other] : others)
      if (other.has_value()) check_overlap(op_, "mask", t, other_name, *other);
    return static_cast<uint8_t*>(t.mutable_data_ptr());
  }

  void together(const char* a_name, const OptionalTensor& a, const char* b_name,
                const OptionalTensor& b) const {
    STD_TORCH_CHECK(a.has_value() == b.has_value(), op_, ": expected ", a_name, " and ", b_name,
                    " to be given together, got only ", a.has_value() ? a_name : b_name);
  }

  Tensor new_vector() const { return new_tensor({channels}, acc_dtype); }

  Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType of) const {
    return torch::stable::new_empty(first_, sizes, of);
  }

  int32_t device() const { return first_.get_device_index(); }

  int64_t rows, channels;
  ScalarType dtype, acc_dtype;

 protected:
  Arguments(const char* op, const char* name, const Tensor& first, int64_t rows, int64_t channels)
      : rows(rows),
        channels(channels),
        dtype(first.scalar_type()),
        acc_dtype(accumulation_dtype(dtype)),
        op_(op),
        first_name_(name),
        first_(first) {}

  void check(const char* name, const Tensor& t, ScalarType expected,
             std::initializer_list<int64_t> sizes) const {
    check_tensor(op_, name, t, expected, sizes);
    check_device(name, t);
  }

  void check_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.get_device_index() == first_.get_device_index(), op_, ": expected ", name,
                    " to be on the device of ", first_name_);
  }

  const char *op_, *first_name_;
  const Tensor& first_;
};

}  // namespace fused_bottleneck
