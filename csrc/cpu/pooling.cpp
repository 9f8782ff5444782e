// The CPU implementation of the max pooling in ops.cpp: checks, threads, the order of reductions.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "parallel.h"

namespace fused_bottleneck::cpu {
namespace {

constexpr size_t kPoolInts = 8;

// Whether every output's window has an element inside, as the kernels assume.
bool windows_fit(const PoolAxis& axis) {
  const bool positive = std::min({axis.kernel, axis.stride, axis.dilation}) > 0;
  if (!positive || axis.padding < 0 || axis.kernel > kNoTap) return false;
  const int64_t last = (axis.out - 1) * axis.stride - axis.padding;
  const int64_t reach = (axis.kernel - 1) * axis.dilation;
  // The first windows start in the padding, where a step of the dilation must not go past the end.
  return last < axis.in && axis.padding <= reach && (axis.padding == 0 || axis.dilation <= axis.in);
}

PoolAxis axis_of(const std::vector<int64_t>& pool, size_t side, int64_t in, int64_t out) {
  return {in, out, pool[side], pool[2 + side], pool[4 + side], pool[6 + side]};
}

// The arguments of a pooling: y and its vectors by the base class, the pooled tensors here.
class PoolArguments : public Arguments {
 public:
  PoolArguments(const char* op, const Tensor& y, const char* name, const Tensor& pooled,
                const std::vector<int64_t>& pool)
      : Arguments(op, "y", y) {
    STD_TORCH_CHECK(y.dim() == 4 && pooled.dim() == 4 && pooled.size(0) == y.size(0), op,
                    ": expected y and ", name, " to be as many images [N, C, H, W], got ",
                    shape_name(y.sizes()), " and ", shape_name(pooled.sizes()));
    check_matrix(op, name, pooled);
    pooled_rows_ = matrix_rows(pooled);
    STD_TORCH_CHECK(pool.size() == kPoolInts, op, ": expected pool to be 8 integers, got ",
                    pool.size());
    window = {axis_of(pool, 0, y.size(2), pooled.size(2)),
              axis_of(pool, 1, y.size(3), pooled.size(3))};
    STD_TORCH_CHECK(windows_fit(window.height) && windows_fit(window.width) &&
                        window.height.kernel * window.width.kernel <= kNoTap,
                    op, ": expected windows of at most 255 elements, with one at least in ",
                    shape_name(y.sizes()), ", got pool ", shape_name(pool), " for ", name, " ",
                    shape_name(pooled.sizes()));
    in_lines = y.size(0) * window.height.in;
    out_lines = y.size(0) * window.height.out;
  }

  const void* pooled(const char* name, const Tensor& t, ScalarType of) const {
    check_matrix(op_, name, t, of, pooled_rows_, channels);
    return t.const_data_ptr();
  }

  const uint8_t* index(const Tensor& t) const {
    return static_cast<const uint8_t*>(pooled("index", t, ScalarType::Byte));
  }

  PoolWindow window;
  int64_t in_lines, out_lines;

 private:
  int64_t pooled_rows_;
};

// The outputs that have an input in their window.
class Uses {
 public:
  explicit Uses(const PoolAxis& axis) : first_(axis.in + 1, 0) {
    for (int64_t in = 0; in < axis.in; ++in) {
      for (int64_t tap = axis.kernel; tap-- > 0;) {
        const int64_t start = in + axis.padding - tap * axis.dilation;
        if (start >= 0 && start % axis.stride == 0 && start / axis.stride < axis.out)
          uses_.push_back({start / axis.stride, tap});
      }
      first_[in + 1] = static_cast<int64_t>(uses_.size());
    }
  }

  PoolUses view() const { return {first_.data(), uses_.data()}; }

 private:
  std::vector<int64_t> first_;
  std::vector<PoolUse> uses_;
};

}  // namespace

void bn_relu_pool_(const Tensor& y, const Tensor& mean, const Tensor& scale,
                   const OptionalTensor& beta, const std::vector<int64_t>& pool, const Tensor& out,
                   const Tensor& index) {
  const char* op = "bn_relu_pool_";
  PoolArguments args(op, y, "out", out, pool);
  args.pooled("out", out, args.dtype);
  args.index(index);
  check_disjoint(op, "out", out, "y", y);
  check_disjoint(op, "index", index, "y", y);
  check_disjoint(op, "index", index, "out", out);
  const BnReluPool call{args.channels,
                        args.window,
                        y.const_data_ptr(),
                        args.vector("mean", mean),
                        args.vector("scale", scale),
                        args.vector_or(0, "beta", beta),
                        out.mutable_data_ptr(),
                        static_cast<uint8_t*>(index.mutable_data_ptr())};
  const auto kernel = kernels_for(args.dtype).bn_relu_pool;
  parallel_rows(args.out_lines, args.window.width.out * args.channels,
                [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

std::tuple<Tensor, Tensor> pool_bn_backward_reduce(const Tensor& grad_out, const Tensor& index,
                                                   const std::vector<int64_t>& pool,
                                                   const Tensor& y, const Tensor& mean,
                                                   const Tensor& invstd) {
  const PoolArguments args("pool_bn_backward_reduce", y, "grad_out", grad_out, pool);
  const PoolBnBackwardReduce call{args.channels,
                                  args.window,
                                  args.pooled("grad_out", grad_out, args.dtype),
                                  args.index(index),
                                  y.const_data_ptr(),
                                  args.vector("mean", mean),
                                  args.vector("invstd", invstd)};
  const auto kernel = kernels_for(args.dtype).pool_bn_backward_reduce;
  const int64_t width = args.window.width.out;
  const Chunks chunks(args.out_lines, width * args.channels, (kChunkPixels + width - 1) / width);
  const Partials partials(chunks.count, args.channels);
  parallel_chunks(chunks, [&](int64_t chunk) {
    kernel(call, chunks.begin(chunk), chunks.end(chunk), partials.first(chunk),
           partials.second(chunk));
  });
  return sum_both_parts(args, partials);
}

void pool_bn_backward_(const Tensor& grad_out, const Tensor& index,
                       const std::vector<int64_t>& pool, const Tensor& y, const Tensor& mean,
                       const Tensor& scale, const OptionalTensor& k0, const OptionalTensor& k1,
                       const Tensor& out) {
  const char* op = "pool_bn_backward_";
  const PoolArguments args(op, y, "grad_out", grad_out, pool);
  args.together("k0", k0, "k1", k1);
  const Uses rows(args.window.height), columns(args.window.width);
  const PoolBnBackward call{args.channels,
                            args.window,
                            rows.view(),
                            columns.view(),
                            args.pooled("grad_out", grad_out, args.dtype),
                            args.index(index),
                            y.const_data_ptr(),
                            args.vector("mean", mean),
                            args.vector("scale", scale),
                            args.vector_or_null("k0", k0),
                            args.vector_or_null("k1", k1),
                            args.output("out", out, {})};
  check_disjoint(op, "out", out, "grad_out", grad_out);
  check_disjoint(op, "out", out, "index", index);
  const auto kernel = kernels_for(args.dtype).pool_bn_backward;
  parallel_rows(args.in_lines, args.window.width.in * args.channels,
                [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(fused_bottleneck, CPU, m) {
  m.impl("bn_relu_pool_", TORCH_BOX(&bn_relu_pool_));
  m.impl("pool_bn_backward_reduce", TORCH_BOX(&pool_bn_backward_reduce));
  m.impl("pool_bn_backward_", TORCH_BOX(&pool_bn_backward_));
}

}  // namespace fused_bottleneck::cpu
