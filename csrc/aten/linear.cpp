// The forms that own the heads: logits exist for one tile of rows at a time, or are kept once where asked for.
// See engine_fast/ops/reference.py for the definitions and ops.cpp for the schemas.
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <array>

#include "aten/head.h"
#include "aten/operators.h"
#include "aten/soft_embedding.h"
#include "checks.h"
#include "row/state.h"

namespace engine_fast {
namespace {

// The gradients of one head, gathered over tiles. needs: hidden, weight, bias.
class HeadGradients {
 public:
  HeadGradients(const Head& head, std::array<bool, 3> needs, int64_t num_tiles)
      : head_(head), weight_(needs[1], num_tiles), bias_(needs[2], num_tiles), any_(needs[0] || needs[1] || needs[2]) {
    if (needs[0]) hidden_ = at::empty(head.hidden.sizes(), head.hidden.options());
  }

  bool any() const { return any_; }

  void add(int64_t begin, const Tensor& dlogits) {
    const int64_t count = dlogits.size(0);
    if (hidden_.defined()) {
      Tensor out = hidden_.narrow(0, begin, count);
      at::mm_out(out, dlogits, head_.weight);
    }
    weight_.add_product(dlogits, head_.hidden.narrow(0, begin, count));
    bias_.add_columns(dlogits);
  }

  Tensor hidden() const { return hidden_.defined() ? hidden_ : at::empty({0}, head_.hidden.options()); }
  Tensor weight() const { return weight_.result(head_.weight.sizes(), head_.weight); }
  Tensor bias() const { return bias_.result({head_.words()}, head_.weight); }

