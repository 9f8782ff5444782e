// The junctions of the tail: statistics -> folded weight, S -> gradients and the operand's
// coefficients (algebra.py), each with its product of coefficient matrices in one launch.
//
// The phases of a junction are separated by barriers of the whole grid (a cooperative launch: its
// blocks are resident together, and the barrier is the driver's, so that several streams and graphs
// do not meet in it). A phase's work is cut by the shape alone, and blocks take it in turns: same
// bits on every GPU. No atomics.
//
// Bytes: each matrix once from memory, tiles again from L2. Operations: 2 W K^2 of a fold, half of
// them for the symmetric B, on tensor cores three times (twice for 16-bit weights). docs/algebra.md
// predicts their time.
#include <cooperative_groups.h>

#include "coefficients.cuh"
#include "tile_product.cuh"

namespace fused_bottleneck::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kTargetTasks = 264;  // two for each multiprocessor of the largest GPUs
constexpr int kLeastBlocks = 2;    // on a multiprocessor: their threads hide each other's waits

__device__ inline int lane() { return threadIdx.x % kWarp; }
__device__ inline int warp() { return threadIdx.x / kWarp; }

__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

// body(i) for the block's share of [0, count).
template <class Body>
__device__ void for_blocks(int count, const Body& body) {
  for (int i = blockIdx.x; i < count; i += gridDim.x) body(i);
}

// body(i) for the warp's share of [0, count).
template <class Body>
__device__ void for_warps(int count, const Body& body) {
  for (int i = blockIdx.x * kTileWarps + warp(); i < count; i += gridDim.x * kTileWarps) body(i);
}

// The sum of term(i) over [0, count), in every thread of the warp.
template <class A, class Term>
__device__ A warp_sum(int count, const Term& term) {
  A total = 0;
#pragma unroll 4
  for (int i = lane(); i < count; i += kWarp) total += term(i);
  for (int other = kWarp / 2; other > 0; other /= 2)
    total += __shfl_xor_sync(0xffffffffu, total, other);
  return total;
}

__host__ __device__ inline int tiles_along(int size) { return ceil_div(size, kTile); }

// 16-bit weights are exact in tf32.
template <class T>
constexpr bool kIsExact = sizeof(T) == 2;

// --- F3 to F4 ---

// A product with a float64 covariance is in float64, but for 16-bit weights.
template <class T, class C>
using FoldProduct = std::conditional_t<kIsExact<T>, float, C>;

// A tile of weight cov, and of each of its rows the sum over the tile's columns of the variance.
template <class T, class C>
__device__ void fold_tile(int tile, int width, int channels, const Fold& p) {
  using A = FoldProduct<T, C>;
  const T* weight = static_cast<const T*>(p.weight);
  const C* cov = static_cast<const C*>(p.cov);
  Acc<T>* weight_cov = static_cast<Acc<T>*>(p.weight_cov);
  const int part = tile % tiles_along(channels), column = part * kTile;
  const int row = tile / tiles_along(channels) * kTile;
  const A* product = tile_product<A, RowsAlongTile, kIsExact<T>>(
      Operand<T>(weight, width, channels), row, Operand<C>(cov, channels, channels), column, 0,
      channels);
  const int columns = channels - column < kTile ? channels - column : kTile;
  for (int i = warp(); i < kTile && row + i < width; i += kTileWarps) {
    const int at = (row + i) * channels + column;
    const A var = warp_sum<A>(columns, [&](int j) -> A {
      const A value = product[i * kResultStride + j];
      weight_cov[at + j] = static_cast<Acc<T>>(value);
      return value * static_cast<A>(widen(weight[at + j]));
    });
    if (lane() == 0) p.partial[part * width + row + i] = var;
  }
}

// Everything else of an output channel w.
template <class T>
__device__ void fold_row(int w, int width, int channels, const Fold& p) {
  using A = Acc<T>;
  const T* weight = static_cast<const T*>(p.weight) + w * channels;
  const A* centre = static_cast<const A*>(p.centre);
  const A* mean_d = static_cast<const A*>(p.mean_d);
  T* folded = static_cast<T*>(p.folded) + w * channels;
  double sum = warp_sum<double>(tiles_along(channels),
                                [&](int part) { return p.partial[part * width + w]; });
  if (sum < 0) sum = 0;  // NaN stays
  const A var = static_cast<A>(sum);
  const A mean =
      warp_sum<A>(channels, [&](int k) { return widen(weight[k]) * (mean_d[k] + centre[k]); });
  const A offset = -warp_sum<A>(channels, [&](int k) { return widen(weight[k]) * mean_d[k]; });
  const A invstd = inverse_std(var, p.eps);
  const A scale = parameter<A>(p.gamma, w, 1) * invstd;
  const A taken = warp_sum<A>(channels, [&](int k) {
    folded[k] = narrow<T>(scale * widen(weight[k]));
    return widen(folded[k]) * mean_d[k];
  });
  if (lane() != 0) return;
  A* reported = static_cast<A*>(p.reported) + w;
  reported[0] = mean + parameter<A>(p.bias, w, 0);
  reported[width] = var;
  A* vectors = static_cast<A*>(p.vectors) + w;
  vectors[0] = invstd;
  vectors[width] = offset;
  vectors[2 * width] = parameter<A>(p.beta, w, 0) - taken;
}

