// The matrix that makes logits of hidden states, of a student or a teacher.
#pragma once

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "aten/options.h"

namespace engine_fast {

// h w' + b
struct Head {
  const char *hidden_name, *weight_name, *bias_name;
  const Tensor &hidden, &weight;
  const Maybe& bias;

  int64_t rows() const { return hidden.size(0); }
  int64_t words() const { return weight.size(0); }
  int64_t bytes_per_row() const { return words() * hidden.element_size(); }

  void check(const char* where) const {
    check_matrix(where, hidden_name, hidden, -1, -1, "(N, D) hidden states");
    check_matrix(where, weight_name, weight, -1, hidden.size(1),
                 "(V, D) with D = " + std::to_string(hidden.size(1)) + " as in " + hidden_name);
    check_like(where, weight_name, weight, hidden, hidden.scalar_type());
    if (!bias) return;
    check_like(where, bias_name, *bias, hidden, hidden.scalar_type());
    if (bias->dim() != 1 || bias->size(0) != words())
      refuse_shape(where, bias_name, *bias, "(" + std::to_string(words()) + ",), one for each word");
  }

  Tensor scratch(int64_t rows) const { return at::empty({rows, words()}, hidden.options()); }

  // Into out (count, V).
  void logits(int64_t begin, int64_t count, const Tensor& out) const {
    const Tensor h = hidden.narrow(0, begin, count);
    Tensor& z = const_cast<Tensor&>(out);
    if (bias)
      at::addmm_out(z, *bias, h, weight.t());
    else
      at::mm_out(z, h, weight.t());
  }
};

}  // namespace engine_fast
