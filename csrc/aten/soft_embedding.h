// O(z) times a table, for rows of logits that exist: used by soft_embedding and by its linear form.
#pragma once

#include "aten/rows.h"

namespace engine_fast {

// x (n, D) = O(z) @ table, table's dtype, and the statistics of z (n, kSoftStats). q: scratch (n, columns) of the
// table's dtype, adjacent rows; as much of the softmax exists at a time. May be z itself, which is lost then.
void embed_rows(const Options& options, const Tensor& z, const Tensor& table, const Tensor& x, const Tensor& stats,
                const Tensor& q);

// Scratch for it that is small beside (n, V): no rows of it for a hard operator.
Tensor softmax_scratch(const Options& options, int64_t n, int64_t v, const Tensor& table);

// out (n, V) = base + gradient of embed_rows through O to z; base undefined = 0. dq: scratch of the table's dtype, may
// be out. out may be z or dq.
void embed_gradient_rows(const Options& options, const Tensor& grad, const Tensor& z, const Tensor& table,
                         const Tensor& stats, const Tensor& dq, const Tensor& base, const Tensor& out);

// dtable (V, D), accumulation type, += O(z)' @ grad
void embed_table_gradient(const Options& options, const Tensor& grad, const Tensor& z, const Tensor& stats,
                          const Tensor& dtable);

}  // namespace engine_fast
