// The passes with column sums. A block reduces a part of the rows, a second small kernel the parts:
// sums of up to kMaxRowsPerThread terms in the accumulation dtype, everything above in double.
// Predicted as in pointwise.cu: channel_moments of 64 channels 103 MB, 28 us; bn_backward_reduce of
// 64, 411 MB, 113 us; mask_grad of 256, 848 MB, 232 us; the second kernel of each under 10 us.
#include "device.cuh"

namespace fused_bottleneck::cuda {
namespace {

constexpr int kMinRowsPerThread = 16;   // bounds the partial results against the matrix
constexpr int kMaxRowsPerThread = 512;  // bounds the sums in the accumulation dtype
constexpr int kTargetBlocks = 1024;     // several for each multiprocessor of the largest GPUs
constexpr int kCombineThreads = 128;

Tiling reduction_tiling(int64_t rows, int64_t channels) {
  Tiling t = tiling_of(rows, channels);
  int64_t per_thread = ceil_div(rows * t.columns, int64_t{kTargetBlocks} * t.lines);
  per_thread = per_thread < kMinRowsPerThread ? kMinRowsPerThread : per_thread;
  per_thread = per_thread > kMaxRowsPerThread ? kMaxRowsPerThread : per_thread;
  cut_rows(t, per_thread * t.lines);
  return t;
}

Tiling reduction_tiling(const Launch& where, bool whole) {
  Tiling t = reduction_tiling(where.rows, where.channels);
  t.whole = whole;
  return t;
}

// --- Sums over the block's lines ---

// Of `Sums` values a thread and channel: [sum][line][channel of the block], in shared memory.
template <class A, int Sums>
size_t shared_bytes(const Tiling& t) {
  return sizeof(A) * Sums * t.threads() * kGroup;
}

template <class A>
__device__ void share(const Tiling& t, const Place& at, int sum, const A (&values)[kGroup]) {
  A* shared = reinterpret_cast<A*>(shared_memory);
  const int width = t.lanes * kGroup;
#pragma unroll
  for (int k = 0; k < kGroup; ++k)
    shared[(sum * t.lines + at.line) * width + at.lane * kGroup + k] = values[k];
}

// The shared value of a line for channel threadIdx.x of the block.
template <class A>
__device__ A shared_value(const Tiling& t, int sum, int line) {
  const A* shared = reinterpret_cast<const A*>(shared_memory);
  return shared[(sum * t.lines + line) * t.lanes * kGroup + threadIdx.x];
}

// The matrix's channel that thread threadIdx.x finishes; beyond the last: -1.
__device__ inline int64_t finished_channel(const Tiling& t) {
  const int width = t.lanes * kGroup;  // at most the number of threads
  const int64_t channel = static_cast<int64_t>(blockIdx.x % t.columns) * width + threadIdx.x;
  return threadIdx.x < width && channel < t.channels ? channel : -1;
}

template <class A, int Sums>
__device__ void finish_sums(const Tiling& t, const Place& at, double* partial) {
  __syncthreads();
  const int64_t channel = finished_channel(t);
  if (channel < 0) return;
#pragma unroll
  for (int sum = 0; sum < Sums; ++sum) {
    double total = 0;
    for (int line = 0; line < t.lines; ++line) total += shared_value<A>(t, sum, line);
    partial[(sum * t.channels + channel) * t.parts + at.part] = total;
  }
}

// --- Sums over the parts ---

// The sum of the block's values, in every thread; kCombineThreads threads.
__device__ double block_sum(double value) {
  __syncthreads();
  shared_memory[threadIdx.x] = value;
  for (int half = kCombineThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared_memory[threadIdx.x] += shared_memory[threadIdx.x + half];
  }
  __syncthreads();
  return shared_memory[0];
}

// first[c] and second[c]: the sums over parts of partial[0][c] and partial[1][c]. A block owns one
// of them. Bytes: 8 parts a block.
template <class A>
__global__ void __launch_bounds__(kCombineThreads)
    combine_sums_kernel(const double* partial, int64_t channels, int64_t parts, A* first,
                        A* second) {
  const double* mine = partial + blockIdx.x * parts;
  double total = 0;
  for (int64_t part = threadIdx.x; part < parts; part += kCombineThreads) total += mine[part];
  total = block_sum(total);
  if (threadIdx.x != 0) return;
  const bool is_first = blockIdx.x < channels;
  (is_first ? first : second)[is_first ? blockIdx.x : blockIdx.x - channels] =
      static_cast<A>(total);
}

// Mean and M2 of a channel from those of its parts: Chan's formula for many parts,
//   mean = sum(n_i mean_i) / n,  M2 = sum(M2_i + n_i (mean_i - mean)^2).
// The means are taken relative to the first part's, so that a large one costs nothing. A block owns
// a channel. Bytes: 16 parts a channel.
template <class A>
__global__ void __launch_bounds__(kCombineThreads)
    combine_moments_kernel(Tiling t, const double* partial, A* mean, A* m2) {
  const double* means = partial + blockIdx.x * t.parts;
  const double* squares = means + t.channels * t.parts;
  const double first = is_finite(means[0]) ? means[0] : 0;
  const auto rows_of = [&](int64_t part) {
    const int64_t left = t.rows - part * t.rows_per_block;
    return static_cast<double>(left < t.rows_per_block ? left : t.rows_per_block);
  };
  double total = 0;
  for (int64_t part = threadIdx.x; part < t.parts; part += kCombineThreads)
    total += rows_of(part) * (means[part] - first);
  const double shift = block_sum(total) / static_cast<double>(t.rows);
  total = 0;
  for (int64_t part = threadIdx.x; part < t.parts; part += kCombineThreads) {
    const double deviation = means[part] - first - shift;
    total += squares[part] + rows_of(part) * (deviation * deviation);
  }
  total = block_sum(total);
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = static_cast<A>(first + shift);
    m2[blockIdx.x] = static_cast<A>(total);
  }
}

// --- channel_moments ---

// Mean and M2 of what a thread has seen of its channels.
template <class A>
struct RunningMoments {
  A mean[kGroup], m2[kGroup];
  int64_t rows;

