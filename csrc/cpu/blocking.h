// How a product is cut up: the rows of its operands into blocks, the blocks over threads, and the
// memory that the caller lent into arrays.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../stable_utils.h"
#include "kernels.h"
#include "products.h"

namespace fused_bottleneck::cpu {

// What the sums of all threads may take together where there is a choice (they are to stay in the
// L3 cache), and where there is none.
constexpr int64_t kSumsBytes = 12 * 1024 * 1024;
constexpr int64_t kMostSumsBytes = 128 * 1024 * 1024;
constexpr int64_t kAlignment = 64;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// An odd number of cache lines from panel to panel, or of pairs: else all begin in one cache set.
inline int64_t left_stride(int64_t rows) { return round_up(rows, kRowMultiple) + 2; }
inline int64_t right_stride(int64_t rows) { return round_up(rows, kRowMultiple) + 1; }

inline const ProductKernels& kernels_in_use() {
  const ProductKernels* kernels = capability().products;
  STD_TORCH_CHECK(kernels != nullptr, "fused 1x1 products need AVX2 and FMA, got ",
                  capability().name);
  return *kernels;
}

// Those of matrices of a dtype, float32 or bfloat16.
inline const ProductKernels& product_kernels_for(ScalarType dtype) {
  if (dtype == ScalarType::Float) return kernels_in_use();
  const ProductKernels* kernels = capability().pair_products;
  STD_TORCH_CHECK(kernels != nullptr, "fused 1x1 products of ", dtype_name(dtype),
                  " need AVX512-BF16, got ", capability().name);
  return *kernels;
}

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// How the threads share a product over rows, left [rows, wide] and right [rows, narrow]: each has
// rows and sums of its own, or, where those sums are large, left channels.
struct Split {
  static Split by_rows(int64_t sums) {
    const int64_t bytes = std::max<int64_t>(1, sums * static_cast<int64_t>(sizeof(double)));
    return {std::clamp<int64_t>(kMostSumsBytes / bytes, 1, thread_count()), 1};
  }

  static Split of(int64_t sums) {
    const int64_t bytes = thread_count() * sums * static_cast<int64_t>(sizeof(double));
    return bytes > kSumsBytes ? Split{1, thread_count()} : by_rows(sums);
  }

  int64_t row_parts, channel_parts;
};

// The rows in equal contiguous shares, one per thread, and a share in blocks of one size but the
// last: whole tiles but for the share's last rows.
struct Blocks {
  Blocks(int64_t rows, int64_t most_threads, int64_t most_rows) : rows(rows) {
    threads = std::clamp<int64_t>(rows / kRowMultiple, 1, most_threads);
    const int64_t share = (rows + threads - 1) / threads;
    per_thread = (share + most_rows - 1) / most_rows;
    block = std::min(most_rows, round_up((share + per_thread - 1) / per_thread, kRowMultiple));
  }

  int64_t share_begin(int64_t thread) const { return rows * thread / threads; }
  int64_t in_share(int64_t thread) const {
    return (share_begin(thread + 1) - share_begin(thread) + block - 1) / block;
  }
  int64_t count() const { return threads * per_thread; }

  int64_t rows, threads, per_thread, block;
};

// Whether the sums of the blocks may stay float32: each has a chain of its own, and a few of them
// are a chain as short.
constexpr int64_t kFewBlocks = 4;
inline bool has_few_blocks(const Blocks& blocks) { return blocks.per_thread <= kFewBlocks; }

// Rows of one thread, as a block: its number, its first row, how many.
struct Block {
  int64_t worker;  // which thread, of all
  int64_t share;   // which share of the rows it has
  int64_t part;    // which part of the channels
  int64_t index, begin, rows;
  bool first;         // of its share
  int64_t next_rows;  // of the block after it
};

// The i-th block of a share, for a worker.
inline Block block_of(const Blocks& blocks, int64_t worker, int64_t share, int64_t part,
                      int64_t i) {
  const int64_t end = blocks.share_begin(share + 1);
  const int64_t row = blocks.share_begin(share) + i * blocks.block;
  const int64_t rows = std::min(blocks.block, end - row);
  const int64_t next_rows = std::min(blocks.block, end - row - rows);
  return {worker, share, part, share * blocks.per_thread + i, row, rows, i == 0, next_rows};
}

// body(Block) for all blocks of every part of the channels; those of one thread in order. A share
// may have fewer blocks than per_thread: then some numbers are not used.
template <class Body>
void parallel_blocks(const Blocks& blocks, int64_t channel_parts, const Body& body) {
  torch::stable::parallel_for(
      0, blocks.threads * channel_parts, 1, [&](int64_t first, int64_t last) {
        for (int64_t worker = first; worker < last; ++worker) {
          const int64_t share = worker % blocks.threads, part = worker / blocks.threads;
          for (int64_t i = 0; i < blocks.in_share(share); ++i)
            body(block_of(blocks, worker, share, part, i));
        }
      });
}

template <class Body>
void parallel_blocks(const Blocks& blocks, const Body& body) {
  parallel_blocks(blocks, 1, body);
}

// The same where a block's result does not depend on who computes it: a thread that is done with
// its share goes on with what is left of the others'.
template <class Body>
void parallel_free_blocks(const Blocks& blocks, const Body& body) {
  std::vector<std::atomic<int64_t>> next(blocks.threads);
  torch::stable::parallel_for(0, blocks.threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t k = 0; k < blocks.threads; ++k) {
        const int64_t share = (worker + k) % blocks.threads;
        for (int64_t i = next[share]++; i < blocks.in_share(share); i = next[share]++)
          body(block_of(blocks, worker, share, 0, i));
      }
  });
}

// Left channels [begin, end) of one part: whole panels, and whole vectors of any instruction set,
// which packing reads. None where there are more parts than that.
struct ChannelRange {
  ChannelRange(int64_t channels, int64_t parts, int64_t part)
      : begin(channels / kChannelMultiple * part / parts * kChannelMultiple),
        end(channels / kChannelMultiple * (part + 1) / parts * kChannelMultiple) {}

  int64_t size() const { return end - begin; }

  int64_t begin, end;
};

// Carves arrays out of memory that the caller lent.
class Workspace {
 public:
  Workspace(const char* op, const Tensor& t, int64_t needed) {
    STD_TORCH_CHECK(
        t.is_cpu() && t.scalar_type() == ScalarType::Byte && t.dim() == 1 && t.is_contiguous(), op,
        ": expected workspace to be uint8 [bytes], contiguous, on the CPU, got ", describe(t));
    STD_TORCH_CHECK(t.numel() >= needed, op, ": expected workspace to have at least ", needed,
                    " bytes, got ", t.numel());
    char* begin = static_cast<char*>(t.mutable_data_ptr());
    next_ = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(begin), kAlignment));
    end_ = begin + t.numel();
  }

  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    STD_TORCH_CHECK(next_ <= end_, "workspace: more was taken than asked for");
    return array;
  }

  Sums take_sums(int64_t count, bool floats) {
    if (floats) return {take<float>(count), nullptr};
    return {nullptr, take<double>(count)};
  }

 private:
  char *next_, *end_;
};

}  // namespace fused_bottleneck::cpu
