// What lets one piece of arithmetic run on a CPU, on its vector lanes and on a GPU.
//
// The headers of csrc/row are templates over a lane type F: float or double here, at::vec::Vectorized in
// csrc/cpu/lanes.h, which adds the same functions for it. They know neither torch nor CUDA's runtime.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define EF_HD __host__ __device__ __forceinline__
#else
#define EF_HD inline __attribute__((always_inline))
#endif

namespace engine_fast {

EF_HD float exp_of(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);  // arguments are differences from a maximum, where its error is that of the product with log2(e)
#else
  return std::exp(x);
#endif
}
EF_HD double exp_of(double x) { return ::exp(x); }
EF_HD float log_of(float x) { return ::logf(x); }
EF_HD double log_of(double x) { return ::log(x); }

// value where weight is not zero, 0 elsewhere: keeps 0 * infinity, a forbidden word, out of sums.
EF_HD float unless_zero(float weight, float value) { return weight == 0.0f ? 0.0f : value; }
EF_HD double unless_zero(double weight, double value) { return weight == 0.0 ? 0.0 : value; }

// value where the logit is not -inf, 0 elsewhere.
EF_HD float unless_forbidden(float logit, float value) {
  return logit == -std::numeric_limits<float>::infinity() ? 0.0f : value;
}
EF_HD double unless_forbidden(double logit, double value) {
  return logit == -std::numeric_limits<double>::infinity() ? 0.0 : value;
}

// NaN if either is.
template <typename A>
EF_HD A max_of(A a, A b) {
  return (a > b || a != a) ? a : b;
}

template <typename A>
EF_HD constexpr A minus_infinity() {
  return -std::numeric_limits<A>::infinity();
}

}  // namespace engine_fast
