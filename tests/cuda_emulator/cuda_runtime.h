// CUDA on the CPU, for tests: enough of its language and runtime to compile csrc/cuda/*.cu as C++.
//
// A block's threads are fibers, run one after the other from barrier to barrier; blocks run one
// after the other. Shared memory is filled with NaN before each block, and threads run in falling
// order, so that what is read without a barrier after its writing shows.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned x = 1) : x(x) {}
};

namespace cuda_emulator {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 48 * 1024;

struct Block {
  int threads = 0, running = 0;
  std::function<void()> body;
  ucontext_t scheduler, fibers[kMaxThreads];
  bool done[kMaxThreads];
  std::unique_ptr<char[]> stacks[kMaxThreads];
};
inline Block block;

}  // namespace cuda_emulator

inline dim3 threadIdx, blockIdx, blockDim;
inline double shared_memory[cuda_emulator::kSharedBytes / sizeof(double)];

inline double rsqrt(double v) { return 1 / std::sqrt(v); }

inline void __syncthreads() {
  auto& block = cuda_emulator::block;
  swapcontext(&block.fibers[block.running], &block.scheduler);
}

namespace cuda_emulator {

inline void run_fiber() {
  block.body();
  block.done[block.running] = true;
}

inline void start(int thread) {
  auto& stack = block.stacks[thread];
  if (!stack) stack.reset(new char[kStackBytes]);
  ucontext_t& fiber = block.fibers[thread];
  getcontext(&fiber);
  fiber.uc_stack.ss_sp = stack.get();
  fiber.uc_stack.ss_size = kStackBytes;
  fiber.uc_link = &block.scheduler;
  makecontext(&fiber, run_fiber, 0);
  block.done[thread] = false;
}

inline void run_block() {
  std::memset(shared_memory, 0xff, kSharedBytes);
  for (int thread = 0; thread < block.threads; ++thread) start(thread);
  for (int left = block.threads; left > 0;) {
    for (int thread = block.threads - 1; thread >= 0; --thread) {
      if (block.done[thread]) continue;
      block.running = thread;
      threadIdx = dim3(static_cast<unsigned>(thread));
      swapcontext(&block.scheduler, &block.fibers[thread]);
      left -= block.done[thread];
    }
  }
}

}  // namespace cuda_emulator

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_emulator;
  if (config->blockDim.x > kMaxThreads || config->dynamicSmemBytes > kSharedBytes ||
      config->gridDim.x == 0)
    return cudaErrorInvalidConfiguration;
  block.threads = static_cast<int>(config->blockDim.x);
  block.body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  blockDim = config->blockDim;
  for (unsigned index = 0; index < config->gridDim.x; ++index) {
    blockIdx = dim3(index);
    run_block();
  }
  return cudaSuccess;
}
