// CUDA on the CPU, for tests: enough of its language and runtime to compile csrc/cuda/*.cu as C++.
//
// A block's threads are fibers, run one after the other from barrier to barrier; blocks run one
// after the other, those of a cooperative launch from one barrier of the grid to the next. Shared
// memory is filled with NaN before each block, and threads run in falling order, so that what is
// read without a barrier after its writing shows.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
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

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kSharedBytes = 48 * 1024;

// What a thread waits for: nothing, or that all others of its warp, block or grid do too.
enum class Wait { nothing, warp, block, grid, ended };

// A fiber outlives its block and waits for the next one. Switches are by setjmp: a swapcontext is
// two system calls.
struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf resume;
  Wait wait;
};

struct Block {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  double shared[kSharedBytes / sizeof(double)];  // while another block runs
};

struct Grid {
  std::function<void()> body;
  jmp_buf scheduler;
  std::vector<Block> blocks;
  Block* running;
};
inline Grid grid;

inline void wait_for(Wait wait) {
  Fiber& fiber = grid.running->fibers[threadIdx.x];
  fiber.wait = wait;
  if (_setjmp(fiber.resume) == 0) _longjmp(grid.scheduler, 1);
}

inline void run_fiber() {
  for (;;) {
    grid.body();
    wait_for(Wait::ended);
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
  if (_setjmp(grid.scheduler) != 0) return;
  if (fiber.stack)
    _longjmp(fiber.resume, 1);
  else
    start(fiber);
}

}  // namespace cuda_emulator

alignas(32) inline double shared_memory[cuda_emulator::kSharedBytes / sizeof(double)];

using std::fma;
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
inline double rsqrt(double v) { return 1 / std::sqrt(v); }

inline void __syncthreads() { cuda_emulator::wait_for(cuda_emulator::Wait::block); }

namespace cuda_emulator {

// The values of the warp's threads, as far as they take part, which all of them must.
template <class T>
class Exchange {
 public:
  explicit Exchange(const T& value) : values_(all() + threadIdx.x / kWarp * kWarp) {
    values_[threadIdx.x % kWarp] = value;
    wait_for(Wait::warp);
  }
  ~Exchange() { wait_for(Wait::warp); }
  const T& operator[](int lane) const { return values_[lane]; }

 private:
  static T* all() {
    static T values[kMaxThreads];
    return values;
  }
  T* values_;
};

// Lets the threads go on that wait for each other, if all do that have not ended.
inline bool release(Fiber* fibers, int count, Wait wait) {
  bool any = false;
  for (int i = 0; i < count; ++i) {
    if (fibers[i].wait != wait && fibers[i].wait != Wait::ended) return false;
    any |= fibers[i].wait == wait;
  }
  for (int i = 0; any && i < count; ++i)
    if (fibers[i].wait == wait) fibers[i].wait = Wait::nothing;
  return any;
}

// Runs the current block until all of its threads have ended or wait for the grid.
inline void run_block() {
  Fiber* fibers = grid.running->fibers.data();
  const int threads = static_cast<int>(blockDim.x);
  for (bool moved = true; moved;) {
    for (int thread = threads - 1; thread >= 0; --thread) {
      threadIdx = dim3(static_cast<unsigned>(thread));
      if (fibers[thread].wait == Wait::nothing) step(fibers[thread]);
    }
    moved = false;
    for (int first = 0; first < threads; first += kWarp) {
      const int left = threads - first;
      moved |= release(fibers + first, left < kWarp ? left : kWarp, Wait::warp);
    }
    moved = moved || release(fibers, threads, Wait::block);
  }
}

// Runs block `index` in a place of the grid, from its begin or from a barrier of the grid.
inline void enter(unsigned index, size_t place, bool begin) {
  blockIdx = dim3(index);
  grid.running = &grid.blocks[place];
  if (begin) {
    std::memset(shared_memory, 0xff, kSharedBytes);
    for (Fiber& fiber : grid.running->fibers) fiber.wait = Wait::nothing;
  } else {
    std::memcpy(shared_memory, grid.running->shared, kSharedBytes);
  }
  run_block();
  std::memcpy(grid.running->shared, shared_memory, kSharedBytes);
}

// Whether a block goes on after a barrier of the grid; a thread that waits for anything else waits
// for ever.
inline bool goes_on(Block& block) {
  const bool waited = release(block.fibers.data(), static_cast<int>(blockDim.x), Wait::grid);
  for (unsigned i = 0; i < blockDim.x && !waited; ++i)
    if (block.fibers[i].wait != Wait::ended) std::abort();
  return waited;
}

inline void run_grid(bool cooperative) {
  const unsigned count = gridDim.x;
  const size_t places = cooperative ? count : 1;
  while (grid.blocks.size() < places) grid.blocks.emplace_back();
  for (unsigned index = 0; index < count; ++index) {
    enter(index, cooperative ? index : 0, true);
    if (!cooperative && goes_on(grid.blocks[0])) std::abort();
  }
  for (bool more = cooperative; more;) {
    unsigned waited = 0;
    for (unsigned index = 0; index < count; ++index) waited += goes_on(grid.blocks[index]);
    if (waited != 0 && waited != count) std::abort();
    more = waited != 0;
    for (unsigned index = 0; more && index < count; ++index) enter(index, index, false);
  }
}

}  // namespace cuda_emulator

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const cuda_emulator::Exchange<T> values(value);
  return values[threadIdx.x % cuda_emulator::kWarp ^ mask];
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int,
                                                          size_t) {
  *blocks = 2;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_emulator;
  if (config->blockDim.x > kMaxThreads || config->dynamicSmemBytes > kSharedBytes ||
      config->gridDim.x == 0)
    return cudaErrorInvalidConfiguration;
  grid.body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  run_grid(config->numAttrs == 1 && config->attrs->val.cooperative == 1);
  return cudaSuccess;
}
