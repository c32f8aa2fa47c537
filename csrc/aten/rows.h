// The five kernels on tensors, without allocations; and tiles, the stretches of rows that share one scratch buffer.
#pragma once

#include "aten/options.h"

namespace engine_fast {

void energy_rows(const Options& options, const Tensor& z, const Tensor& s, const Tensor& energy, const Tensor& stats);

// dz, ds: undefined = not wanted.
void energy_gradient_rows(const Options& options, const Tensor& grad, const Tensor& z, const Tensor& s,
                          const Tensor& stats, const Tensor& dz, const Tensor& ds);

void soft_rows(const Options& options, const Tensor& z, const Tensor& stats);

void carrier_rows(const Options& options, const Tensor& z, const Tensor& stats, int64_t first_column,
                  const Tensor& out);

// base: undefined = 0.
void carrier_gradient_rows(const Options& options, const Tensor& z, const Tensor& stats, const Tensor& dq,
                           const Tensor& base, const Tensor& out);

// per_tile(first row, rows) for n rows, `rows_per_tile` at a time.
template <typename F>
void for_tiles(int64_t rows_per_tile, int64_t n, const F& per_tile) {
  for (int64_t begin = 0; begin < n; begin += rows_per_tile) per_tile(begin, std::min(rows_per_tile, n - begin));
}

// Rows whose scratch fits the budget of the device, evened out over the tiles that n rows need.
int64_t rows_per_tile(const Tensor& like, int64_t n, int64_t bytes_per_row);

// sum over tiles of a' b, (columns of a, columns of b), and of column sums. In half precision each tile's product is
// rounded, and their sum is taken in float32.
class GradientSum {
 public:
  GradientSum(bool wanted, int64_t num_tiles) : wanted_(wanted), several_(num_tiles > 1) {}
  void add_product(const Tensor& a, const Tensor& b);
  void add_columns(const Tensor& a);
  // of that shape and kind, zeros if nothing was added; empty if not wanted
  Tensor result(at::IntArrayRef shape, const Tensor& like) const;

 private:
  void add(const Tensor& part);
  bool wanted_, several_;
  Tensor sum_;
};

}  // namespace engine_fast
