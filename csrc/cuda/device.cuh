// What the kernels share: element types, groups of channels, the walk over rows, launches.
//
// A thread owns a group of 8 channels, one byte of a mask: it loads the group's coefficients once
// and walks over rows. Groups of a row are next to each other in a block, so that a warp's accesses
// are contiguous; they take 16 bytes each where the rows are aligned, single elements elsewhere.
//
// Nothing is contracted to fma (-fmad=false): the forward's relu and the backward's gate must see
// the same bits, and every pass has the bits of torch's own operations.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

// Dynamic shared memory; never more than the 48 KiB that every GPU grants unasked. Aligned as
// tensor cores' loads ask for.
alignas(32) extern __shared__ double shared_memory[];

namespace fused_bottleneck::cuda {

constexpr int kThreads = 256;
constexpr int kGroup = 8;      // channels of a thread
constexpr int kMaxLanes = 32;  // groups side by side in a block
constexpr int kMinLines = kThreads / kMaxLanes;

template <class A, class B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// --- Elements ---

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }

template <class T>
__device__ inline T narrow(Acc<T> v) {
  return v;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half narrow<__half>(float v) {
  return __float2half_rn(v);
}

// A live element is !(v <= 0): NaN is live, and relu(NaN) is NaN.
template <class A>
__device__ inline bool is_live(A v) {
  return !(v <= A(0));
}

template <class A>
__device__ inline A relu(A v) {
  return is_live(v) ? v : A(0);
}

// (y - mean) * scale + beta. The one place that says so.
template <class A>
__device__ inline A affine(A y, A mean, A scale, A beta) {
  return (y - mean) * scale + beta;
}

template <class A>
__device__ inline bool is_finite(A v) {
  return v - v == A(0);
}

// --- Groups of channels ---

template <class T>
struct alignas(16) Group {
  T v[kGroup];
};

// The first `count` channels of a group; all of them, in accesses of 16 bytes, where `whole`.
template <class T>
__device__ inline Group<T> load_group(const T* p, int count, bool whole) {
  if (whole) return *reinterpret_cast<const Group<T>*>(p);
  Group<T> group;
#pragma unroll
  for (int k = 0; k < kGroup; ++k) group.v[k] = k < count ? p[k] : narrow<T>(Acc<T>(0));
  return group;
}

template <class T>
__device__ inline void store_group(T* p, const Group<T>& group, int count, bool whole) {
  if (whole) {
    *reinterpret_cast<Group<T>*>(p) = group;
    return;
  }
#pragma unroll
  for (int k = 0; k < kGroup; ++k)
    if (k < count) p[k] = group.v[k];
}

// Coefficients of a group; `absent` stands for those of a null vector.
template <class A>
struct Coefficients {
  A v[kGroup];

  __device__ Coefficients(const void* vector, int64_t channel, int count, A absent) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k)
      v[k] = vector != nullptr && k < count ? static_cast<const A*>(vector)[channel + k] : absent;
  }
};

// --- The walk over rows ---

// How a matrix is cut into blocks; made on the host, by the shape alone.
struct Tiling {
  int64_t rows, channels, mask_stride;
  int64_t rows_per_block, parts;
  int lanes, lines, columns;  // groups and rows side by side in a block, blocks side by side
  bool whole;                 // groups are whole and aligned

  int64_t blocks() const { return parts * columns; }
  int threads() const { return lanes * lines; }
};

inline Tiling tiling_of(int64_t rows, int64_t channels) {
  Tiling t;
  const int64_t groups = ceil_div(channels, kGroup);
  t.rows = rows;
  t.channels = channels;
  t.mask_stride = groups;
  t.columns = static_cast<int>(ceil_div(groups, kMaxLanes));
  t.lanes = static_cast<int>(ceil_div(groups, t.columns));
  t.lines = kThreads / t.lanes;
  t.whole = false;
  return t;
}

inline void cut_rows(Tiling& t, int64_t rows_per_block) {
  t.rows_per_block = rows_per_block;
  t.parts = ceil_div(t.rows, rows_per_block);
}

// Whether groups of all these matrices can be accessed whole; a null one can.
template <class... Matrices>
bool are_whole(int64_t channels, const Matrices*... matrices) {
  const auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return channels % kGroup == 0 && (is_aligned(matrices) && ...);
}

// A thread's place in the matrix.
struct Place {
  int lane, line, count;  // count: channels of its group, 0 or less beyond the last
  int64_t channel, part, first_row, end_row;

  __device__ explicit Place(const Tiling& t) {
    lane = threadIdx.x % t.lanes;
    line = threadIdx.x / t.lanes;
    channel = (static_cast<int64_t>(blockIdx.x % t.columns) * t.lanes + lane) * kGroup;
    const int64_t left = t.channels - channel;
    count = static_cast<int>(left < kGroup ? left : kGroup);
    part = blockIdx.x / t.columns;
    first_row = part * t.rows_per_block;
    end_row = first_row + t.rows_per_block < t.rows ? first_row + t.rows_per_block : t.rows;
  }
};

// Rows whose loads a thread has under way at a time, of a pass with so many coefficients: as many
// as the registers hold.
template <class T, int Most>
constexpr int kRowsInFlight = sizeof(T) == 2   ? Most
                              : sizeof(T) == 4 ? Most / 2
                                               : Most / 4;

// For the thread's rows: use(row, loaded), where loaded = load(row). R rows are loaded before the
// first is used, so that as many accesses are under way at a time.
template <int R, class Load, class Use>
__device__ inline void for_rows(const Tiling& t, const Place& at, const Load& load,
                                const Use& use) {
  for (int64_t row = at.first_row + at.line; row < at.end_row; row += R * t.lines) {
    decltype(load(row)) loaded[R];
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (row + r * t.lines < at.end_row) loaded[r] = load(row + r * t.lines);
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (row + r * t.lines < at.end_row) use(row + r * t.lines, loaded[r]);
  }
}

// --- Launches ---

inline void require(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("a CUDA kernel could not be launched: ") +
                             cudaGetErrorString(error));
}

inline cudaLaunchConfig_t launch_config(const Launch& where, int64_t blocks, int threads,
                                        size_t shared_bytes) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(where.stream);
  return config;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& where, int64_t blocks, int threads,
            size_t shared_bytes, Arguments&&... arguments) {
  const cudaLaunchConfig_t config = launch_config(where, blocks, threads, shared_bytes);
  require(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// The same of a kernel with barriers of the whole grid: of so many blocks as the GPU holds at a
// time, and no more than `blocks`.
template <class... Parameters, class... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), const Launch& where, int64_t blocks,
                        int threads, size_t shared_bytes, Arguments&&... arguments) {
  int device = 0, multiprocessors = 0, resident = 0;
  require(cudaGetDevice(&device));
  require(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  require(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared_bytes));
  const int64_t most = int64_t{multiprocessors} * resident;
  cudaLaunchConfig_t config =
      launch_config(where, blocks < most ? blocks : most, threads, shared_bytes);
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  require(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

// body(T{}) for the element type of a dtype.
template <class Body>
void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float{});
    case Dtype::float64:
      return body(double{});
    case Dtype::bfloat16:
      return body(__nv_bfloat16{});
    case Dtype::float16:
      return body(__half{});
  }
}

}  // namespace fused_bottleneck::cuda
