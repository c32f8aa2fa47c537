// From the states of a row's threads to that of the row. The order of every sum is fixed: results repeat bit by bit.
#pragma once

#include "row/state.h"
#include "cuda/storage.cuh"

namespace engine_fast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int64_t kNoColumn = 0xffffffff;  // above every column, so that it loses a minimum

// max_of in one instruction.
__device__ __forceinline__ float nan_max(float a, float b) {
#ifdef __CUDA_ARCH__
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
#else
  return max_of(a, b);
#endif
}
__device__ __forceinline__ double nan_max(double a, double b) { return max_of(a, b); }

template <typename A>
__device__ __forceinline__ A max_over_warp(A x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = nan_max(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

template <typename A>
__device__ __forceinline__ A sum_over_warp(A x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// A state with the warp's maxima and no elements.
template <typename A>
__device__ __forceinline__ SoftState<A> top_of_warp(const SoftState<A>& state) {
  return {max_over_warp(state.max), A(0), kNoColumn};
}
template <typename A>
__device__ __forceinline__ RowState<A> top_of_warp(const RowState<A>& state) {
  return {top_of_warp(state.z), max_over_warp(state.max_s), A(0), A(0)};
}

// Of states that share their maxima.
template <typename A>
__device__ __forceinline__ SoftState<A> add_over_warp(const SoftState<A>& state) {
  return {state.max, sum_over_warp(state.sum),
          static_cast<int64_t>(__reduce_min_sync(kAllLanes, static_cast<unsigned>(state.argmax)))};
}
template <typename A>
__device__ __forceinline__ RowState<A> add_over_warp(const RowState<A>& state) {
  return {add_over_warp(state.z), state.max_s, sum_over_warp(state.sum_s), sum_over_warp(state.dot)};
}

// Maxima first: every lane then rescales once, where a butterfly of merges would do so five times.
template <typename State, typename A>
__device__ __forceinline__ State merge_over_warp(const State& state, A inv_temperature) {
  return add_over_warp(merge(state, top_of_warp(state), inv_temperature));
}

// Waits for the threads of a row, which are a warp or the whole block.
__device__ __forceinline__ void sync_row() {
  if (blockDim.x == kWarp)
    __syncwarp();
  else
    __syncthreads();
}

// The row's state from those of its blockDim.x threads. True, and `state` the result, in one thread of the row.
template <typename State, typename A>
__device__ __forceinline__ bool merge_over_row(State& state, A inv_temperature) {
  state = merge_over_warp(state, inv_temperature);
  if (blockDim.x == kWarp) return threadIdx.x == 0;
  __shared__ __align__(16) unsigned char memory[kWarp * sizeof(State)];
  State* parts = reinterpret_cast<State*>(memory);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  __syncthreads();  // the parts of the previous row have been read
  if (lane == 0) parts[warp] = state;
  __syncthreads();
  if (warp != 0) return false;
  state = merge_over_warp(lane < warps ? parts[lane] : State{}, inv_temperature);
  return lane == 0;
}

// The sum over a row's threads, in all of them.
template <typename A>
__device__ __forceinline__ A sum_over_row(A x) {
  x = sum_over_warp(x);
  if (blockDim.x == kWarp) return x;
  __shared__ A parts[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  __syncthreads();
  if (lane == 0) parts[warp] = x;
  __syncthreads();
  return sum_over_warp(lane < warps ? parts[lane] : A(0));
}

}  // namespace engine_fast::cuda
