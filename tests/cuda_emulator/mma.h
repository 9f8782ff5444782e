// Tensor cores' products of 16 x 16 tiles in tf32: as many elements of a fragment in a thread as
// CUDA puts there, but in another order, which programs may not know.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
namespace precision {
struct tf32 {};
}  // namespace precision
enum layout_t { mem_row_major, mem_col_major };

constexpr int kSide = 16, kDepth = 8;

// The rows and columns of an operand, which decide where its elements are.
template <class Use>
constexpr int kRows = std::is_same_v<Use, matrix_b> ? kDepth : kSide;
template <class Use>
constexpr int kColumns = std::is_same_v<Use, matrix_a> ? kDepth : kSide;

template <class Use, int, int, int, class, class Layout = void>
struct fragment {
  static constexpr int num_elements = kRows<Use> * kColumns<Use> / cuda_emulator::kWarp;
  float x[num_elements];
};

// The place of a thread's element in the matrix.
template <class Use>
int place(int element) {
  constexpr int count = kRows<Use> * kColumns<Use> / cuda_emulator::kWarp;
  return static_cast<int>(threadIdx.x) % cuda_emulator::kWarp * count + element;
}

// Ends the process where CUDA leaves undefined what happens.
inline void require_alignment(const float* matrix, unsigned stride) {
  if (reinterpret_cast<uintptr_t>(matrix) % 32 != 0 || stride % 4 != 0) std::abort();
}

// Rounds to nearest, ties away from zero.
inline float __float_to_tf32(float value) {
  return std::isfinite(value) ? __uint_as_float((__float_as_uint(value) + 0x1000) & ~0x1fffu)
                              : value;
}

// What the multiplier sees of an element.
inline float truncated(float value) {
  return std::isfinite(value) ? __uint_as_float(__float_as_uint(value) & ~0x1fffu) : value;
}

template <class Fragment>
void fill_fragment(Fragment& fragment, float value) {
  for (float& element : fragment.x) element = value;
}

template <class Use, int M, int N, int K, class T, class Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& to, const float* from, unsigned stride) {
  require_alignment(from, stride);
  for (int element = 0; element < to.num_elements; ++element) {
    const int row = place<Use>(element) / kColumns<Use>;
    const int column = place<Use>(element) % kColumns<Use>;
    const bool across = std::is_same_v<Layout, row_major>;
    to.x[element] = from[across ? row * stride + column : column * stride + row];
  }
}

template <int M, int N, int K>
void store_matrix_sync(float* to, const fragment<accumulator, M, N, K, float>& from,
                       unsigned stride, layout_t) {
  require_alignment(to, stride);
  for (int element = 0; element < from.num_elements; ++element) {
    const int at = place<accumulator>(element);
    to[at / kSide * stride + at % kSide] = from.x[element];
  }
}

template <class D, class A, class B>
void mma_sync(D& d, const A& a, const B& b, const D& c) {
  const cuda_emulator::Exchange<A> all_a(a);
  const cuda_emulator::Exchange<B> all_b(b);
  const auto element = [](const auto& all, int at) {
    return truncated(all[at / all[0].num_elements].x[at % all[0].num_elements]);
  };
  for (int e = 0; e < d.num_elements; ++e) {
    const int row = place<accumulator>(e) / kSide, column = place<accumulator>(e) % kSide;
    float total = c.x[e];
    for (int k = 0; k < kDepth; ++k)
      total += element(all_a, row * kDepth + k) * element(all_b, k * kSide + column);
    d.x[e] = total;
  }
}

}  // namespace nvcuda::wmma
