// The dtypes in memory, their accumulation types, and reading and writing adjacent elements in as few instructions
// as the hardware has: 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "row/args.h"
#include "row/portable.h"

namespace engine_fast::cuda {

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// torch compiles with the implicit conversions of these types switched off.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float* to) { *to = x; }
__device__ __forceinline__ void narrow(double x, double* to) { *to = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half* to) { *to = __float2half_rn(x); }

// kCount adjacent elements, moved by one instruction where their address allows it.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

// Elements of T in one access, where kUnit adjacent ones are wanted.
template <typename T, int kUnit>
constexpr int kPack = kUnit < 16 / static_cast<int>(sizeof(T)) ? kUnit : 16 / static_cast<int>(sizeof(T));

template <int kUnit, typename T, typename A>
__device__ __forceinline__ void load_unit(const T* from, A* to) {
  using P = Pack<T, kPack<T, kUnit>>;
#pragma unroll
  for (int p = 0; p < kUnit; p += kPack<T, kUnit>) {
    const P pack = *reinterpret_cast<const P*>(from + p);
#pragma unroll
    for (int e = 0; e < kPack<T, kUnit>; ++e) to[p + e] = widen(pack.at[e]);
  }
}

template <int kUnit, typename T, typename A>
__device__ __forceinline__ void store_unit(const A* from, T* to) {
  using P = Pack<T, kPack<T, kUnit>>;
#pragma unroll
  for (int p = 0; p < kUnit; p += kPack<T, kUnit>) {
    P pack;
#pragma unroll
    for (int e = 0; e < kPack<T, kUnit>; ++e) narrow(from[p + e], &pack.at[e]);
    *reinterpret_cast<P*>(to + p) = pack;
  }
}

template <typename T>
__device__ __forceinline__ T* row_of(const Matrix& matrix, int64_t row) {
  return matrix.data == nullptr ? nullptr : static_cast<T*>(matrix.data) + row * matrix.stride;
}

template <typename T>
struct Type {
  using type = T;
};

// f(Type<A>, Type<B>) for two dtypes that may meet, cudaErrorInvalidValue for others.
template <typename F>
cudaError_t with_types(DType a, DType b, F f) {
  const auto narrow_or_float = [&](auto first) -> cudaError_t {  // first: a 16-bit type
    if (b == a) return f(first, first);
    if (b == DType::kFloat32) return f(first, Type<float>{});
    return cudaErrorInvalidValue;
  };
  switch (a) {
    case DType::kFloat32:
      switch (b) {
        case DType::kFloat32: return f(Type<float>{}, Type<float>{});
        case DType::kBFloat16: return f(Type<float>{}, Type<__nv_bfloat16>{});
        case DType::kFloat16: return f(Type<float>{}, Type<__half>{});
        default: return cudaErrorInvalidValue;
      }
    case DType::kFloat64: return b == a ? f(Type<double>{}, Type<double>{}) : cudaErrorInvalidValue;
    case DType::kBFloat16: return narrow_or_float(Type<__nv_bfloat16>{});
    case DType::kFloat16: return narrow_or_float(Type<__half>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace engine_fast::cuda
