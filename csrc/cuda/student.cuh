// The student's logits x = z + g of one row, batch by batch, wherever g comes from.
#pragma once

#include "row/philox.h"
#include "cuda/walk.cuh"

namespace engine_fast::cuda {

// Row and column of this thread: blockDim.x threads share a row, blockDim.y rows a block, gridDim.y blocks a row.
__device__ __forceinline__ int64_t first_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_step() { return static_cast<int64_t>(gridDim.x) * blockDim.y; }
__device__ __forceinline__ int lane_of_row() { return static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); }
__device__ __forceinline__ int lanes_of_row() { return static_cast<int>(gridDim.y * blockDim.x); }

inline bool has_noise(const Student& student) {
  return student.noise.values.data != nullptr || student.noise.seed != nullptr;
}

__device__ __forceinline__ bool ignored(const Student& student, int64_t row) {
  return student.ignore != nullptr && student.ignore[row] != 0;
}

// Four words of the stream that has `here` and then `next`, from word `shift` of `here` on.
__device__ __forceinline__ Words4 shifted(const Words4& here, const Words4& next, int shift) {
  const bool one = (shift & 1) != 0, two = (shift & 2) != 0;
  const uint32_t a = one ? here.x1 : here.x0, b = one ? here.x2 : here.x1, c = one ? here.x3 : here.x2;
  const uint32_t d = one ? next.x0 : here.x3, e = one ? next.x1 : next.x0, f = one ? next.x2 : next.x1;
  return {two ? c : a, two ? d : b, two ? e : c, two ? f : d};
}

// kNoise: g is not 0. A kernel without it needs fewer registers and has more loads in flight.
template <typename Z, bool kNoise>
struct StudentRow {
  using A = Accumulate<Z>;
  const Z* z;
  const A* values = nullptr;  // explicit noise or null
  uint64_t seed = 0, noise_row = 0;

  // The seed is read here, on the device: a graph's replay sees the number that is there then.
  __device__ __forceinline__ StudentRow(const Student& student, int64_t row) : z(row_of<const Z>(student.z, row)) {
    if constexpr (kNoise) {
      values = row_of<const A>(student.noise.values, row);
      if (values == nullptr) seed = static_cast<uint64_t>(*student.noise.seed);
      noise_row = static_cast<uint64_t>(student.noise.first_row + row);
    }
  }

  // x of a batch; -inf for the columns that it lacks.
  template <typename Place>
  __device__ __forceinline__ void load_x(const Place& place, A* x) const {
    load(z, place, x, minus_infinity<A>());
    if constexpr (kNoise) {
      if (values == nullptr) {
        add_seeded(place, x);
      } else {
        A g[Place::kSize];
        load(values, place, g, A(0));
#pragma unroll
        for (int e = 0; e < Place::kSize; ++e) x[e] += g[e];
      }
    }
  }

 private:
  __device__ __forceinline__ void add(const Words4& words, A* x) const {
    x[0] += gumbel_of(words.x0);
    x[1] += gumbel_of(words.x1);
    x[2] += gumbel_of(words.x2);
    x[3] += gumbel_of(words.x3);
  }

  __device__ __forceinline__ Words4 words_of(int column) const {
    return philox(seed, noise_row, static_cast<uint32_t>(column) >> 2);
  }

  __device__ __forceinline__ void add_seeded(const Block& place, A* x) const { add(words_of(place.first), x); }

  // A unit that starts inside a Philox block needs one block more.
  template <int kUnit, int kUnits>
  __device__ __forceinline__ void add_seeded(const Units<kUnit, kUnits>& place, A* x) const {
    const int shift = place.first & 3;  // strides are multiples of four
#pragma unroll
    for (int e = 0; e < place.kSize; e += kUnit) {
      if (!place.has(e)) continue;
      Words4 here = words_of(place.column(e));
#pragma unroll
      for (int k = 0; k < kUnit; k += 4) {
        const bool last = k + 4 == kUnit;
        const Words4 next = !last || shift != 0 ? words_of(place.column(e) + k + 4) : here;
        add(shifted(here, next, shift), x + e + k);
        here = next;
      }
    }
  }
};

}  // namespace engine_fast::cuda