template <class T, class C>
__global__ void __launch_bounds__(kTileThreads, kLeastBlocks)
    fold_kernel(int width, int channels, Fold p) {
  const int tiles = tiles_along(channels) * tiles_along(width);
  for_blocks(tiles, [&](int tile) { fold_tile<T, C>(tile, width, channels, p); });
  grid_barrier();
  for_warps(width, [&](int w) { fold_row<T>(w, width, channels, p); });
}

// --- B1 to B2 ---

// How the product over W is cut: a task is a tile of B on or above the diagonal, over some rows.
struct OperandTasks {
  int tiles, rows, parts;

  __host__ __device__ OperandTasks(int width, int channels) {
    const int side = tiles_along(channels);
    tiles = side * (side + 1) / 2;
    const int wanted = tiles < kTargetTasks ? kTargetTasks / tiles : 1;
    rows = ceil_div(ceil_div(width, wanted), 2 * kDepth) * 2 * kDepth;
    parts = ceil_div(width, rows);
  }
  __host__ __device__ int count() const { return tiles * parts; }
};

// The workspace in memory: k of b [W]; sums over kTile rows each of sum_g a [.., K]; b's parts.
template <class A>
struct Workspace {
  A *factor, *sums, *partial;

  __device__ Workspace(const FoldBackward& p, int width, int channels)
      : factor(static_cast<A*>(p.workspace)),
        sums(factor + width),
        partial(sums + tiles_along(width) * channels) {}
};

// The gradients of a row of the weight, of its gamma and bias, and k of b.
template <class T>
__device__ void fold_backward_row(int w, int width, int channels, const FoldBackward& p) {
  using A = Acc<T>;
  const T* weight = static_cast<const T*>(p.weight) + w * channels;
  const A* s = static_cast<const A*>(p.s) + w * channels;
  T* grad_weight = static_cast<T*>(p.grad_weight) + w * channels;
  const A sum_g = static_cast<const A*>(p.sum_g)[w];
  const A invstd = static_cast<const A*>(p.invstd)[w];
  const A dot = warp_sum<A>(channels, [&](int k) { return s[k] * widen(weight[k]); });
  const A dgamma = invstd * (dot + static_cast<const A*>(p.offset)[w] * sum_g);
  const A scale = parameter<A>(p.gamma, w, 1) * invstd;
  const bool batch = p.weight_cov != nullptr;
  if (lane() == 0) {
    A* grads = static_cast<A*>(p.grads) + w;
    grads[0] = dgamma;
    grads[width] = batch ? A(0) : scale * sum_g;
    if (batch)
      Workspace<A>(p, width, channels).factor[w] =
          scale * invstd * dgamma / static_cast<A>(p.count);
  }
  const A* centre = static_cast<const A*>(p.centre);
  const A* mean_d = static_cast<const A*>(p.mean_d);
  const A* weight_cov = static_cast<const A*>(p.weight_cov) + w * channels;
  for (int k = lane(); k < channels; k += kWarp) {
    const A grad = batch ? s[k] - sum_g * mean_d[k] - dgamma * invstd * weight_cov[k]
                         : s[k] + sum_g * centre[k];
    grad_weight[k] = narrow<T>(scale * grad);
  }
}

// A part of -b = weight^T diag(k) weight: a tile, and its mirror image.
template <class T>
__device__ void operand_tile(int task, int width, int channels, const FoldBackward& p) {
  using A = Acc<T>;
  const OperandTasks tasks(width, channels);
  const T* weight = static_cast<const T*>(p.weight);
  const Workspace<A> workspace(p, width, channels);
  const int part = task / tasks.tiles, first = part * tasks.rows;
  const int end = first + tasks.rows < width ? first + tasks.rows : width;
  int across = 0, down = task % tasks.tiles;
  while (down > across) down -= ++across;
  const int row = down * kTile, column = across * kTile;
  const A* product = tile_product<A, RowsAlongDepth, kIsExact<T>>(
      Operand<T>(weight, end, channels), row,
      Operand<T, A>(weight, end, channels, workspace.factor), column, first, end);
  A* partial = workspace.partial + part * channels * channels;
  for (int at = threadIdx.x; at < kTile * kTile; at += kTileThreads) {
    const int i = at / kTile, j = at % kTile;
    if (down < across && row + i < channels && column + j < channels)
      partial[(row + i) * channels + column + j] = product[i * kResultStride + j];
    // Of a tile on the diagonal the half above it counts for both: b is symmetric to the last bit.
    const int low = i < j ? i : j, high = i < j ? j : i;
    const int from = down < across ? j * kResultStride + i : low * kResultStride + high;
    if (column + i < channels && row + j < channels)
      partial[(column + i) * channels + row + j] = product[from];
  }
}

