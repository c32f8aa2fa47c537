#include "aten/options.h"

#include <c10/core/DeviceType.h>

#include <cmath>
#include <sstream>

#include "checks.h"

namespace engine_fast {
namespace {

std::string shape_of(const Tensor& x) {
  std::ostringstream out;
  out << "(";
  for (int64_t i = 0; i < x.dim(); ++i) out << (i ? ", " : "") << x.size(i);
  out << (x.dim() == 1 ? ",)" : ")");
  return out.str();
}

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    default: return DType::kFloat16;  // the rest has been refused
  }
}

void check_vector(const char* where, const char* name, const Tensor& x, const Tensor& like, int64_t n) {
  check_device(where, name, x, like);
  if (x.dim() != 1 || x.size(0) != n) refuse_shape(where, name, x, "(" + std::to_string(n) + ",), one per row");
}

}  // namespace

void refuse_shape(const char* where, const char* name, const Tensor& got, const std::string& wanted) {
  refuse(where, name, shape_of(got), wanted);
}

at::ScalarType accumulation_type(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor with_adjacent_columns(const Tensor& x) { return x.stride(1) == 1 || x.size(1) <= 1 ? x : x.contiguous(); }

Matrix matrix_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), dtype_of(x)}; }

void check_device(const char* where, const char* name, const Tensor& x, const Tensor& like) {
  if (x.device() != like.device()) refuse(where, name, x.device().str(), "a tensor on " + like.device().str());
}

void check_like(const char* where, const char* name, const Tensor& x, const Tensor& like, at::ScalarType wanted) {
  check_device(where, name, x, like);
  if (x.scalar_type() != wanted) refuse(where, name, c10::toString(x.scalar_type()), c10::toString(wanted));
}

void check_matrix(const char* where, const char* name, const Tensor& x, int64_t rows, int64_t columns,
                  const std::string& wanted) {
  const auto fits = [](int64_t got, int64_t want) { return want < 0 || got == want; };
  if (x.dim() != 2 || !fits(x.size(0), rows) || !fits(x.size(1), columns)) refuse_shape(where, name, x, wanted);
  const auto type = x.scalar_type();
  const bool on_cpu = x.device().is_cpu();
  if (type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || (type == at::kHalf && !on_cpu)) return;
  refuse(where, name, c10::toString(type),
         on_cpu ? "float32, float64 or bfloat16 on a CPU" : "float32, float64, bfloat16 or float16");
}

void check_dtypes(const char* where, const char* first_name, const Tensor& first, const char* second_name,
                  const Tensor& second) {
  check_device(where, second_name, second, first);
  const auto a = first.scalar_type(), b = second.scalar_type();
  const bool wide = a == at::kDouble || b == at::kDouble;
  if (a == b || (!wide && (a == at::kFloat || b == at::kFloat))) return;
  refuse(where, second_name, c10::toString(b),
         std::string("the dtype of ") + first_name + ", " + c10::toString(a) + ", or a pair with float32");
}

Options::Options(const char* where, const Tensor& z, int64_t n, int64_t v, const Maybe& noise, const Maybe& seed,
                 const Maybe& weight, const Maybe& ignore, bool hard, bool identity, double temperature)
    : relaxation_{hard, identity, 1.0 / temperature} {
  if (v < 1 || v > kMaxVocabulary)
    refuse(where, "V", std::to_string(v), "1 to " + std::to_string(kMaxVocabulary) + " words");
  if (!(temperature > 0) || !std::isfinite(temperature))
    refuse(where, "temperature", std::to_string(temperature), "a positive number");
  if (identity && !hard) refuse(where, "identity", "true", "false for a soft operator, whose Jacobian is its own");
  const auto wide = accumulation_type(z);
  if (noise && seed) refuse(where, "seed", "given beside noise", "one of the two");
  if (noise) {
    check_device(where, "noise", *noise, z);
    check_matrix(where, "noise", *noise, n, v, "the shape of the logits");
    noise_ = with_adjacent_columns(noise->to(wide));
  }
  if (seed) {
    check_like(where, "seed", *seed, z, at::kLong);
    if (seed->numel() != 1) refuse_shape(where, "seed", *seed, "one number");
    seed_ = seed;
  }
  if (weight) {
    check_vector(where, "weight", *weight, z, n);
    weight_ = weight->to(wide).contiguous();
  }
  if (ignore) {
    check_vector(where, "ignore", *ignore, z, n);
    if (ignore->scalar_type() != at::kBool) refuse(where, "ignore", c10::toString(ignore->scalar_type()), "bool");
    ignore_ = ignore->contiguous();
  }
}

Options Options::rows(int64_t begin, int64_t count) const {
  Options part = *this;
  for (Maybe* tensor : {&part.noise_, &part.weight_, &part.ignore_})
    if (*tensor) *tensor = (*tensor)->narrow(0, begin, count);
  part.first_row_ += begin;
  return part;
}

Student Options::student(const Tensor& z) const {
  Student student;
  student.z = matrix_of(z);
  student.noise = {noise_ ? matrix_of(*noise_) : Matrix{}, seed_ ? seed_->const_data_ptr<int64_t>() : nullptr,
                   first_row_};
  student.relaxation = relaxation_;
  student.ignore = ignore_ ? reinterpret_cast<const uint8_t*>(ignore_->const_data_ptr<bool>()) : nullptr;
  student.n = z.size(0);
  student.v = z.size(1);
  return student;
}

}  // namespace engine_fast