  // Chan's formula for the moments of `count` more rows. Where the difference of the means is
  // infinite, their weighted sum still gives the mean that eager has.
  __device__ void merge(const A (&more_mean)[kGroup], const A (&more_m2)[kGroup], int count) {
    const A weight = static_cast<A>(count) / static_cast<A>(rows + count);
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const A delta = more_mean[k] - mean[k];
      m2[k] += more_m2[k] + delta * (delta * (static_cast<A>(rows) * weight));
      mean[k] = is_finite(delta) ? mean[k] + delta * weight
                                 : mean[k] * (1 - weight) + more_mean[k] * weight;
    }
    rows += count;
  }
};

// The two-pass moments of the first `count` of R rows of a thread, less shift, from registers.
template <int R, class T>
__device__ void add_rows(RunningMoments<Acc<T>>& running, const Group<T> (&rows)[R], int count,
                         const Coefficients<Acc<T>>& shift) {
  using A = Acc<T>;
  A mean[kGroup] = {}, m2[kGroup] = {};
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (r < count) mean[k] += widen(rows[r].v[k]) - shift.v[k];
    mean[k] /= static_cast<A>(count);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const A d = widen(rows[r].v[k]) - shift.v[k] - mean[k];
      if (r < count) m2[k] += d * d;
    }
  }
  running.merge(mean, m2, count);
}

// The value of the part's first row: near the mean where that is large. 0 where it is not finite.
template <class T>
__device__ Acc<T> moments_shift(const T* y, const Tiling& t, const Place& at, int64_t channel) {
  const Acc<T> value = widen(y[at.first_row * t.channels + channel]);
  return is_finite(value) ? value : Acc<T>(0);
}

