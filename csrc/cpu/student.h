// Statistics of the student's logits, on a CPU: what the energy and the soft embedding have in common.
#pragma once

#include "cpu/rows.h"
#include "row/state.h"

namespace engine_fast::cpu {

// max of x = z + g over one block, and where the block begins; find_argmax makes an index of the latter.
template <typename A, typename Z>
SoftState<A> largest(const Z* z, const A* noise, int64_t count, int64_t first_column) {
  constexpr A low = minus_infinity<A>();
  Pair<A> lanes(low);
  for (int64_t i = 0; i < count; i += Pair<A>::size()) lanes = max_of(lanes, perturbed(z, noise, i, count - i, low));
  SoftState<A> block;
  block.max = max_lanes(lanes);
  block.argmax = first_column;
  return block;
}

// block.sum; block.max must be above -inf, or the sum stays 0.
template <typename A, typename Z>
void add_up(const Z* z, const A* noise, int64_t count, A inv_temperature, SoftState<A>& block) {
  if (block.max == minus_infinity<A>()) return;
  const Pair<A> max(block.max), scale(inv_temperature);
  Pair<A> sum(A(0));
  for (int64_t i = 0; i < count; i += Pair<A>::size())
    sum = sum + exp_of((perturbed(z, noise, i, count - i, minus_infinity<A>()) - max) * scale);
  block.sum = sum_lanes(sum);
}

// state.argmax: from the first column of the block that holds the maximum to the first column that equals it.
template <typename A, typename Z>
void find_argmax(const Student& student, int64_t row, SoftState<A>& state) {
  const Z* z = row_of<Z>(student.z, row);
  const int64_t first = state.argmax;
  for_blocks<A>(student, row, first, std::min(kBlock, student.v - first), [&](int64_t begin, int64_t count, const A* noise) {
    const Pair<A> max(state.max);
    for (int64_t i = 0; i < count; i += Pair<A>::size()) {
      const Pair<A> below = perturbed(z + begin, noise, i, count - i, minus_infinity<A>()) - max;
      const int lo = below.lo.zero_mask(), hi = below.hi.zero_mask();
      if ((lo | hi) == 0) continue;
      state.argmax = first + i + (lo != 0 ? __builtin_ctz(lo) : Vec<A>::size() + __builtin_ctz(hi));
      return;
    }
  });
}

}  // namespace engine_fast::cpu
