// Enough of CUDA on a CPU to run csrc/cuda without a GPU: every thread of a block is a fiber, blocks run one after the
// other, barriers and shuffles switch between fibers. It shows wrong indexing, wrong arithmetic, divergent barriers
// and, with -fsanitize, accesses out of bounds or misaligned. It cannot show a missing barrier with certainty, nor
// anything about speed. g++ includes this file before each source.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define ENGINE_FAST_EMULATED

inline dim3 blockDim, gridDim;
inline uint3 threadIdx, blockIdx;

namespace emulator {

constexpr int kWarpSize = 32;
constexpr size_t kStack = 1 << 16;
constexpr int kProcessors = 8, kSharedLimit = 100 << 10;  // a small GPU: every way to launch needs few threads

struct Barrier {
  int arrived = 0;
  unsigned phase = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slots[kWarpSize][16];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 thread;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  ucontext_t scheduler;
  int current = 0;
  long progress = 0;
};

inline Block* block = nullptr;
inline const std::function<void()>* body = nullptr;
inline unsigned char* shared_memory = nullptr;

inline int lane() { return block->current % kWarpSize; }
inline Warp& warp() { return block->warps[block->current / kWarpSize]; }

inline void enter() {
  (*body)();
  block->fibers[block->current].done = true;
}

inline void wait(Barrier& barrier, int threads) {
  const unsigned phase = barrier.phase;
  ++block->progress;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.phase;
    return;
  }
  while (barrier.phase == phase) swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

template <typename T, typename F>
T exchange(T value, const F& read) {  // read(slots of all lanes)
  std::memcpy(warp().slots[lane()], &value, sizeof(T));
  wait(warp().barrier, kWarpSize);
  const T result = read([](int from) {
    T other;
    std::memcpy(&other, warp().slots[from], sizeof(T));
    return other;
  });
  wait(warp().barrier, kWarpSize);
  return result;
}

// Fibers take turns in one order, then in the opposite one.
inline void run_block(size_t shared_bytes) {
  const int threads = static_cast<int>(blockDim.x * blockDim.y);
  Block here;
  block = &here;
  here.fibers.resize(threads);
  here.warps.resize((threads + kWarpSize - 1) / kWarpSize);
  std::vector<unsigned char> memory(shared_bytes + 16, 0xff);
  shared_memory = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = here.fibers[i];
    fiber.thread = {i % blockDim.x, i / blockDim.x, 0};
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &here.scheduler;
    makecontext(&fiber.context, &enter, 0);
  }
  for (int left = threads, turn = 0; left > 0; ++turn) {
    const long before = here.progress;
    const int started_with = left;
    for (int k = 0; k < threads; ++k) {
      here.current = turn % 2 == 0 ? k : threads - 1 - k;
      Fiber& fiber = here.fibers[here.current];
      if (fiber.done) continue;
      threadIdx = fiber.thread;
      swapcontext(&here.scheduler, &fiber.context);
      if (fiber.done) --left;
    }
    if (left == started_with && here.progress == before) {
      std::fprintf(stderr, "emulator: every thread of the block waits: a barrier is not reached by all\n");
      std::exit(1);
    }
  }
  block = nullptr;
}

// What cudaMalloc gives has no room behind it, so that a sanitizer sees each step outside.
inline cudaError_t allocate(void** pointer, size_t bytes) {
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

inline cudaError_t attribute(int* value, cudaDeviceAttr which) {
  *value = which == cudaDevAttrMultiProcessorCount ? kProcessors : kSharedLimit;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  const std::function<void()> call = [&] { kernel(arguments...); };
  body = &call;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned y = 0; y < gridDim.y; ++y)
    for (unsigned x = 0; x < gridDim.x; ++x) {
      blockIdx = {x, y, 0};
      run_block(config->dynamicSmemBytes);
    }
  body = nullptr;
  return cudaSuccess;
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::wait(emulator::block->barrier, static_cast<int>(emulator::block->fibers.size()));
}
inline void __syncwarp() { emulator::wait(emulator::warp().barrier, emulator::kWarpSize); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int from = emulator::lane() ^ mask;
  return emulator::exchange(value, [&](const auto& of) { return of(from); });
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return emulator::exchange(value, [](const auto& of) {
    unsigned least = of(0);
    for (int i = 1; i < emulator::kWarpSize; ++i) least = of(i) < least ? of(i) : least;
    return least;
  });
}

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

#define cudaLaunchKernelEx emulator::launch
#define cudaMalloc(pointer, bytes) emulator::allocate(reinterpret_cast<void**>(pointer), bytes)
#define cudaFree(pointer) (std::free(pointer), cudaSuccess)
#define cudaMemcpy(to, from, bytes, kind) (std::memcpy(to, from, bytes), cudaSuccess)
#define cudaMemset(to, value, bytes) (std::memset(to, value, bytes), cudaSuccess)
#define cudaGetDeviceCount(count) (*(count) = 1, cudaSuccess)
#define cudaGetDevice(device) (*(device) = 0, cudaSuccess)
#define cudaDeviceGetAttribute(value, which, device) emulator::attribute(value, which)
#define cudaFuncSetAttribute(...) cudaSuccess
#define cudaGetLastError() cudaSuccess
#define cudaDeviceSynchronize() cudaSuccess
