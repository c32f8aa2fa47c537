// How threads share the columns of a row. Kernels are written once, over batches of elements in registers; a batch is
// either several whole units of aligned, adjacent columns (vector accesses) or one block of four of the rest.
#pragma once

#include "cuda/storage.cuh"

namespace engine_fast::cuda {

// kUnits units of kUnit adjacent columns, `stride` columns apart: all its loads are in flight before the first use.
template <int kUnitSize, int kUnits>
struct Units {
  static constexpr int kUnit = kUnitSize, kSize = kUnit * kUnits;
  int first, stride, end;
  __device__ __forceinline__ int column(int e) const { return first + e / kUnit * stride + e % kUnit; }
  __device__ __forceinline__ bool has(int e) const { return first + e / kUnit * stride < end; }
};

// Four columns from a multiple of four, the reach of one Philox block; those outside [begin, end) are not there.
struct Block {
  static constexpr int kSize = 4;
  int first, begin, end;
  __device__ __forceinline__ int column(int e) const { return first + e; }
  __device__ __forceinline__ bool has(int e) const { return first + e >= begin && first + e < end; }
};

template <typename T, int kUnit, int kUnits, typename A>
__device__ __forceinline__ void load(const T* row, const Units<kUnit, kUnits>& place, A* to, A missing) {
#pragma unroll
  for (int e = 0; e < place.kSize; e += kUnit) {
    if (place.has(e)) {
      load_unit<kUnit>(row + place.column(e), to + e);
    } else {
#pragma unroll
      for (int k = 0; k < kUnit; ++k) to[e + k] = missing;
    }
  }
}

template <typename T, typename A>
__device__ __forceinline__ void load(const T* row, const Block& place, A* to, A missing) {
#pragma unroll
  for (int e = 0; e < place.kSize; ++e) to[e] = place.has(e) ? widen(row[place.column(e)]) : missing;
}

template <typename T, int kUnit, int kUnits, typename A>
__device__ __forceinline__ void store(const A* from, const Units<kUnit, kUnits>& place, T* row) {
#pragma unroll
  for (int e = 0; e < place.kSize; e += kUnit)
    if (place.has(e)) store_unit<kUnit>(from + e, row + place.column(e));
}

template <typename T, typename A>
__device__ __forceinline__ void store(const A* from, const Block& place, T* row) {
#pragma unroll
  for (int e = 0; e < place.kSize; ++e)
    if (place.has(e)) narrow(from[e], row + place.column(e));
}

// Columns [head, tail) are whole units, aligned in every matrix that is walked; the rest is blocks.
struct Columns {
  int begin, head, tail, end;
};

// Where a matrix has column `begin` of the row; size 0: it is absent.
struct Origin {
  uintptr_t address = 0;
  int size = 0;
};

template <typename T>
__device__ __forceinline__ Origin origin(const T* row, int begin) {
  return row == nullptr ? Origin{} : Origin{reinterpret_cast<uintptr_t>(row + begin), static_cast<int>(sizeof(T))};
}

// Each matrix is aligned every 1, 2, 4 or 8 columns. If they all are at some column, then at the largest of their
// first ones: the coarsest period decides.
template <int kUnit, typename... Origins>
__device__ __forceinline__ Columns columns_of(int begin, int end, const Origins&... origins) {
  const auto off = [](const Origin& o) {  // bytes past the last boundary
    return static_cast<int>(o.address & ((kUnit * o.size < 16 ? kUnit * o.size : 16) - 1));
  };
  const auto steps = [&](const Origin& o) {  // columns to the next one
    const int boundary = kUnit * o.size < 16 ? kUnit * o.size : 16;
    return o.size == 0 || off(o) == 0 ? 0 : (boundary - off(o)) / o.size;
  };
  int head = 0;
  ((head = steps(origins) > head ? steps(origins) : head), ...);
  const auto fits = [&](const Origin& o) {
    return o.size == 0 || off(Origin{o.address + static_cast<unsigned>(head * o.size), o.size}) == 0;
  };
  const bool aligned = (fits(origins) && ...);
  head += begin;
  if (!aligned || head > end) return {begin, end, end, end};
  return {begin, head, head + (end - head) / kUnit * kUnit, end};
}

// body(batch) for this thread's share, being the lane-th of `width`. The columns do not come in order.
template <int kUnit, int kUnits, typename Body>
__device__ __forceinline__ void walk(const Columns& columns, int lane, int width, const Body& body) {
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    const int begin = part == 0 ? columns.begin : columns.tail, end = part == 0 ? columns.head : columns.end;
    if (begin >= end) continue;
#pragma unroll 1
    for (int first = (begin & ~3) + 4 * lane; first < end; first += 4 * width) body(Block{first, begin, end});
  }
#pragma unroll 1
  for (int first = columns.head + kUnit * lane; first < columns.tail; first += kUnit * kUnits * width)
    body(Units<kUnit, kUnits>{first, kUnit * width, columns.tail});
}

// 16-byte accesses to the narrowest dtype of T...; where one is wider, 16-byte accesses to that, all fully coalesced.
// kSize: elements of a batch, as many as its kernel has registers for.
template <int kSize, typename... T>
struct Batch {
  static constexpr int kUnit = ((sizeof(T) == 2) && ...) ? 8 : 4;
  static constexpr int kUnits = kSize / kUnit;
};

}  // namespace engine_fast::cuda