// The columns' sums of sum_g a over a block of rows: a thread takes every kLines-th row of one.
template <class T>
__device__ void column_sums(int task, int width, int channels, const FoldBackward& p) {
  using A = Acc<T>;
  constexpr int kLines = kTileThreads / kTile;
  A* shared = reinterpret_cast<A*>(shared_memory);
  const T* a = static_cast<const T*>(p.a);
  const A* sum_g = static_cast<const A*>(p.sum_g);
  const int line = threadIdx.x / kTile;
  const int column = task % tiles_along(channels) * kTile + threadIdx.x % kTile;
  const int first = task / tiles_along(channels) * kTile;
  const int end = first + kTile < width ? first + kTile : width;
  A total = 0;
  if (column < channels)
#pragma unroll 8
    for (int w = first + line; w < end; w += kLines)
      total += sum_g[w] * widen(a[w * channels + column]);
  __syncthreads();  // what was there has been read
  shared[threadIdx.x] = total;
  __syncthreads();
  if (line != 0 || column >= channels) return;
  for (int other = 1; other < kLines; ++other) total += shared[other * kTile + threadIdx.x];
  Workspace<A>(p, width, channels).sums[first / kTile * channels + column] = total;
}

// Row i of b, which is its column i, and the shift of channel i.
template <class T>
__device__ void operand_row(int i, int width, int channels, const FoldBackward& p) {
  using A = Acc<T>;
  const int parts = OperandTasks(width, channels).parts;
  const Workspace<A> workspace(p, width, channels);
  const A* partial = workspace.partial + i * channels;
  const A* sums = workspace.sums + i;
  const A* mean_d = static_cast<const A*>(p.mean_d);
  T* b = static_cast<T*>(p.b) + i * channels;
  const A with_mean = warp_sum<A>(channels, [&](int j) {
    A total = 0;
#pragma unroll 4
    for (int part = 0; part < parts; ++part) total -= partial[part * channels * channels + j];
    b[j] = narrow<T>(total);
    return mean_d[j] * widen(b[j]);
  });
  const A with_sum =
      warp_sum<A>(tiles_along(width), [&](int part) { return sums[part * channels]; });
  if (lane() == 0) static_cast<A*>(p.shift)[i] = -(with_sum / static_cast<A>(p.count)) - with_mean;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, kLeastBlocks)
    fold_backward_kernel(int width, int channels, FoldBackward p) {
  for_warps(width, [&](int w) { fold_backward_row<T>(w, width, channels, p); });
  if (p.weight_cov == nullptr) return;
  for_blocks(tiles_along(width) * tiles_along(channels),
             [&](int task) { column_sums<T>(task, width, channels, p); });
  grid_barrier();
  for_blocks(OperandTasks(width, channels).count(),
             [&](int task) { operand_tile<T>(task, width, channels, p); });
  grid_barrier();
  for_warps(channels, [&](int i) { operand_row<T>(i, width, channels, p); });
}

// --- Launches ---

// The blocks of a launch that has a warp for each row and a block for each task.
int blocks_for(int rows, int tasks) {
  const int blocks = ceil_div(rows, kTileWarps);
  return blocks < tasks ? tasks : blocks;
}

template <class T, class C>
void launch_fold_of(const Launch& where, const Fold& p) {
  const int tiles = tiles_along(where.channels) * tiles_along(where.rows);
  launch_cooperative(fold_kernel<T, C>, where, blocks_for(where.rows, tiles), kTileThreads,
                     kTileBytes<FoldProduct<T, C>>, where.rows, where.channels, p);
}

}  // namespace

int64_t fold_partials(int64_t width, int64_t channels) { return tiles_along(channels) * width; }

void launch_fold(const Launch& where, const Fold& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.is_cov_double)
      launch_fold_of<T, double>(where, p);
    else
      launch_fold_of<T, Acc<T>>(where, p);
  });
}

int64_t fold_backward_workspace(int64_t width, int64_t channels) {
  const int64_t parts = OperandTasks(width, channels).parts;
  return width + (tiles_along(width) + parts * channels) * channels;
}

void launch_fold_backward(const Launch& where, const FoldBackward& p) {
  with_type(where.dtype, [&](auto element) {
    using T = decltype(element);
    const bool batch = p.weight_cov != nullptr;
    const int tasks = batch ? OperandTasks(where.rows, where.channels).count() : 1;
    launch_cooperative(fold_backward_kernel<T>, where, blocks_for(where.rows, tasks), kTileThreads,
                       kTileBytes<Acc<T>>, where.rows, where.channels, p);
  });
}

}  // namespace fused_bottleneck::cuda