// mean and m2 of the block's part of every channel. Bytes: y. About 10 operations an element.
template <class T>
__global__ void __launch_bounds__(kThreads)
    channel_moments_kernel(Tiling t, const T* y, double* partial) {
  using A = Acc<T>;
  constexpr int kRows = kRowsInFlight<T, 8>;
  const Place at(t);
  RunningMoments<A> running = {};
  if (at.count > 0) {
    Coefficients<A> shift(nullptr, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < kGroup; ++k)
      if (k < at.count) shift.v[k] = moments_shift(y, t, at, at.channel + k);
    for (int64_t row = at.first_row + at.line; row < at.end_row; row += kRows * t.lines) {
      Group<T> rows[kRows];
      int count = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool inside = row + r * t.lines < at.end_row;
        const int64_t from = inside ? row + r * t.lines : row;
        rows[r] = load_group(y + from * t.channels + at.channel, at.count, t.whole);
        count += inside;
      }
      add_rows(running, rows, count, shift);
    }
  }
  share(t, at, 0, running.mean);
  share(t, at, 1, running.m2);
  __syncthreads();
  const int64_t channel = finished_channel(t);
  if (channel < 0) return;
  const int64_t rows = at.end_row - at.first_row;
  const auto rows_of = [&](int line) {
    return static_cast<double>((rows - line + t.lines - 1) / t.lines);
  };
  const int lines = rows < t.lines ? static_cast<int>(rows) : t.lines;
  double mean = 0, m2 = 0;
  for (int line = 0; line < lines; ++line) mean += rows_of(line) * shared_value<A>(t, 0, line);
  mean /= static_cast<double>(rows);
  for (int line = 0; line < lines; ++line) {
    const double deviation = shared_value<A>(t, 0, line) - mean;
    m2 += shared_value<A>(t, 1, line) + rows_of(line) * (deviation * deviation);
  }
  const double shift = moments_shift(y, t, at, channel);
  partial[channel * t.parts + at.part] = shift + mean;
  partial[(t.channels + channel) * t.parts + at.part] = m2;
}

// --- mask_grad, bn_backward_reduce ---

template <class T>
struct Masked {
  Group<T> grad;
  unsigned bits;
};

// g = mask bit ? grad_out : 0 and its sums. Bytes: grad_out + mask + g. 1 operation an element.
template <class T>
__global__ void __launch_bounds__(kThreads) mask_grad_kernel(Tiling t, MaskGrad p) {
  using A = Acc<T>;
  const Place at(t);
  A sum[kGroup] = {};
  if (at.count > 0) {
    const T* grad_out = static_cast<const T*>(p.grad_out) + at.channel;
    const uint8_t* mask = p.mask + at.channel / kGroup;
    T* g = static_cast<T*>(p.g) + at.channel;
    for_rows<kRowsInFlight<T, 4>>(
        t, at,
        [&](int64_t row) {
          return Masked<T>{load_group(grad_out + row * t.channels, at.count, t.whole),
                           mask[row * t.mask_stride]};
        },
        [&](int64_t row, Masked<T>& masked) {
#pragma unroll
          for (int k = 0; k < kGroup; ++k) {
            if (!(masked.bits >> k & 1)) masked.grad.v[k] = narrow<T>(A(0));
            sum[k] += widen(masked.grad.v[k]);
          }
          store_group(g + row * t.channels, masked.grad, at.count, t.whole);
        });
  }
  share(t, at, 0, sum);
  finish_sums<A, 1>(t, at, p.partial);
}

template <class T>
struct Gradient {
  Group<T> grad, addend, y;
};

