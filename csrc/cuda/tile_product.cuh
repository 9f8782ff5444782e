// Products of coefficient matrices, a tile of kTile x kTile at a time, with float32's accuracy.
//
// In float32 on the tensor cores: an operand is split into two terms of tf32 (11 bits each), and
// the three products that matter are taken; two of them where the left operand has 16 bits and is
// one term. The tensor cores' own sums round towards zero, so that they only take a step of kDepth
// terms; steps are added to nearest. In double, and on GPUs before sm_80, with fused multiply-adds.
// An infinite operand gives NaN where the exact product may be infinite.
#pragma once

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FUSED_BOTTLENECK_TENSOR_CORES
#include <mma.h>
#endif

#include <type_traits>

#include "device.cuh"

namespace fused_bottleneck::cuda {

constexpr int kTile = 64;
constexpr int kDepth = 32;  // terms of a step
constexpr int kTileThreads = 128;
constexpr int kTileWarps = kTileThreads / 32;
constexpr int kShare = kTile * kDepth / kTileThreads;  // elements of an operand's step a thread
constexpr int kResultStride = kTile + 8;

// How a step of an operand lies in shared memory: i along the tile, k along the sum. Padded so that
// the threads of a warp, which read 8 x 4 elements at a time, touch 32 banks.
struct AlongDepth {
  static constexpr int kStride = kDepth + 4;
  __device__ static int index(int i, int k) { return i * kStride + k; }
  __device__ static int i(int r) { return threadIdx.x / kDepth + r * (kTileThreads / kDepth); }
  __device__ static int k(int) { return threadIdx.x % kDepth; }
};
struct AlongTile {
  static constexpr int kStride = kTile + 8;
  __device__ static int index(int i, int k) { return k * kStride + i; }
  __device__ static int i(int) { return threadIdx.x % kTile; }
  __device__ static int k(int r) { return threadIdx.x / kTile + r * (kTileThreads / kTile); }
};
constexpr int kOperandElements = kTile * AlongDepth::kStride;
static_assert(kOperandElements == kDepth * AlongTile::kStride);
static_assert(2 * kOperandElements == kTile * kResultStride,
              "the result takes the operands' place");

template <class A>
constexpr size_t kTileBytes = sizeof(A) * kTile * kResultStride;

// In shared memory; the result takes the left one's place and more.
template <class A>
__device__ A* left_operand() {
  return reinterpret_cast<A*>(shared_memory);
}
template <class A>
__device__ A* right_operand() {
  return left_operand<A>() + kOperandElements;
}

// The sums of a tile, in the registers of the block's threads.
template <class A, class LeftLayout>
class FmaSums {
 public:
  __device__ void add_step() {
    const A *left = left_operand<A>(), *right = right_operand<A>();
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      A l[kRows], r[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) l[i] = left[LeftLayout::index(row(i), k)];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) r[j] = right[AlongTile::index(column(j), k)];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums_[i][j] = fma(l[i], r[j], sums_[i][j]);
    }
  }

  __device__ void store() const {
    A* result = left_operand<A>();
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) result[row(i) * kResultStride + column(j)] = sums_[i][j];
  }

 private:
  static constexpr int kAcross = 16;  // threads along a row of the tile
  static constexpr int kRows = kTile * kAcross / kTileThreads, kColumns = kTile / kAcross;

  __device__ static int row(int i) { return threadIdx.x / kAcross * kRows + i; }
  __device__ static int column(int j) { return threadIdx.x % kAcross + j * kAcross; }

  A sums_[kRows][kColumns] = {};
};

#ifdef FUSED_BOTTLENECK_TENSOR_CORES
namespace wmma = nvcuda::wmma;

// The first 11 bits: a number of tf32. What is left of the value is exact in float32.
__device__ inline float leading_bits(float value) {
  return __uint_as_float(__float_as_uint(value) & 0xffffe000u);
}

// An operand's fragment as the sum of two of tf32; of one, where its elements have 16 bits.
template <class Fragment, bool Exact>
struct Split {
  Fragment high, low;

  __device__ Split(const float* from, int stride) {
    wmma::load_matrix_sync(high, from, stride);
#pragma unroll
    for (int e = 0; e < high.num_elements && !Exact; ++e) {
      const float value = high.x[e];
      high.x[e] = leading_bits(value);
      low.x[e] = wmma::__float_to_tf32(value - high.x[e]);
    }
  }
};

// A warp owns a quarter of the tile.
template <class LeftLayout, bool ExactLeft>
class TensorSums {
 public:
  __device__ TensorSums() {
#pragma unroll
    for (int i = 0; i < kCount * kCount; ++i)
      wmma::fill_fragment(sums_[i / kCount][i % kCount], 0.0f);
  }

