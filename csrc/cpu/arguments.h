// What the implementations of the ops share: the arguments of a call, checked as they are taken,
// and the vectors that its reductions return.
#pragma once

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "../stable_utils.h"
#include "kernels.h"

namespace fused_bottleneck::cpu {

inline const Kernels& kernels_for(ScalarType dtype) {
  const Kernels* table = capability().kernels;
  switch (dtype) {
    case ScalarType::Double:
      return table[static_cast<int>(Dtype::float64)];
    case ScalarType::BFloat16:
      return table[static_cast<int>(Dtype::bfloat16)];
    case ScalarType::Half:
      return table[static_cast<int>(Dtype::float16)];
    default:
      return table[static_cast<int>(Dtype::float32)];
  }
}

// The arguments of one call, checked against its first matrix as they are taken.
class Arguments {
 public:
  Arguments(const char* op, const char* name, const Tensor& matrix)
      : op_(op), first_name_(name), first_(matrix) {
    check_matrix(op, name, matrix);
    rows = matrix.size(0);
    channels = matrix.size(1);
    dtype = matrix.scalar_type();
    acc_dtype = accumulation_dtype(dtype);
  }

  const void* matrix(const char* name, const Tensor& t) const {
    check_tensor(op_, name, t, dtype, {rows, channels});
    return t.const_data_ptr();
  }

  const void* matrix(const char* name, const OptionalTensor& t) const {
    return t.has_value() ? matrix(name, *t) : nullptr;
  }

  const void* vector(const char* name, const Tensor& t) const {
    check_tensor(op_, name, t, acc_dtype, {channels});
    return t.const_data_ptr();
  }

  // A vector of `value`, owned by this object, stands in for None: the kernels need no case.
  const void* vector_or(double value, const char* name, const OptionalTensor& t) {
    if (t.has_value()) return vector(name, *t);
    if (acc_dtype == ScalarType::Double) {
      return doubles_.emplace_back(channels, value).data();
    }
    return floats_.emplace_back(channels, static_cast<float>(value)).data();
  }

  const void* vector_or_null(const char* name, const OptionalTensor& t) const {
    return t.has_value() ? vector(name, *t) : nullptr;
  }

  const uint8_t* mask(const Tensor& t) const {
    check_tensor(op_, "mask", t, ScalarType::Byte, {rows, (channels + 7) / 8});
    return static_cast<const uint8_t*>(t.const_data_ptr());
  }

  using Others = std::initializer_list<std::pair<const char*, OptionalTensor>>;

  // The output matrix; it may share memory with an input matrix only exactly.
  void* output(const char* name, const Tensor& t, Others inputs) const {
    check_tensor(op_, name, t, dtype, {rows, channels});
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

  Tensor new_vector() const { return torch::stable::new_empty(first_, {channels}, acc_dtype); }

  int64_t rows, channels;
  ScalarType dtype, acc_dtype;

 private:
  const char *op_, *first_name_;
  const Tensor& first_;
  std::vector<std::vector<float>> floats_;
  std::vector<std::vector<double>> doubles_;
};

// Two results of each part of the rows, [count, channels] doubles each.
class Partials {
 public:
  Partials(int64_t count, int64_t channels)
      : count(count), channels_(channels), data_(new double[2 * count * channels]) {}

  double* first(int64_t part) const { return data_.get() + part * channels_; }
  double* second(int64_t part) const { return first(count + part); }

  const int64_t count;

 private:
  int64_t channels_;
  std::unique_ptr<double[]> data_;
};

// A new vector with these values, rounded to the accumulation dtype.
inline Tensor to_vector(const Arguments& args, const double* values) {
  Tensor vector = args.new_vector();
  void* data = vector.mutable_data_ptr();
  if (args.acc_dtype == ScalarType::Double) {
    std::copy_n(values, args.channels, static_cast<double*>(data));
  } else {
    std::transform(values, values + args.channels, static_cast<float*>(data),
                   [](double value) { return static_cast<float>(value); });
  }
  return vector;
}

// The sum over parts, in order; `partial(part)` are [channels] sums, the first is overwritten and
// returned.
template <class Partial>
const double* add_parts(int64_t channels, int64_t count, const Partial& partial) {
  double* total = partial(0);
  for (int64_t part = 1; part < count; ++part)
    std::transform(total, total + channels, partial(part), total, std::plus<>());
  return total;
}

// The same as a new vector.
template <class Partial>
Tensor sum_parts(const Arguments& args, int64_t count, const Partial& partial) {
  return to_vector(args, add_parts(args.channels, count, partial));
}

}  // namespace fused_bottleneck::cpu
