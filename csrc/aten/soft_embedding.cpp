// soft_embedding(z, table): see engine_fast/ops/reference.py for the definition and ops.cpp for the schemas.
#include "aten/soft_embedding.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_put.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "aten/operators.h"
#include "row/state.h"

namespace engine_fast {
namespace {

constexpr const char* kWhere = "soft_embedding";
// Of the softmax that exist at a time. A tile has all rows and some of the words, so that the table is packed once.
constexpr int64_t kScratchElements = int64_t{1} << 20;
constexpr int64_t kMinColumns = 512;
constexpr int64_t kMaxRoundedParts = 8;  // of a half-precision product: each adds a rounding

int64_t scratch_columns(int64_t n, int64_t v, bool rounds) {
  const int64_t least = rounds ? std::max(kMinColumns, (v + kMaxRoundedParts - 1) / kMaxRoundedParts) : kMinColumns;
  return std::min(v, std::max(least, kScratchElements / std::max<int64_t>(1, n)));
}

// per_chunk(first column, columns)
template <typename F>
void for_chunks(int64_t step, int64_t v, const F& per_chunk) {
  for (int64_t begin = 0; begin < v; begin += step) per_chunk(begin, std::min(step, v - begin));
}

// The first `columns` columns' worth of q's memory.
Tensor narrow_scratch(const Tensor& q, int64_t n, int64_t columns) {
  return columns == q.size(1) ? q : q.view(-1).narrow(0, 0, n * columns).view({n, columns});
}

Tensor words_of(const Tensor& stats) { return stats.select(1, 2).to(at::kLong); }

Tensor ignored_zeroed(const Options& options, const Tensor& grad) {
  return options.ignore() ? grad.masked_fill(options.ignore()->unsqueeze(1), 0) : grad;
}

void check(const Tensor& z, const Tensor& table) {
  check_matrix(kWhere, "z", z, -1, -1, "(N, V) logits");
  check_matrix(kWhere, "table", table, z.size(1), -1, "(V, D) with V = " + std::to_string(z.size(1)) + " as in z");
  check_dtypes(kWhere, "z", z, "table", table);
}

}  // namespace

Tensor softmax_scratch(const Options& options, int64_t n, int64_t v, const Tensor& table) {
  const bool rounds = table.scalar_type() != accumulation_type(table);
  return at::empty({options.hard() ? 0 : n, scratch_columns(n, v, rounds)}, table.options());
}

void embed_rows(const Options& options, const Tensor& z, const Tensor& table, const Tensor& x, const Tensor& stats,
                const Tensor& q) {
  soft_rows(options, z, stats);
  if (options.hard()) {
    at::index_select_out(const_cast<Tensor&>(x), table, 0, words_of(stats));
    const Tensor max = stats.select(1, 0);
    x.add_(at::sub(max, max).unsqueeze(1).to(x.scalar_type()));  // 0, or NaN for a row of which nothing can be said
    if (options.ignore()) x.masked_fill_(options.ignore()->unsqueeze(1), 0);
    return;
  }
  const int64_t n = z.size(0), v = z.size(1), step = q.size(1);
  const bool at_once = step >= v || x.scalar_type() == accumulation_type(x);
  // Parts of a half-precision product are rounded each, and added up in float32.
  Tensor sum = at_once ? x : at::zeros(x.sizes(), x.options().dtype(accumulation_type(x)));
  for_chunks(step, v, [&](int64_t begin, int64_t columns) {
    const Tensor part = narrow_scratch(q, n, columns), rows = table.narrow(0, begin, columns);
    carrier_rows(options, z, stats, begin, part);
    if (at_once)
      at::addmm_out(sum, sum, part, rows, begin == 0 ? 0 : 1, 1);
    else
      sum.add_(at::mm(part, rows));
  });
  if (!at_once) x.copy_(sum);
}

void embed_gradient_rows(const Options& options, const Tensor& grad, const Tensor& z, const Tensor& table,
                         const Tensor& stats, const Tensor& dq, const Tensor& base, const Tensor& out) {
  at::mm_out(const_cast<Tensor&>(dq), grad, table.t());
  carrier_gradient_rows(options, z, stats, dq, base, out);
}

void embed_table_gradient(const Options& options, const Tensor& grad, const Tensor& z, const Tensor& stats,
                          const Tensor& dtable) {
  const Tensor du = ignored_zeroed(options, grad);  // 0 * infinity would be NaN
  if (options.hard()) {
    const Tensor rows = du.to(dtable.scalar_type());
    if (dtable.device().is_cpu())
      dtable.index_add_(0, words_of(stats), rows);
    else  // index_add_ adds in any order on a GPU; this one sorts
      at::index_put_(const_cast<Tensor&>(dtable), {words_of(stats)}, rows, /*accumulate=*/true);
    return;
  }
  const int64_t n = z.size(0), v = z.size(1);
  const Tensor scratch = softmax_scratch(options, n, v, du);
  for_chunks(scratch.size(1), v, [&](int64_t begin, int64_t columns) {
    const Tensor q = narrow_scratch(scratch, n, columns);
    carrier_rows(options, z, stats, begin, q);
    Tensor rows = dtable.narrow(0, begin, columns);
    if (du.scalar_type() == dtable.scalar_type())
      rows.addmm_(q.t(), du);
    else
      rows.add_(at::mm(q.t(), du));
  });
}

std::tuple<Tensor, Tensor> soft_embedding(const Tensor& z, const Tensor& table, const Maybe& noise, const Maybe& seed,
                                          const Maybe& ignore, bool hard, bool identity, double temperature) {
  check(z, table);
  const Options options(kWhere, z, z.size(0), z.size(1), noise, seed, {}, ignore, hard, identity, temperature);
  const Scope scope(z);
  const Tensor x = at::empty({z.size(0), table.size(1)}, table.options());
  const Tensor stats = at::empty({z.size(0), kSoftStats}, z.options().dtype(accumulation_type(z)));
  embed_rows(options, with_adjacent_columns(z), table, x, stats, softmax_scratch(options, z.size(0), z.size(1), table));
  return {x, stats};
}

std::tuple<Tensor, Tensor> soft_embedding_backward(const Tensor& grad, const Tensor& z, const Tensor& table,
                                                   const Tensor& stats, const Maybe& noise, const Maybe& seed,
                                                   const Maybe& ignore, bool hard, bool identity, double temperature,
                                                   bool need_z, bool need_table) {
  check(z, table);
  check_matrix(kWhere, "grad", grad, z.size(0), table.size(1), "(N, D), the shape of the result");
  check_matrix(kWhere, "stats", stats, z.size(0), kSoftStats, "the second result of the forward pass");
  check_like(kWhere, "grad", grad, z, table.scalar_type());
  check_like(kWhere, "stats", stats, z, accumulation_type(z));
  const Options options(kWhere, z, z.size(0), z.size(1), noise, seed, {}, ignore, hard, identity, temperature);
  const Scope scope(z);
  const Tensor rows = with_adjacent_columns(z), saved = stats.contiguous();
  const int64_t n = z.size(0), v = z.size(1);
  Tensor dz = at::empty({0}, z.options()), dtable = at::empty({0}, table.options());
  if (need_z) {
    dz = at::empty({n, v}, z.options());
    const bool same = z.scalar_type() == table.scalar_type();
    const int64_t step = same ? std::max<int64_t>(1, n) : rows_per_tile(z, n, v * table.element_size());
    const Tensor scratch = same ? Tensor() : at::empty({step, v}, table.options());
    for_tiles(step, n, [&](int64_t begin, int64_t count) {
      const auto part = [&](const Tensor& x) { return x.narrow(0, begin, count); };
      const Tensor out = part(dz), dq = same ? out : scratch.narrow(0, 0, count);
      embed_gradient_rows(options.rows(begin, count), part(grad), part(rows), table, part(saved), dq, Tensor(), out);
    });
  }
  if (need_table) {
    dtable = at::zeros(table.sizes(), table.options().dtype(accumulation_type(table)));
    embed_table_gradient(options, grad, rows, saved, dtable);
    dtable = dtable.to(table.scalar_type());
  }
  return {dz, dtable};
}

}  // namespace engine_fast
