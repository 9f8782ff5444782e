// How the passes share their rows among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "arguments.h"

namespace fused_bottleneck::cpu {

// Elements below which one more thread costs more than it brings (as at::internal::GRAIN_SIZE).
constexpr int64_t kGrainElements = 32768;

// body(begin, end) over rows of so many elements, in parallel.
template <class Body>
void parallel_rows(int64_t rows, int64_t elements, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / elements);
  torch::stable::parallel_for(0, rows, grain, body);
}

template <class Body>
void parallel_rows(const Arguments& args, const Body& body) {
  parallel_rows(args.rows, args.channels, body);
}

// The rows of a reduction, cut into chunks by the shape alone; one thread reduces a chunk.
struct Chunks {
  // least: rows of a chunk.
  Chunks(int64_t total, int64_t elements, int64_t least) : total(total) {
    const int64_t by_size = total * elements / kGrainElements;
    const int64_t wanted = std::clamp<int64_t>(std::min(by_size, total / least), 1, kMax);
    rows = (total + wanted - 1) / wanted;
    count = (total + rows - 1) / rows;
  }

  int64_t begin(int64_t chunk) const { return chunk * rows; }
  int64_t end(int64_t chunk) const { return std::min(total, begin(chunk) + rows); }

  int64_t total, rows, count;

 private:
  static constexpr int64_t kMax = 64;  // bounds the partial results, and the threads in use
};

// Pixels of a chunk, which bound the partial results against the matrix.
constexpr int64_t kChunkPixels = 64;

inline Chunks matrix_chunks(const Arguments& args) {
  return {args.rows, args.channels, kChunkPixels};
}

template <class Body>
void parallel_chunks(const Chunks& chunks, const Body& body) {
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
  });
}

}  // namespace fused_bottleneck::cpu