  __device__ void add_step() {
    Sum step[kCount][kCount];
#pragma unroll
    for (int i = 0; i < kCount * kCount; ++i)
      wmma::fill_fragment(step[i / kCount][i % kCount], 0.0f);
#pragma unroll 2
    for (int k = 0; k < kDepth; k += 8) add_products(k, step);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int j = 0; j < kCount; ++j)
#pragma unroll
        for (int e = 0; e < step[i][j].num_elements; ++e) sums_[i][j].x[e] += step[i][j].x[e];
  }

  __device__ void store() const {
    float* result = left_operand<float>();
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        wmma::store_matrix_sync(result + row(i) * kResultStride + column(j), sums_[i][j],
                                kResultStride, wmma::mem_row_major);
  }

 private:
  static constexpr int kSide = 16, kCount = 2;  // fragments of kSide x kSide, kCount x kCount
  using Tf32 = wmma::precision::tf32;
  using Order =
      std::conditional_t<std::is_same_v<LeftLayout, AlongDepth>, wmma::row_major, wmma::col_major>;
  using Left = wmma::fragment<wmma::matrix_a, kSide, kSide, 8, Tf32, Order>;
  using Right = wmma::fragment<wmma::matrix_b, kSide, kSide, 8, Tf32, wmma::row_major>;
  using Sum = wmma::fragment<wmma::accumulator, kSide, kSide, 8, float>;

  __device__ static int row(int i) { return (threadIdx.x / 64 * kCount + i) * kSide; }
  __device__ static int column(int j) { return (threadIdx.x / 32 % 2 * kCount + j) * kSide; }

  // Small products first.
  __device__ static void add_products(int k, Sum (&step)[kCount][kCount]) {
    const float *left = left_operand<float>(), *right = right_operand<float>();
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const Split<Right, false> r(right + AlongTile::index(column(j), k), AlongTile::kStride);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const Split<Left, ExactLeft> l(left + LeftLayout::index(row(i), k), LeftLayout::kStride);
        wmma::mma_sync(step[i][j], l.high, r.low, step[i][j]);
        if (!ExactLeft) wmma::mma_sync(step[i][j], l.low, r.high, step[i][j]);
        wmma::mma_sync(step[i][j], l.high, r.high, step[i][j]);
      }
    }
  }

  Sum sums_[kCount][kCount];
};

template <class A, class LeftLayout, bool ExactLeft>
using TileSums = std::conditional_t<std::is_same_v<A, float>, TensorSums<LeftLayout, ExactLeft>,
                                    FmaSums<A, LeftLayout>>;
#else
template <class A, class LeftLayout, bool ExactLeft>
using TileSums = FmaSums<A, LeftLayout>;
#endif

// A thread's elements of a step of both operands, on their way to shared memory.
template <class A, class LeftLayout>
class Step {
 public:
  template <class Left, class Right>
  __device__ void load(int first, int end, const Left& left, const Right& right) {
#pragma unroll
    for (int r = 0; r < kShare; ++r) {
      const int k = first + LeftLayout::k(r);
      left_[r] = k < end ? left(LeftLayout::i(r), k) : A(0);
    }
#pragma unroll
    for (int r = 0; r < kShare; ++r) {
      const int k = first + AlongTile::k(r);
      right_[r] = k < end ? right(AlongTile::i(r), k) : A(0);
    }
  }

  __device__ void store() const {
    A *left = left_operand<A>(), *right = right_operand<A>();
#pragma unroll
    for (int r = 0; r < kShare; ++r) {
      left[LeftLayout::index(LeftLayout::i(r), LeftLayout::k(r))] = left_[r];
      right[AlongTile::index(AlongTile::i(r), AlongTile::k(r))] = right_[r];
    }
  }

 private:
  A left_[kShare], right_[kShare];
};

// sum over k of [first, end) of left(i, k) right(j, k), for i and j below kTile: the tile, in
// shared memory, row i beginning at i * kResultStride. The functions know where their matrices end
// along the tile. The loads of a step are under way while the one before is multiplied.
template <class A, class LeftLayout, bool ExactLeft, class Left, class Right>
__device__ const A* tile_product(int first, int end, const Left& left, const Right& right) {
  TileSums<A, LeftLayout, ExactLeft> sums;
  Step<A, LeftLayout> step;
  step.load(first, end, left, right);
#pragma unroll 1
  for (int k = first; k < end; k += kDepth) {
    __syncthreads();  // what was there has been read
    step.store();
    __syncthreads();
    if (k + kDepth < end) step.load(k + kDepth, end, left, right);
    sums.add_step();
  }
  __syncthreads();
  sums.store();
  __syncthreads();
  return left_operand<A>();
}

}  // namespace fused_bottleneck::cuda
