// energy(z, s): see engine_fast/ops/reference.py for the definition and ops.cpp for the schemas.
#include <ATen/ops/empty.h>

#include "aten/operators.h"
#include "aten/rows.h"
#include "row/state.h"

namespace engine_fast {
namespace {

constexpr const char* kWhere = "energy";

Options checked(const Tensor& z, const Tensor& s, const Maybe& noise, const Maybe& seed, const Maybe& weight,
                const Maybe& ignore, bool hard, bool identity, double temperature) {
  check_matrix(kWhere, "z", z, -1, -1, "(N, V) logits");
  check_matrix(kWhere, "s", s, z.size(0), z.size(1), "the shape of z");
  check_dtypes(kWhere, "z", z, "s", s);
  return {kWhere, z, z.size(0), z.size(1), noise, seed, weight, ignore, hard, identity, temperature};
}

Tensor checked_grad(const Tensor& grad, const Tensor& z) {
  check_device(kWhere, "grad", grad, z);
  if (grad.dim() != 1 || grad.size(0) != z.size(0)) refuse_shape(kWhere, "grad", grad, "(N,), one per row");
  return grad.to(accumulation_type(z)).contiguous();
}

void check_stats(const Tensor& stats, const Tensor& z) {
  check_matrix(kWhere, "stats", stats, z.size(0), kEnergyStats, "the second result of the forward pass");
  check_like(kWhere, "stats", stats, z, accumulation_type(z));
}

}  // namespace

std::tuple<Tensor, Tensor> energy(const Tensor& z, const Tensor& s, const Maybe& noise, const Maybe& seed,
                                  const Maybe& weight, const Maybe& ignore, bool hard, bool identity,
                                  double temperature, bool /*overwrite*/) {
  const Options options = checked(z, s, noise, seed, weight, ignore, hard, identity, temperature);
  const Scope scope(z);
  const auto wide = z.options().dtype(accumulation_type(z));
  const Tensor energy = at::empty({z.size(0)}, wide), stats = at::empty({z.size(0), kEnergyStats}, wide);
  energy_rows(options, with_adjacent_columns(z), with_adjacent_columns(s), energy, stats);
  return {energy, stats};
}

std::tuple<Tensor, Tensor> energy_backward(const Tensor& grad, const Tensor& z, const Tensor& s, const Tensor& stats,
                                           const Maybe& noise, const Maybe& seed, const Maybe& weight,
                                           const Maybe& ignore, bool hard, bool identity, double temperature,
                                           bool need_z, bool need_s) {
  const Options options = checked(z, s, noise, seed, weight, ignore, hard, identity, temperature);
  check_stats(stats, z);
  const Scope scope(z);
  const Tensor dz = need_z ? at::empty(z.sizes(), z.options()) : Tensor();
  const Tensor ds = need_s ? at::empty(s.sizes(), s.options()) : Tensor();
  energy_gradient_rows(options, checked_grad(grad, z), with_adjacent_columns(z), with_adjacent_columns(s),
                       stats.contiguous(), dz, ds);
  const auto or_empty = [](const Tensor& x, const Tensor& like) {
    return x.defined() ? x : at::empty({0}, like.options());
  };
  return {or_empty(dz, z), or_empty(ds, s)};
}

void energy_backward_(const Tensor& grad, const Tensor& z, const Tensor& s, const Tensor& stats, const Maybe& noise,
                      const Maybe& seed, const Maybe& weight, const Maybe& ignore, bool hard, bool identity,
                      double temperature, const Maybe& dz, const Maybe& ds) {
  const Options options = checked(z, s, noise, seed, weight, ignore, hard, identity, temperature);
  check_stats(stats, z);
  for (const auto& [name, out, like] : {std::tuple{"dz", dz, z}, std::tuple{"ds", ds, s}}) {
    if (!out) continue;
    check_matrix(kWhere, name, *out, z.size(0), z.size(1), "the shape of z");
    check_like(kWhere, name, *out, z, like.scalar_type());
    const bool whole = (out->stride(1) == 1 || out->size(1) <= 1) && (out->stride(0) >= out->size(1) || out->size(0) <= 1);
    if (!whole) refuse_shape(kWhere, name, *out, "a matrix with adjacent columns and rows apart");
    out->unsafeGetTensorImpl()->bump_version();  // whoever saved it for a backward pass is told
  }
  const Scope scope(z);
  energy_gradient_rows(options, checked_grad(grad, z), with_adjacent_columns(z), with_adjacent_columns(s),
                       stats.contiguous(), dz ? *dz : Tensor(), ds ? *ds : Tensor());
}

}  // namespace engine_fast
