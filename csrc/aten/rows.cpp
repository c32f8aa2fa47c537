#include "aten/rows.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "backend.h"
#include "row/state.h"

namespace engine_fast {
namespace {

// A tile's scratch. CPU: large enough for the matrix products to run at full speed (512 rows of 32000 words, twice;
// benchmarks/NOTES.md), and the same for every vocabulary. CUDA: not measured yet.
constexpr int64_t kTileBytesCPU = int64_t{128} << 20, kTileBytesCUDA = int64_t{64} << 20;
constexpr int64_t kRowMultiple = 32;

Matrix maybe_matrix(const Tensor& x) { return x.defined() ? matrix_of(x) : Matrix{}; }

const Backend& backend(const Tensor& z) { return backend_of(z.device().type()); }

}  // namespace

void energy_rows(const Options& options, const Tensor& z, const Tensor& s, const Tensor& energy, const Tensor& stats) {
  backend(z).energy_forward(
      {options.student(z), matrix_of(s), options.weight(), energy.data_ptr(), stats.data_ptr()});
}

void energy_gradient_rows(const Options& options, const Tensor& grad, const Tensor& z, const Tensor& s,
                          const Tensor& stats, const Tensor& dz, const Tensor& ds) {
  backend(z).energy_backward({options.student(z), matrix_of(s), options.weight(), grad.const_data_ptr(),
                              stats.const_data_ptr(), maybe_matrix(dz), maybe_matrix(ds)});
}

void soft_rows(const Options& options, const Tensor& z, const Tensor& stats) {
  backend(z).soft_forward({options.student(z), stats.data_ptr()});
}

void carrier_rows(const Options& options, const Tensor& z, const Tensor& stats, int64_t first_column,
                  const Tensor& out) {
  backend(z).carrier({options.student(z), stats.const_data_ptr(), first_column, out.size(1), matrix_of(out)});
}

void carrier_gradient_rows(const Options& options, const Tensor& z, const Tensor& stats, const Tensor& dq,
                           const Tensor& base, const Tensor& out) {
  backend(z).carrier_backward(
      {options.student(z), stats.const_data_ptr(), matrix_of(dq), maybe_matrix(base), matrix_of(out)});
}

int64_t rows_per_tile(const Tensor& like, int64_t n, int64_t bytes_per_row) {
  const int64_t budget = like.device().is_cpu() ? kTileBytesCPU : kTileBytesCUDA;
  const int64_t most = std::max(kRowMultiple, budget / std::max<int64_t>(1, bytes_per_row));
  const int64_t tiles = std::max<int64_t>(1, (n + most - 1) / most);
  const int64_t even = (n + tiles - 1) / tiles;
  return tiles == 1 ? std::max<int64_t>(1, n) : std::min(most, (even + kRowMultiple - 1) / kRowMultiple * kRowMultiple);
}

void GradientSum::add_product(const Tensor& a, const Tensor& b) {
  if (!wanted_) return;
  const bool wide = a.scalar_type() == accumulation_type(a);
  if (!sum_.defined() && (wide || !several_)) {
    sum_ = at::mm(a.t(), b);
  } else if (wide) {
    sum_.addmm_(a.t(), b);
  } else {
    add(at::mm(a.t(), b));
  }
}

void GradientSum::add_columns(const Tensor& a) {
  if (wanted_) add(at::sum(a, 0, false, accumulation_type(a)));
}

void GradientSum::add(const Tensor& part) {
  if (sum_.defined())
    sum_.add_(part);
  else
    sum_ = part.to(accumulation_type(part));
}

Tensor GradientSum::result(at::IntArrayRef shape, const Tensor& like) const {
  if (!wanted_) return at::empty({0}, like.options());
  return sum_.defined() ? sum_.to(like.scalar_type()) : at::zeros(shape, like.options());
}

}  // namespace engine_fast