 private:
  const Head& head_;
  Tensor hidden_;
  GradientSum weight_, bias_;
  bool any_;
};

void check_heads(const char* where, const Head& student, const Head& teacher) {
  student.check(where);
  teacher.check(where);
  if (teacher.rows() != student.rows())
    refuse_shape(where, teacher.hidden_name, teacher.hidden, std::to_string(student.rows()) + " rows as in h_student");
  if (teacher.words() != student.words())
    refuse_shape(where, teacher.weight_name, teacher.weight, std::to_string(student.words()) + " words as in w_student");
  check_dtypes(where, student.hidden_name, student.hidden, teacher.hidden_name, teacher.hidden);
}

void check_needs(const char* where, const c10::List<bool>& needs, size_t count) {
  if (needs.size() != count)
    TORCH_CHECK_VALUE(false, where, ": needs = ", needs.size(), " flags, expected ", count, ".");
}

}  // namespace

Tensor linear_energy(const Tensor& h_student, const Tensor& w_student, const Maybe& b_student, const Tensor& h_teacher,
                     const Tensor& w_teacher, const Maybe& b_teacher, const Maybe& noise, const Maybe& seed,
                     const Maybe& weight, const Maybe& ignore, bool hard, bool identity, double temperature) {
  constexpr const char* where = "linear_energy";
  const Head student{"h_student", "w_student", "bias_student", h_student, w_student, b_student};
  const Head teacher{"h_teacher", "w_teacher", "bias_teacher", h_teacher, w_teacher, b_teacher};
  check_heads(where, student, teacher);
  const int64_t n = student.rows(), v = student.words();
  const Options options(where, h_student, n, v, noise, seed, weight, ignore, hard, identity, temperature);
  const Scope scope(h_student);
  const auto wide = h_student.options().dtype(accumulation_type(h_student));
  const Tensor energy = at::empty({n}, wide);
  const int64_t step = rows_per_tile(h_student, n, student.bytes_per_row() + teacher.bytes_per_row());
  const Tensor z = student.scratch(step), s = teacher.scratch(step), stats = at::empty({step, kEnergyStats}, wide);
  for_tiles(step, n, [&](int64_t begin, int64_t count) {
    const auto part = [&](const Tensor& x) { return x.narrow(0, 0, count); };
    student.logits(begin, count, part(z));
    teacher.logits(begin, count, part(s));
    energy_rows(options.rows(begin, count), part(z), part(s), energy.narrow(0, begin, count), part(stats));
  });
  return energy;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_energy_gradients(
    const Tensor& grad, const Tensor& h_student, const Tensor& w_student, const Maybe& b_student,
    const Tensor& h_teacher, const Tensor& w_teacher, const Maybe& b_teacher, const Maybe& noise, const Maybe& seed,
    const Maybe& weight, const Maybe& ignore, bool hard, bool identity, double temperature, c10::List<bool> needs) {
  constexpr const char* where = "linear_energy";
  const Head student{"h_student", "w_student", "bias_student", h_student, w_student, b_student};
  const Head teacher{"h_teacher", "w_teacher", "bias_teacher", h_teacher, w_teacher, b_teacher};
  check_heads(where, student, teacher);
  check_needs(where, needs, 6);
  const int64_t n = student.rows(), v = student.words();
  const Options options(where, h_student, n, v, noise, seed, weight, ignore, hard, identity, temperature);
  check_device(where, "grad", grad, h_student);
  if (grad.dim() != 1 || grad.size(0) != n) refuse_shape(where, "grad", grad, "(N,), one per row");
  const Scope scope(h_student);
  const auto wide = h_student.options().dtype(accumulation_type(h_student));
  const Tensor u = grad.to(accumulation_type(h_student)).contiguous(), energy = at::empty({n}, wide);
  const int64_t step = rows_per_tile(h_student, n, student.bytes_per_row() + teacher.bytes_per_row());
  const int64_t num_tiles = (n + step - 1) / step;
  HeadGradients of_student(student, {needs[0], needs[1], needs[2]}, num_tiles);
  HeadGradients of_teacher(teacher, {needs[3], needs[4], needs[5]}, num_tiles);
  const Tensor z = student.scratch(step), s = teacher.scratch(step), stats = at::empty({step, kEnergyStats}, wide);
  for_tiles(step, n, [&](int64_t begin, int64_t count) {
    const auto part = [&](const Tensor& x) { return x.narrow(0, 0, count); };
    const Options tile = options.rows(begin, count);
    student.logits(begin, count, part(z));
    teacher.logits(begin, count, part(s));
    energy_rows(tile, part(z), part(s), energy.narrow(0, begin, count), part(stats));
    const Tensor dz = of_student.any() ? part(z) : Tensor(), ds = of_teacher.any() ? part(s) : Tensor();
    energy_gradient_rows(tile, u.narrow(0, begin, count), part(z), part(s), part(stats), dz, ds);  // in their place
    if (dz.defined()) of_student.add(begin, dz);
    if (ds.defined()) of_teacher.add(begin, ds);
  });
  return {energy,
          of_student.hidden(), of_student.weight(), of_student.bias(),
          of_teacher.hidden(), of_teacher.weight(), of_teacher.bias()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_energy_sum(
    const Tensor& h_student, const Tensor& w_student, const Maybe& b_student, const Tensor& h_teacher,
    const Tensor& w_teacher, const Maybe& b_teacher, const Maybe& noise, const Maybe& seed, const Maybe& weight,
    const Maybe& ignore, bool hard, bool identity, double temperature, c10::List<bool> needs, bool /*overwrite*/) {
  const Tensor ones = at::ones({h_student.dim() ? h_student.size(0) : 0},
                               h_student.options().dtype(accumulation_type(h_student)));
  auto result = linear_energy_gradients(ones, h_student, w_student, b_student, h_teacher, w_teacher, b_teacher, noise,
                                        seed, weight, ignore, hard, identity, temperature, needs);
  std::get<0>(result) = at::sum(std::get<0>(result));
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> teacher_energy(const Tensor& z, const Tensor& h_teacher,
                                                          const Tensor& w_teacher, const Maybe& b_teacher,
                                                          const Maybe& noise, const Maybe& seed, const Maybe& weight,
                                                          const Maybe& ignore, bool hard, bool identity,
                                                          double temperature, bool need_logits, bool need_hidden,
                                                          bool /*overwrite*/) {
  constexpr const char* where = "teacher_energy";
  const Head teacher{"h_teacher", "w_teacher", "bias_teacher", h_teacher, w_teacher, b_teacher};
  teacher.check(where);
  const int64_t n = teacher.rows(), v = teacher.words();
  check_matrix(where, "z", z, n, v, "(N, V) with N = " + std::to_string(n) + " as in h_teacher and V = " +
                                        std::to_string(v) + " as in w_teacher");
  check_dtypes(where, "z", z, "h_teacher", h_teacher);
  const Options options(where, z, n, v, noise, seed, weight, ignore, hard, identity, temperature);
  const Scope scope(z);
  const auto wide = z.options().dtype(accumulation_type(z));
  const Tensor rows = with_adjacent_columns(z), energy = at::empty({n}, wide);
  const Tensor stats = at::empty({n, kEnergyStats}, wide);
  const int64_t step = rows_per_tile(z, n, 2 * teacher.bytes_per_row());
  const int64_t num_tiles = (n + step - 1) / step;
  const Tensor kept = teacher.scratch(need_logits ? n : 0), scratch = teacher.scratch(need_logits ? 0 : step);
  HeadGradients gradients(teacher, {need_hidden, false, false}, num_tiles);
  const Tensor ones = need_hidden ? at::ones({step}, wide) : Tensor();
  const Tensor ds = need_hidden ? teacher.scratch(step) : Tensor();
  for_tiles(step, n, [&](int64_t begin, int64_t count) {
    const auto part = [&](const Tensor& x) { return x.narrow(0, begin, count); };
    const Options tile = options.rows(begin, count);
    const Tensor s = need_logits ? part(kept) : scratch.narrow(0, 0, count);
    teacher.logits(begin, count, s);
    energy_rows(tile, part(rows), s, part(energy), part(stats));
    if (!need_hidden) return;
    const Tensor out = ds.narrow(0, 0, count);
    energy_gradient_rows(tile, ones.narrow(0, 0, count), part(rows), s, part(stats), Tensor(), out);
    gradients.add(begin, out);
  });
  return {energy, kept, stats, gradients.hidden()};
}

std::tuple<Tensor, Tensor> linear_soft_embedding(const Tensor& h, const Tensor& w, const Maybe& b, const Tensor& table,
                                                 const Maybe& noise, const Maybe& seed, const Maybe& ignore, bool hard,
                                                 bool identity, double temperature, bool keep_logits) {
  constexpr const char* where = "linear_soft_embedding";
  const Head student{"h", "w_student", "bias_student", h, w, b};
  student.check(where);
  const int64_t n = student.rows(), v = student.words();
  check_matrix(where, "table", table, v, -1, "(V, D) with V = " + std::to_string(v) + " as in w_student");
  check_dtypes(where, "h", h, "table", table);
  const Options options(where, h, n, v, noise, seed, {}, ignore, hard, identity, temperature);
  const Scope scope(h);
  const int64_t step = rows_per_tile(h, n, student.bytes_per_row());
  // The softmax goes in the place of logits that nobody needs again.
  const bool in_place = !keep_logits && h.scalar_type() == table.scalar_type();
  const Tensor softmax = in_place ? Tensor() : softmax_scratch(options, step, v, table);
  const Tensor z = student.scratch(keep_logits ? n : step), x = at::empty({n, table.size(1)}, table.options());
  const Tensor stats = at::empty({step, kSoftStats}, h.options().dtype(accumulation_type(h)));
  for_tiles(step, n, [&](int64_t begin, int64_t count) {
    const Tensor tile = z.narrow(0, keep_logits ? begin : 0, count);
    student.logits(begin, count, tile);
    const Tensor q = in_place ? tile : options.hard() ? softmax : softmax.narrow(0, 0, count);
    embed_rows(options.rows(begin, count), tile, table, x.narrow(0, begin, count), stats.narrow(0, 0, count), q);
  });
  return {x, keep_logits ? z : at::empty({0, v}, h.options())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_soft_embedding_backward(
    const Maybe& grad, const Maybe& grad_z, const Tensor& h, const Tensor& w, const Maybe& b, const Tensor& table,
    const Maybe& kept_z, const Maybe& noise, const Maybe& seed, const Maybe& ignore, bool hard, bool identity,
    double temperature, c10::List<bool> needs) {
  constexpr const char* where = "linear_soft_embedding";
  const Head student{"h", "w_student", "bias_student", h, w, b};
  student.check(where);
  check_needs(where, needs, 4);
  const int64_t n = student.rows(), v = student.words();
  check_matrix(where, "table", table, v, -1, "(V, D) with V = " + std::to_string(v) + " as in w_student");
  check_dtypes(where, "h", h, "table", table);
  if (!grad && !grad_z) refuse(where, "grad", "absent, and grad_z too", "at least one of them");
  if (grad) {
    check_matrix(where, "grad", *grad, n, table.size(1), "(N, D), the shape of the result");
    check_like(where, "grad", *grad, h, table.scalar_type());
  }
  if (grad_z) {
    check_matrix(where, "grad_z", *grad_z, n, v, "(N, V), the shape of the logits");
    check_like(where, "grad_z", *grad_z, h, h.scalar_type());
  }
  if (kept_z) {
    check_matrix(where, "z", *kept_z, n, v, "the logits that the forward pass kept");
    check_like(where, "z", *kept_z, h, h.scalar_type());
  }
  const Options options(where, h, n, v, noise, seed, {}, ignore, hard, identity, temperature);
  const Scope scope(h);
  const bool same = h.scalar_type() == table.scalar_type();
  const int64_t step = rows_per_tile(h, n, 2 * v * std::max(h.element_size(), table.element_size()));
  const int64_t num_tiles = (n + step - 1) / step;
  HeadGradients gradients(student, {needs[0], needs[1], needs[2]}, num_tiles);
  const Tensor z = kept_z ? Tensor() : student.scratch(step);
  const Tensor kept = kept_z ? with_adjacent_columns(*kept_z) : Tensor();
  const Tensor base = grad_z ? with_adjacent_columns(*grad_z) : Tensor();
  const Tensor dq = at::empty({step, v}, table.options()), dz = same ? dq : student.scratch(step);
  const Tensor stats = at::empty({step, kSoftStats}, h.options().dtype(accumulation_type(h)));
  const Tensor dtable =
      needs[3] ? at::zeros(table.sizes(), table.options().dtype(accumulation_type(table))) : Tensor();
  for_tiles(step, n, [&](int64_t begin, int64_t count) {
    const auto scratch = [&](const Tensor& x) { return x.narrow(0, 0, count); };
    const Tensor of_logits = base.defined() ? base.narrow(0, begin, count) : Tensor();
    if (!grad) return gradients.add(begin, of_logits);
    const Options tile = options.rows(begin, count);
    const Tensor tile_z = kept.defined() ? kept.narrow(0, begin, count) : scratch(z), du = grad->narrow(0, begin, count);
    if (!kept.defined()) student.logits(begin, count, tile_z);
    soft_rows(tile, tile_z, scratch(stats));
    if (dtable.defined()) embed_table_gradient(tile, du, tile_z, scratch(stats), dtable);
    if (!gradients.any()) return;
    embed_gradient_rows(tile, du, tile_z, table, scratch(stats), scratch(dq), of_logits, scratch(dz));
    gradients.add(begin, scratch(dz));
  });
  return {gradients.hidden(), gradients.weight(), gradients.bias(),
          dtable.defined() ? dtable.to(table.scalar_type()) : at::empty({0}, table.options())};
}

}  // namespace engine_fast
