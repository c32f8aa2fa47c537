// What the row kernels share: types chosen once, rows spread over threads, noise made a block at a time.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "cpu/lanes.h"
#include "row/args.h"
#include "row/philox.h"

namespace engine_fast {

constexpr int64_t kBlock = 2048;           // columns that stay in the first-level cache between two passes
constexpr int64_t kGrainElements = 32768;  // of one thread's share at least

template <typename T>
T* row_of(const Matrix& matrix, int64_t row) {
  return matrix.data == nullptr ? nullptr : static_cast<T*>(matrix.data) + row * matrix.stride;
}

// A pair of vectors into the first-level cache: while sums are computed, memory would be idle. Never a fault.
template <typename A, typename T>
EF_HD void fetch(const T* data) {
  constexpr int64_t bytes = Pair<A>::size() * sizeof(T), line = 64;
  for (int64_t offset = 0; offset < bytes; offset += line)
    __builtin_prefetch(reinterpret_cast<const char*>(data) + offset);
}

// The same lanes of the next block.
template <typename A, typename T>
EF_HD void fetch_ahead(const T* data) {
  fetch<A>(data + kBlock);
}

inline bool ignored(const Student& student, int64_t row) { return student.ignore && student.ignore[row]; }

// per_row(i) for every row, in parallel.
template <typename F>
void for_rows(int64_t n, int64_t v, const F& per_row) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, v));
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) per_row(row);
  });
}

// noise.cpp: g(seed, row, first_column + i) for i < columns.
void make_gumbel(uint64_t seed, int64_t row, int64_t first_column, int64_t columns, float* out);
void make_gumbel(uint64_t seed, int64_t row, int64_t first_column, int64_t columns, double* out);

// Blocks of one row: per_block(first column, columns, noise or null).
template <typename A, typename F>
void for_blocks(const Student& student, int64_t row, int64_t first, int64_t columns, const F& per_block) {
  alignas(64) A made[kBlock];
  const A* given = row_of<A>(student.noise.values, row);
  for (int64_t begin = first; begin < first + columns; begin += kBlock) {
    const int64_t count = std::min(kBlock, first + columns - begin);
    const A* noise = nullptr;
    if (given) {
      noise = given + begin;
    } else if (student.noise.seed) {
      make_gumbel(*student.noise.seed, student.noise.first_row + row, begin, count, made);
      noise = made;
    }
    per_block(begin, count, noise);
  }
}

// (z + g) from column `begin + i` on.
template <typename A, typename Z>
EF_HD Pair<A> perturbed(const Z* z, const A* noise, int64_t i, int64_t count, A fill = A(0)) {
  const Pair<A> x = load<A>(z + i, count, fill);
  return noise == nullptr ? x : x + load<A>(noise + i, count);
}

// body(type tags) for the dtypes of a pair of matrices: equal, or one of them float32.
template <typename F>
void with_types(DType first, DType second, const F& body) {
  const auto is = [&](DType a, DType b) { return first == a && second == b; };
  if (is(DType::kFloat32, DType::kFloat32)) return body(float{}, float{});
  if (is(DType::kBFloat16, DType::kBFloat16)) return body(c10::BFloat16{}, c10::BFloat16{});
  if (is(DType::kFloat32, DType::kBFloat16)) return body(float{}, c10::BFloat16{});
  if (is(DType::kBFloat16, DType::kFloat32)) return body(c10::BFloat16{}, float{});
  if (is(DType::kFloat64, DType::kFloat64)) return body(double{}, double{});
  TORCH_INTERNAL_ASSERT(false, "a pair of dtypes that csrc/aten lets pass and csrc/cpu does not know");
}

}  // namespace engine_fast
