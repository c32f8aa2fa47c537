// The state of one batch in registers: its own maximum first, then sums relative to it.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/walk.cuh"

namespace engine_fast::cuda {

// What to subtract before exp: a batch of nothing but -inf has sum 0, not NaN.
template <typename A>
__device__ __forceinline__ A base_of(A max) {
  return max == minus_infinity<A>() ? A(0) : max;
}

// exp_of, but 0 where the result would be denormal: three instructions fewer, of some 30 an element that bfloat16 has
// time for at the bandwidth of an H100's memory.
__device__ __forceinline__ float exp_or_zero(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
#else
  return exp_of(x);
#endif
}
__device__ __forceinline__ double exp_or_zero(double x) { return exp_of(x); }

// Of x; with sums, x becomes c (see state.h), else only maximum and argmax are found.
template <typename Place, typename A>
__device__ __forceinline__ SoftState<A> soft_state_of(const Place& place, A* x, A inv_temperature, bool sums) {
  SoftState<A> state;
  int arg = 0;
  state.max = x[0];
#pragma unroll
  for (int e = 1; e < Place::kSize; ++e) {
    arg = x[e] > state.max ? e : arg;
    state.max = nan_max(state.max, x[e]);
  }
  state.argmax = place.column(arg);
  if (sums) {
    const A base = base_of(state.max);
#pragma unroll
    for (int e = 0; e < Place::kSize; ++e) {
      x[e] = exp_or_zero((x[e] - base) * inv_temperature);
      state.sum += x[e];
    }
  }
  return state;
}

template <typename Place, typename A>
__device__ __forceinline__ RowState<A> row_state_of(const Place& place, A* x, const A* s, A inv_temperature,
                                                    bool sums) {
  RowState<A> state;
  state.z = soft_state_of(place, x, inv_temperature, sums);
  state.max_s = s[0];
#pragma unroll
  for (int e = 1; e < Place::kSize; ++e) state.max_s = nan_max(state.max_s, s[e]);
  const A base = base_of(state.max_s);
#pragma unroll
  for (int e = 0; e < Place::kSize; ++e) state.sum_s += exp_or_zero(s[e] - base);
  if (sums) {
#pragma unroll
    for (int e = 0; e < Place::kSize; ++e) state.dot += unless_zero(x[e], x[e] * (s[e] - base));
  }
  return state;
}

}  // namespace engine_fast::cuda
