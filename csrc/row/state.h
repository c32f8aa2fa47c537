// What a row, or a part of one, has told so far; parts merge in any grouping, so blocks of columns, vector lanes and
// threads all end in the same few numbers.
//
// c[v] = exp((x[v] - max x) * it), x = z + g the student's (perturbed) logits, it = 1 / temperature.
#pragma once

#include "portable.h"

namespace engine_fast {

// Of the student's logits alone.
template <typename A>
struct SoftState {
  A max = minus_infinity<A>();  // in the end NaN if one logit is
  A sum = 0;                    // sum_v c[v]
  int64_t argmax = 0;           // lowest index where x reaches max
};

// Of student and teacher.
template <typename A>
struct RowState {
  SoftState<A> z;
  A max_s = minus_infinity<A>();
  A sum_s = 0;  // sum_v exp(s[v] - max_s)
  A dot = 0;    // sum_v c[v] * (s[v] - max_s), over c[v] > 0
};

// The factor that moves a sum relative to `from` to one relative to `to`, to >= from.
template <typename A>
EF_HD A rescale(A from, A to, A inv_temperature) {
  return from == to ? A(1) : exp_of((from - to) * inv_temperature);  // equal also when both are infinite
}

template <typename A>
EF_HD SoftState<A> merge(const SoftState<A>& a, const SoftState<A>& b, A inv_temperature) {
  SoftState<A> m;
  m.max = max_of(a.max, b.max);
  m.sum = a.sum * rescale(a.max, m.max, inv_temperature) + b.sum * rescale(b.max, m.max, inv_temperature);
  m.argmax = a.max == b.max ? (a.argmax < b.argmax ? a.argmax : b.argmax) : (a.max > b.max ? a.argmax : b.argmax);
  return m;
}

template <typename A>
EF_HD RowState<A> merge(const RowState<A>& a, const RowState<A>& b, A inv_temperature) {
  RowState<A> m;
  m.z = merge(a.z, b.z, inv_temperature);
  m.max_s = max_of(a.max_s, b.max_s);
  m.sum_s = a.sum_s * rescale(a.max_s, m.max_s, A(1)) + b.sum_s * rescale(b.max_s, m.max_s, A(1));
  const A scale_a = rescale(a.z.max, m.z.max, inv_temperature), scale_b = rescale(b.z.max, m.z.max, inv_temperature);
  // A part that forbids every word of its own (sum = 0, or max_s = -inf) must not turn into 0 * inf.
  const A shift_a = unless_zero(a.z.sum, a.max_s == m.max_s ? A(0) : a.z.sum * (a.max_s - m.max_s));
  const A shift_b = unless_zero(b.z.sum, b.max_s == m.max_s ? A(0) : b.z.sum * (b.max_s - m.max_s));
  m.dot = unless_zero(scale_a, scale_a * (a.dot + shift_a)) + unless_zero(scale_b, scale_b * (b.dot + shift_b));
  return m;
}

// The saved scalars of one row, in the order of the `stats` tensors.
constexpr int kSoftStats = 3;    // max, sum, argmax
constexpr int kEnergyStats = 6;  // max, sum, argmax of z; max, sum of s; mean

template <typename A>
EF_HD void store(const SoftState<A>& state, A* stats) {
  stats[0] = state.max;
  stats[1] = state.sum;
  stats[2] = static_cast<A>(state.argmax);  // exact: csrc/aten/options.h bounds V by 2^24
}

// mean = <softmax((z + g) / temperature), s> - max_s
template <typename A>
EF_HD void store(const RowState<A>& state, A* stats) {
  store(state.z, stats);
  stats[3] = state.max_s;
  stats[4] = state.sum_s;
  stats[5] = unless_zero(state.z.sum, state.dot / state.z.sum);  // STL has no sum
}

// e = logsumexp(s) - <q, s>; s_at_argmax is s[argmax], read for a hard operator only.
template <typename A>
EF_HD A energy_of(const RowState<A>& state, bool hard, A s_at_argmax) {
  const A score = hard ? s_at_argmax - state.max_s : state.dot / state.z.sum;
  const A energy = log_of(state.sum_s) - score;
  return energy + (state.z.max - state.z.max);  // NaN where the student's row has NaN, +inf, or nothing but -inf
}

}  // namespace engine_fast
