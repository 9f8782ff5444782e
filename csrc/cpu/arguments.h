// What the CPU implementations of the ops share: the arguments of a call and the vectors that its
// reductions return.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "kernels.h"

namespace fused_bottleneck::cpu {

// A result larger than this goes past the caches: little of it would still be there at its use.
constexpr int64_t kStreamBytes = 24 * 1024 * 1024;
inline bool goes_past_caches(const Tensor& out) {
  return out.numel() * out.element_size() > kStreamBytes;
}

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

// With host memory to stand in for what is absent: the kernels need no case.
class Arguments : public fused_bottleneck::Arguments {
 public:
  using fused_bottleneck::Arguments::Arguments;

  // The vector, or one of `value` that this object owns.
  const void* vector_or(double value, const char* name, const OptionalTensor& t) {
    if (t.has_value()) return vector(name, *t);
    if (acc_dtype == ScalarType::Double) {
      return doubles_.emplace_back(channels, value).data();
    }
    return floats_.emplace_back(channels, static_cast<float>(value)).data();
  }

 private:
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

// Both sums, over all parts.
inline std::tuple<Tensor, Tensor> sum_both_parts(const Arguments& args, const Partials& partials) {
  return {sum_parts(args, partials.count, [&](int64_t part) { return partials.first(part); }),
          sum_parts(args, partials.count, [&](int64_t part) { return partials.second(part); })};
}

}  // namespace fused_bottleneck::cpu