// v = grad + addend + shift, gated by live((y - mean) * scale + beta); g = v rounded; the sums of g
// and of g * (y - mean) * invstd. Bytes: grad + addend + y + g. About 10 operations an element.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bn_backward_reduce_kernel(Tiling t, BnBackwardReduce p) {
  using A = Acc<T>;
  const Place at(t);
  A sum_g[kGroup] = {}, sum_g_xhat[kGroup] = {};
  if (at.count > 0) {
    const Coefficients<A> shift(p.shift, at.channel, at.count, 0);
    const Coefficients<A> mean(p.mean, at.channel, at.count, 0);
    const Coefficients<A> invstd(p.invstd, at.channel, at.count, 0);
    const Coefficients<A> scale(p.scale, at.channel, at.count, 1);
    const Coefficients<A> beta(p.beta, at.channel, at.count, 0);
    const bool has_addend = p.addend != nullptr;
    const T* grad = static_cast<const T*>(p.grad) + at.channel;
    const T* addend = static_cast<const T*>(p.addend) + at.channel;
    const T* y = static_cast<const T*>(p.y) + at.channel;
    T* g = static_cast<T*>(p.g) + at.channel;
    for_rows<kRowsInFlight<T, 4>>(
        t, at,
        [&](int64_t row) {
          Gradient<T> loaded;
          loaded.grad = load_group(grad + row * t.channels, at.count, t.whole);
          loaded.y = load_group(y + row * t.channels, at.count, t.whole);
          if (has_addend) loaded.addend = load_group(addend + row * t.channels, at.count, t.whole);
          return loaded;
        },
        [&](int64_t row, Gradient<T>& loaded) {
#pragma unroll
          for (int k = 0; k < kGroup; ++k) {
            const A value = widen(loaded.y.v[k]);
            A v = widen(loaded.grad.v[k]);
            if (has_addend) v = v + widen(loaded.addend.v[k]);
            v = v + shift.v[k];
            if (!is_live(affine(value, mean.v[k], scale.v[k], beta.v[k]))) v = 0;
            loaded.grad.v[k] = narrow<T>(v);
            v = widen(loaded.grad.v[k]);
            sum_g[k] += v;
            sum_g_xhat[k] += v * ((value - mean.v[k]) * invstd.v[k]);
          }
          store_group(g + row * t.channels, loaded.grad, at.count, t.whole);
        });
  }
  share(t, at, 0, sum_g);
  share(t, at, 1, sum_g_xhat);
  finish_sums<A, 2>(t, at, p.partial);
}

// second is null where there is one sum only.
template <class A>
void combine_sums(const Launch& where, const Tiling& t, const double* partial, void* first,
                  void* second) {
  const int sums = second == nullptr ? 1 : 2;
  launch(combine_sums_kernel<A>, where, sums * t.channels, kCombineThreads,
         kCombineThreads * sizeof(double), partial, t.channels, t.parts, static_cast<A*>(first),
         static_cast<A*>(second));
}

}  // namespace

int64_t reduction_parts(int64_t rows, int64_t channels) {
  return reduction_tiling(rows, channels).parts;
}

void launch_channel_moments(const Launch& where, const ChannelMoments& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const Tiling t = reduction_tiling(where, are_whole(where.channels, p.y));
    launch(channel_moments_kernel<T>, where, t.blocks(), t.threads(), shared_bytes<A, 2>(t), t,
           static_cast<const T*>(p.y), p.partial);
    launch(combine_moments_kernel<A>, where, t.channels, kCombineThreads,
           kCombineThreads * sizeof(double), t, static_cast<const double*>(p.partial),
           static_cast<A*>(p.mean), static_cast<A*>(p.m2));
  });
}

void launch_mask_grad(const Launch& where, const MaskGrad& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    const Tiling t = reduction_tiling(where, are_whole(where.channels, p.grad_out, p.g));
    launch(mask_grad_kernel<T>, where, t.blocks(), t.threads(), shared_bytes<Acc<T>, 1>(t), t, p);
    combine_sums<Acc<T>>(where, t, p.partial, p.sum_g, nullptr);
  });
}

void launch_bn_backward_reduce(const Launch& where, const BnBackwardReduce& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    const bool whole = are_whole(where.channels, p.grad, p.addend, p.y, p.g);
    const Tiling t = reduction_tiling(where, whole);
    launch(bn_backward_reduce_kernel<T>, where, t.blocks(), t.threads(), shared_bytes<Acc<T>, 2>(t),
           t, p);
    combine_sums<Acc<T>>(where, t, p.partial, p.sum_g, p.sum_g_xhat);
  });
}

}  // namespace fused_bottleneck::cuda
