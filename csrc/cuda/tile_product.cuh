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
constexpr int kVector = 4;  // elements of a row that a thread moves at a time
constexpr int kVectors = kTile * kDepth / kTileThreads / kVector;  // of an operand's step a thread
constexpr int kResultStride = kTile + 8;

// How a step of an operand lies in shared memory: i along the tile, k along the sum; and which
// vectors of it a thread moves. As in the operand's matrix, rows are along the tile or along the
// sum. Padded so that the threads of a warp, which read 8 x 4 elements at a time, touch 32 banks.
struct RowsAlongTile {
  static constexpr int kStride = kDepth + 4;
  __device__ static int index(int i, int k) { return i * kStride + k; }
  __device__ static int i(int r) { return (threadIdx.x + r * kTileThreads) / (kDepth / kVector); }
  __device__ static int k(int) { return threadIdx.x % (kDepth / kVector) * kVector; }
  template <class Operand>
  __device__ static auto load(const Operand& operand, int i, int k) {
    return operand.load(i, k);
  }
};
struct RowsAlongDepth {
  static constexpr int kStride = kTile + 8;
  __device__ static int index(int i, int k) { return k * kStride + i; }
  __device__ static int i(int) { return threadIdx.x % (kTile / kVector) * kVector; }
  __device__ static int k(int r) { return (threadIdx.x + r * kTileThreads) / (kTile / kVector); }
  template <class Operand>
  __device__ static auto load(const Operand& operand, int i, int k) {
    return operand.load(k, i);
  }
};
constexpr int kOperandElements = kTile * RowsAlongTile::kStride;
static_assert(kOperandElements == kDepth * RowsAlongDepth::kStride);
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
      for (int j = 0; j < kColumns; ++j) r[j] = right[RowsAlongDepth::index(column(j), k)];
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
  using Order = std::conditional_t<std::is_same_v<LeftLayout, RowsAlongTile>, wmma::row_major,
                                   wmma::col_major>;
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
      const Split<Right, false> r(right + RowsAlongDepth::index(column(j), k),
                                  RowsAlongDepth::kStride);
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

template <class T>
struct alignas(sizeof(T) < 4 ? kVector * sizeof(T) : 16) Vector {
  T v[kVector];
};

// A matrix [rows, columns], its rows times their factors if there are any; zero outside.
template <class T, class Factor = T>
class Operand {
 public:
  // As it was loaded: whoever converts it waits for it.
  struct Part {
    Vector<T> values = {};
    Factor factor = narrow<Factor>(1);

    template <class A>
    __device__ Vector<A> product() const {
      Vector<A> out;
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        out.v[e] = static_cast<A>(widen(values.v[e])) * static_cast<A>(widen(factor));
      return out;
    }
  };

  __device__ Operand(const T* data, int rows, int columns, const Factor* factors = nullptr)
      : data_(data),
        factors_(factors),
        rows_(rows),
        columns_(columns),
        whole_(columns % kVector == 0 &&
               reinterpret_cast<uintptr_t>(data) % alignof(Vector<T>) == 0) {}

  __device__ Part load(int row, int column) const {
    Part part;
    if (row >= rows_ || column >= columns_) return part;
    const T* from = data_ + row * columns_ + column;
    if (whole_)
      part.values = *reinterpret_cast<const Vector<T>*>(from);
    else
      for (int e = 0; e < kVector && column + e < columns_; ++e) part.values.v[e] = from[e];
    if (factors_ != nullptr) part.factor = factors_[row];
    return part;
  }

 private:
  const T* data_;
  const Factor* factors_;
  int rows_, columns_;
  bool whole_;
};

// A thread's vectors of a step of an operand, on their way to shared memory.
template <class Layout, class Source>
class Step {
 public:
  __device__ explicit Step(const Source& source) : source_(source) {}

  __device__ void load(int i, int k) {
#pragma unroll
    for (int r = 0; r < kVectors; ++r)
      parts_[r] = Layout::load(source_, i + Layout::i(r), k + Layout::k(r));
  }

  template <class A>
  __device__ void store(A* shared) const {
#pragma unroll
    for (int r = 0; r < kVectors; ++r)
      *reinterpret_cast<Vector<A>*>(shared + Layout::index(Layout::i(r), Layout::k(r))) =
          parts_[r].template product<A>();
  }

 private:
  Source source_;
  typename Source::Part parts_[kVectors];
};

// The tile at (row, column) of the product of two matrices over the terms [first, end), in shared
// memory: row i begins at i * kResultStride. The right operand's rows are along the sum. The loads
// of a step are under way while the one before is multiplied.
template <class A, class LeftLayout, bool ExactLeft, class Left, class Right>
__device__ const A* tile_product(const Left& left, int row, const Right& right, int column,
                                 int first, int end) {
  TileSums<A, LeftLayout, ExactLeft> sums;
  Step<LeftLayout, Left> left_step(left);
  Step<RowsAlongDepth, Right> right_step(right);
  left_step.load(row, first);
  right_step.load(column, first);
#pragma unroll 1
  for (int k = first; k < end; k += kDepth) {
    __syncthreads();  // what was there has been read
    left_step.store(left_operand<A>());
    right_step.store(right_operand<A>());
    __syncthreads();
    if (k + kDepth < end) {
      left_step.load(row, k + kDepth);
      right_step.load(column, k + kDepth);
    }
    sums.add_step();
  }
  __syncthreads();
  sums.store();
  __syncthreads();
  return left_operand<A>();
}

}  // namespace fused_bottleneck::cuda
