// CUDA on the CPU, for tests: enough of its language and runtime to compile csrc/cuda/*.cu as C++.
//
// A block's threads are fibers, run one after the other from barrier to barrier; blocks run one
// after the other. Shared memory is filled with NaN before each block, and threads run in falling
// order, so that what is read without a barrier after its writing shows.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>

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

inline dim3 threadIdx, blockIdx, blockDim;

namespace cuda_emulator {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 48 * 1024;

// A fiber outlives its block and waits for the next one. Switches are by setjmp: a swapcontext is
// two system calls.
struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf resume;
  bool done;
};

struct Block {
  std::function<void()> body;
  jmp_buf scheduler;
  Fiber fibers[kMaxThreads];
};
inline Block block;

inline void yield(Fiber& fiber) {
  if (_setjmp(fiber.resume) == 0) _longjmp(block.scheduler, 1);
}

inline void run_fiber() {
  Fiber& fiber = block.fibers[threadIdx.x];
  for (;;) {
    block.body();
    fiber.done = true;
    yield(fiber);
  }
}

inline void start(Fiber& fiber) {
  fiber.stack.reset(new char[kStackBytes]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

// Runs a thread up to its next barrier, or its end.
inline void step(Fiber& fiber) {
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.stack)
    _longjmp(fiber.resume, 1);
  else
    start(fiber);
}

}  // namespace cuda_emulator

inline double shared_memory[cuda_emulator::kSharedBytes / sizeof(double)];

inline double rsqrt(double v) { return 1 / std::sqrt(v); }

inline void __syncthreads() { cuda_emulator::yield(cuda_emulator::block.fibers[threadIdx.x]); }

namespace cuda_emulator {

inline void run_block() {
  const int threads = static_cast<int>(blockDim.x);
  std::memset(shared_memory, 0xff, kSharedBytes);
  for (int thread = 0; thread < threads; ++thread) block.fibers[thread].done = false;
  for (int left = threads; left > 0;) {
    for (int thread = threads - 1; thread >= 0; --thread) {
      Fiber& fiber = block.fibers[thread];
      if (fiber.done) continue;
      threadIdx = dim3(static_cast<unsigned>(thread));
      step(fiber);
      left -= fiber.done;
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
  block.body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  blockDim = config->blockDim;
  for (unsigned index = 0; index < config->gridDim.x; ++index) {
    blockIdx = dim3(index);
    run_block();
  }
  return cudaSuccess;
}
