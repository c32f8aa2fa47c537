// linear_argmax: see engine_fast/ops/reference.py for the definition and ops.cpp for the schema.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logaddexp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/sub.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "aten/head.h"
#include "aten/operators.h"
#include "aten/rows.h"
#include "checks.h"
#include "row/state.h"

namespace engine_fast {
namespace {

constexpr const char* kWhere = "linear_argmax";
// Of logits that exist at a time. Smaller than a training tile: what is read right after it was written should still be
// in a cache, and decoding runs in processes that share a machine (benchmarks/NOTES.md).
constexpr int64_t kLogitBytes = int64_t{16} << 20;
constexpr int64_t kMinRows = 32;

struct Run {
  int64_t begin, count;
};

// Forbidden words as stretches of adjacent columns; special symbols mostly are one or two.
std::vector<Run> runs_of(at::IntArrayRef forbidden, int64_t v) {
  std::vector<int64_t> words(forbidden.begin(), forbidden.end());
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  if (!words.empty() && (words.front() < 0 || words.back() >= v))
    refuse(kWhere, "forbidden", std::to_string(words.front() < 0 ? words.front() : words.back()),
           "words from 0 to " + std::to_string(v - 1));
  std::vector<Run> runs;
  for (const int64_t word : words) {
    if (!runs.empty() && runs.back().begin + runs.back().count == word)
      ++runs.back().count;
    else
      runs.push_back({word, 1});
  }
  return runs;
}

// Takes the forbidden words out of z and returns the logsumexp that goes with them, (n,).
Tensor take_out(const Tensor& z, const std::vector<Run>& runs) {
  std::vector<Tensor> columns;
  for (const Run& run : runs) columns.push_back(z.narrow(1, run.begin, run.count));
  const Tensor taken = at::cat(columns, 1).to(accumulation_type(z));
  for (const Tensor& column : columns) column.fill_(minus_infinity<double>());
  return at::logsumexp(taken, 1);
}

}  // namespace

std::tuple<Tensor, Tensor> linear_argmax(const Tensor& h, const Tensor& w, const Maybe& b, at::IntArrayRef forbidden) {
  const Head head{"h", "w", "bias", h, w, b};
  head.check(kWhere);
  const int64_t n = head.rows(), v = head.words();
  const Options options(kWhere, h, n, v, {}, {}, {}, {}, /*hard=*/true, /*identity=*/false, /*temperature=*/1.0);
  const std::vector<Run> runs = runs_of(forbidden, v);
  const Scope scope(h);
  const Tensor value = at::empty({n}, h.options().dtype(accumulation_type(h)));
  const Tensor word = at::empty({n}, h.options().dtype(at::kLong));
  const int64_t fits = std::max(kMinRows, kLogitBytes / std::max<int64_t>(1, head.bytes_per_row()));
  const int64_t tiles = std::max<int64_t>(1, (n + fits - 1) / fits), step = (n + tiles - 1) / tiles;
  const Tensor z = head.scratch(step), stats = at::empty({step, kSoftStats}, value.options());
  for_tiles(std::max<int64_t>(1, step), n, [&](int64_t begin, int64_t count) {
    const Tensor tile = z.narrow(0, 0, count), found = stats.narrow(0, 0, count);
    head.logits(begin, count, tile);
    const Tensor taken = runs.empty() ? Tensor() : take_out(tile, runs);
    soft_rows(options, tile, found);
    const Tensor max = found.select(1, 0);
    Tensor below = found.select(1, 1).log();  // logsumexp - max: of the allowed words, then of all
    if (taken.defined()) below = at::logaddexp(below, at::sub(taken, max));
    value.narrow(0, begin, count).copy_(below.neg_());
    word.narrow(0, begin, count).copy_(found.select(1, 2));
  });
  return {value, word};
}

}  // namespace engine_fast
