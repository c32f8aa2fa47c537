// Values and gradients of one element, from the row's saved scalars. F is a lane type, A its scalar.
#pragma once

#include "portable.h"

namespace engine_fast {

// softmax((x - max) / temperature), inv_sum = 1 / sum
template <typename F>
EF_HD F carrier(F x, F max, F inv_sum, F inv_temperature) {
  return exp_of((x - max) * inv_temperature) * inv_sum;
}

// ds without the one-hot part of a hard q: u * softmax(s)
template <typename F>
EF_HD F teacher_gradient(F s, F max_s, F u_over_sum_s) {
  return exp_of(s - max_s) * u_over_sum_s;
}

// dz through a softmax: u c (mean - s) / temperature, with mean and s both relative to max_s. 0 where c = 0.
template <typename F>
EF_HD F softmax_gradient(F c, F s_minus_max, F mean, F u_over_temperature) {
  return unless_zero(c, c * ((mean - s_minus_max) * u_over_temperature));
}

// dz through the identity: u (logsumexp(s) - s). 0 where x = -inf: a word that z forbids stays forbidden.
template <typename F>
EF_HD F identity_gradient(F x, F s_minus_max, F log_sum_s, F u) {
  return unless_forbidden(x, (log_sum_s - s_minus_max) * u);
}

// dz of a soft embedding: c (dq - <c, dq>) / temperature
template <typename F>
EF_HD F embedding_gradient(F c, F dq, F mean_dq, F inv_temperature) {
  return unless_zero(c, c * ((dq - mean_dq) * inv_temperature));
}

}  // namespace engine_fast
