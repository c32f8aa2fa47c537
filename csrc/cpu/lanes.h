// Vector lanes of a CPU: the functions of row/portable.h for a pair of at::vec vectors, and loads and stores that turn
// any storage type into the accumulation type. A pair, because one bfloat16 vector widens to two of float32.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <type_traits>

#include "row/portable.h"

namespace engine_fast {

template <typename A>
using Vec = at::vec::Vectorized<A>;

template <typename A>
struct Pair {
  Vec<A> lo, hi;

  Pair() = default;
  Pair(Vec<A> lo, Vec<A> hi) : lo(lo), hi(hi) {}
  Pair(A value) : lo(value), hi(value) {}  // implicit: row scalars meet lanes in every formula

  friend Pair operator+(const Pair& a, const Pair& b) { return {a.lo + b.lo, a.hi + b.hi}; }
  friend Pair operator-(const Pair& a, const Pair& b) { return {a.lo - b.lo, a.hi - b.hi}; }
  friend Pair operator*(const Pair& a, const Pair& b) { return {a.lo * b.lo, a.hi * b.hi}; }
  static constexpr int64_t size() { return 2 * Vec<A>::size(); }
};

// exp x for x <= 0 or NaN, within 2 ulp; results below 2^-126 are 0. Unlike at::vec's exp it is no call into a library,
// around which every accumulator would be spilled: half the time of a row.
EF_HD Vec<float> exp_of(const Vec<float>& x) {
  using V = Vec<float>;
  const V shift(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V n = at::vec::fmadd(x, V(1.44269504f), shift) - shift;
  const V r = at::vec::fmadd(n, V(-1.42860677e-6f), at::vec::fmadd(n, V(-0.693145752f), x));
  V p(1.9875691500e-4f);  // coefficients of Cephes' expf
  p = at::vec::fmadd(p, r, V(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, V(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, V(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, V(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, V(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r + V(1.0f));
  constexpr float least = -126.0f * 0.6931472f;
#if defined(CPU_CAPABILITY_AVX512)
  return V(_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_NLT_UQ), p, n));
#else
  const auto exponent = (at::vec::convert_to_int_of_same_size(n) + Vec<int32_t>(127)) << Vec<int32_t>(23);
  return V::blendv(p * at::vec::cast<float>(exponent), V(0.0f), x < V(least));
#endif
}
EF_HD Vec<double> exp_of(const Vec<double>& x) { return x.exp(); }

template <typename A>
EF_HD Pair<A> exp_of(const Pair<A>& x) {
  return {exp_of(x.lo), exp_of(x.hi)};
}

// A NaN weight compares unequal to 0 and so keeps the value, as in the scalar form.
template <typename A>
EF_HD Vec<A> unless_zero(const Vec<A>& weight, const Vec<A>& value) {
  return Vec<A>::blendv(value, Vec<A>(A(0)), weight == Vec<A>(A(0)));
}
template <typename A>
EF_HD Pair<A> unless_zero(const Pair<A>& weight, const Pair<A>& value) {
  return {unless_zero(weight.lo, value.lo), unless_zero(weight.hi, value.hi)};
}

template <typename A>
EF_HD Pair<A> unless_forbidden(const Pair<A>& logit, const Pair<A>& value) {
  const Vec<A> forbidden(minus_infinity<A>()), zero(A(0));
  return {Vec<A>::blendv(value.lo, zero, logit.lo == forbidden), Vec<A>::blendv(value.hi, zero, logit.hi == forbidden)};
}

// max(so_far, x) where x is no NaN, else so_far: one instruction.
template <typename A>
EF_HD Pair<A> max_but_nan(const Pair<A>& so_far, const Pair<A>& x) {
  return {at::vec::clamp_min(so_far.lo, x.lo), at::vec::clamp_min(so_far.hi, x.hi)};
}

template <typename A>
EF_HD A sum_lanes(const Pair<A>& x) {
  return at::vec::vec_reduce_all<A>([](const Vec<A>& a, const Vec<A>& b) { return a + b; }, x.lo + x.hi);
}
template <typename A>
EF_HD A max_lanes(const Pair<A>& x) {
  return at::vec::vec_reduce_all<A>([](const Vec<A>& a, const Vec<A>& b) { return at::vec::maximum(a, b); },
                                    at::vec::maximum(x.lo, x.hi));
}

// body(i, lanes) along `count` elements: all but the last call with the constant Pair<A>::size().
template <typename A, typename F>
EF_HD void for_lanes(int64_t count, const F& body) {
  constexpr int64_t width = Pair<A>::size();
  int64_t i = 0;
  for (; i + width <= count; i += width) body(i, width);
  if (i < count) body(i, count - i);
}
#define EF_LANES(i, lanes) [&](int64_t i, int64_t lanes) __attribute__((always_inline))

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// `count` elements from `data`, in the accumulation type; lanes beyond them hold `fill`.
template <typename A, typename T>
EF_HD Pair<A> load(const T* data, int64_t count = Pair<A>::size(), A fill = A(0)) {
  constexpr int64_t half = Vec<A>::size();
  const bool whole = count >= Pair<A>::size();
  Pair<A> x;
  if constexpr (std::is_same_v<T, A>) {
    if (whole) return {Vec<A>::loadu(data), Vec<A>::loadu(data + half)};
    const int64_t low = std::min(count, half);
    x = {Vec<A>::loadu(data, low), count > half ? Vec<A>::loadu(data + half, count - half) : Vec<A>(fill)};
  } else {
    static_assert(std::is_same_v<T, c10::BFloat16> && std::is_same_v<A, float>);
    const auto narrow = whole ? Vec<T>::loadu(data) : Vec<T>::loadu(data, count);
    std::tie(x.lo, x.hi) = at::vec::convert_bfloat16_float(narrow);
    if (whole) return x;
  }
  x.lo = Vec<A>::set(Vec<A>(fill), x.lo, std::min(count, half));
  x.hi = Vec<A>::set(Vec<A>(fill), x.hi, std::max<int64_t>(count - half, 0));
  return x;
}

template <typename A, typename T>
EF_HD void store(const Pair<A>& x, T* data, int64_t count = Pair<A>::size()) {
  constexpr int64_t half = Vec<A>::size();
  if constexpr (std::is_same_v<T, A>) {
    if (count >= Pair<A>::size()) {
      x.lo.store(data);
      x.hi.store(data + half);
    } else {
      x.lo.store(data, std::min(count, half));
      if (count > half) x.hi.store(data + half, count - half);
    }
  } else {
    at::vec::convert_float_bfloat16(x.lo, x.hi).store(data, std::min(count, Pair<A>::size()));
  }
}

}  // namespace engine_fast
