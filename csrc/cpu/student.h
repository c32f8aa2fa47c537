// Statistics of the student's logits, on a CPU: what the energy and the soft embedding have in common.
#pragma once

#include "cpu/rows.h"
#include "row/state.h"

namespace engine_fast::cpu {

// What sums are taken relative to: the maximum, or anything finite where a block forbids all its words.
template <typename A>
A origin(A max) {
  return max == minus_infinity<A>() ? A(0) : max;
}

// max of x = z + g over one block, leaving NaN out, and where the block begins; find_argmax makes an index of that.
template <typename A, typename Z>
SoftState<A> largest(const Z* z, const A* noise, int64_t count, int64_t first_column) {
  constexpr A low = minus_infinity<A>();
  Pair<A> lanes(low);
  for_lanes<A>(count, EF_LANES(i, n) { lanes = max_but_nan(lanes, perturbed(z, noise, i, n, low)); });
  SoftState<A> block;
  block.max = max_lanes(lanes);
  block.argmax = first_column;
  return block;
}

// block.sum: NaN if a logit is.
template <typename A, typename Z>
void add_up(const Z* z, const A* noise, int64_t count, A inv_temperature, SoftState<A>& block) {
  const Pair<A> max(origin(block.max)), scale(inv_temperature);
  Pair<A> sum(A(0));
  for_lanes<A>(count, EF_LANES(i, n) {
    fetch_ahead<A>(z + i);
    sum = sum + exp_of((perturbed(z, noise, i, n, minus_infinity<A>()) - max) * scale);
  });
  block.sum = sum_lanes(sum);
}

// 0, or NaN where x is NaN or +inf.
template <typename A>
EF_HD Pair<A> nan_of(const Pair<A>& x) {
  return unless_forbidden(x, x - x);
}

// block.sum for an operator without a softmax: 0, or NaN if a logit is.
template <typename A, typename Z>
void look_for_nan(const Z* z, const A* noise, int64_t count, SoftState<A>& block) {
  Pair<A> sum(A(0));
  for_lanes<A>(count, EF_LANES(i, n) {
    fetch_ahead<A>(z + i);
    sum = sum + nan_of(perturbed(z, noise, i, n));
  });
  block.sum = sum_lanes(sum);
}

// state.argmax: from the first column of the block that holds the maximum to the first column that equals it.
template <typename A, typename Z>
void find_argmax(const Student& student, int64_t row, SoftState<A>& state) {
  if (state.sum != state.sum) state.max = state.sum;  // NaN from here on
  const Z* z = row_of<Z>(student.z, row);
  const int64_t first = state.argmax;
  for_blocks<A>(student, row, first, std::min(kBlock, student.v - first), [&](int64_t begin, int64_t count, const A* noise) {
    const Pair<A> max(state.max);
    for (int64_t i = 0; i < count; i += Pair<A>::size()) {
      const Pair<A> below = perturbed(z + begin, noise, i, count - i, minus_infinity<A>()) - max;  // of -inf: NaN
      const int lo = below.lo.zero_mask(), hi = below.hi.zero_mask();
      if ((lo | hi) == 0) continue;
      state.argmax = first + i + (lo != 0 ? __builtin_ctz(lo) : Vec<A>::size() + __builtin_ctz(hi));
      return;
    }
  });
}

}  // namespace engine_fast::cpu
