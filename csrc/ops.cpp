// Every operator's schema, and the module engine_fast._C: how it was built, and the batch packer. No tensor crosses
// pybind11; numpy arrays do.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "aten/operators.h"
#include "checks.h"
#include "host/batching.h"

namespace py = pybind11;

namespace {

// Read as bytes by engine_fast/extension.py before the file is loaded: the markers are its contract with this one.
// setup.py passes every value as a string literal that is already JSON.
[[gnu::used]] const char kBuildInfo[] = "ENGINE_FAST_BUILD_INFO{" ENGINE_FAST_BUILD_JSON "}ENGINE_FAST_BUILD_INFO";

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
void check_vector(const char* name, const Array<T>& array) {
  if (array.ndim() != 1)
    engine_fast::refuse("pack_batches", name, std::to_string(array.ndim()) + " dimensions", "one dimension");
}

py::array_t<int64_t> pack_batches(const Array<int32_t>& source_lengths, const Array<int32_t>& target_lengths,
                                  const Array<int64_t>& order, int64_t max_tokens, int64_t max_sentences) {
  check_vector("source_lengths", source_lengths);
  check_vector("target_lengths", target_lengths);
  check_vector("order", order);
  if (source_lengths.size() != target_lengths.size())
    engine_fast::refuse("pack_batches", "target_lengths", std::to_string(target_lengths.size()) + " sentences",
                        "as many as source_lengths, " + std::to_string(source_lengths.size()));
  const engine_fast::PackArgs args{source_lengths.data(), target_lengths.data(), source_lengths.size(), order.data(),
                                   order.size(),          max_tokens,            max_sentences};
  std::vector<int64_t> offsets;
  {
    py::gil_scoped_release release;
    offsets = engine_fast::pack_batches(args);
  }
  py::array_t<int64_t> result(static_cast<py::ssize_t>(offsets.size()));
  std::copy(offsets.begin(), offsets.end(), result.mutable_data());
  return result;
}

py::object build_info() {
  const std::string json = "{" ENGINE_FAST_BUILD_JSON "}";
  return py::module_::import("json").attr("loads")(json);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of engine_fast; reach them through engine_fast.extension.load().";
  m.def("build_info", &build_info, "How this file was built: torch, isa, cuda, compiler, flags.");
  // noconvert: an array of another type would be copied silently on every call.
  m.def("pack_batches", &pack_batches, py::arg("source_lengths").noconvert(), py::arg("target_lengths").noconvert(),
        py::arg("order").noconvert(), py::arg("max_tokens"), py::arg("max_sentences"),
        "Offsets into `order` that cut it into batches within a token budget; see csrc/host/batching.h.");
}

// N rows, V words. Every operator but linear_argmax takes the options of csrc/aten/options.h, then its own flags.
// Functional, but for energy_backward_. Only the first result of a forward operator has a gradient; linear_argmax, which
// only decoding calls, has none.
#define EF_OPTIONS "Tensor? noise, Tensor? seed, Tensor? ignore, bool hard, bool identity, float temperature"
#define EF_WEIGHTED "Tensor? noise, Tensor? seed, Tensor? weight, Tensor? ignore, bool hard, bool identity, float temperature"
#define EF_HEADS \
  "Tensor h_student, Tensor w_student, Tensor? b_student, Tensor h_teacher, Tensor w_teacher, Tensor? b_teacher"

TORCH_LIBRARY(engine_fast, m) {
  m.def("energy(Tensor z, Tensor s, " EF_WEIGHTED ", bool overwrite) -> (Tensor energy, Tensor stats)");
  m.def("energy_backward(Tensor grad, Tensor z, Tensor s, Tensor stats, " EF_WEIGHTED
        ", bool need_z, bool need_s) -> (Tensor dz, Tensor ds)");
  m.def("energy_backward_(Tensor grad, Tensor z, Tensor s, Tensor stats, " EF_WEIGHTED
        ", Tensor(a!)? dz, Tensor(b!)? ds) -> ()");
  m.def("soft_embedding(Tensor z, Tensor table, " EF_OPTIONS ") -> (Tensor x, Tensor stats)");
  m.def("soft_embedding_backward(Tensor grad, Tensor z, Tensor table, Tensor stats, " EF_OPTIONS
        ", bool need_z, bool need_table) -> (Tensor dz, Tensor dtable)");
  m.def("linear_energy(" EF_HEADS ", " EF_WEIGHTED ") -> Tensor energy");
  m.def("linear_energy_gradients(Tensor grad, " EF_HEADS ", " EF_WEIGHTED
        ", bool[] needs) -> (Tensor energy, Tensor dh_student, Tensor dw_student, Tensor db_student,"
        " Tensor dh_teacher, Tensor dw_teacher, Tensor db_teacher)");
  m.def("linear_energy_sum(" EF_HEADS ", " EF_WEIGHTED
        ", bool[] needs, bool overwrite) -> (Tensor total, Tensor dh_student, Tensor dw_student, Tensor db_student,"
        " Tensor dh_teacher, Tensor dw_teacher, Tensor db_teacher)");
  m.def("teacher_energy(Tensor z, Tensor h_teacher, Tensor w_teacher, Tensor? b_teacher, " EF_WEIGHTED
        ", bool need_logits, bool need_hidden, bool overwrite) -> (Tensor energy, Tensor s, Tensor stats, Tensor dh_teacher)");
  m.def("linear_soft_embedding(Tensor h, Tensor w_student, Tensor? b_student, Tensor table, " EF_OPTIONS
        ", bool keep_logits) -> (Tensor x, Tensor z)");
  m.def("linear_soft_embedding_backward(Tensor? grad, Tensor? grad_z, Tensor h, Tensor w_student, Tensor? b_student,"
        " Tensor table, Tensor? z, " EF_OPTIONS ", bool[] needs)"
        " -> (Tensor dh, Tensor dw_student, Tensor db_student, Tensor dtable)");
  m.def("linear_argmax(Tensor h, Tensor w, Tensor? b, int[] forbidden) -> (Tensor value, Tensor word)");
}

#define EF_IMPLEMENTATIONS(m)                                                               \
  m.impl("energy", &engine_fast::energy);                                                   \
  m.impl("energy_backward", &engine_fast::energy_backward);                                 \
  m.impl("energy_backward_", &engine_fast::energy_backward_);                               \
  m.impl("soft_embedding", &engine_fast::soft_embedding);                                   \
  m.impl("soft_embedding_backward", &engine_fast::soft_embedding_backward);                 \
  m.impl("linear_energy", &engine_fast::linear_energy);                                     \
  m.impl("linear_energy_gradients", &engine_fast::linear_energy_gradients);                 \
  m.impl("linear_energy_sum", &engine_fast::linear_energy_sum);                             \
  m.impl("teacher_energy", &engine_fast::teacher_energy);                                   \
  m.impl("linear_soft_embedding", &engine_fast::linear_soft_embedding);                     \
  m.impl("linear_soft_embedding_backward", &engine_fast::linear_soft_embedding_backward);   \
  m.impl("linear_argmax", &engine_fast::linear_argmax)

TORCH_LIBRARY_IMPL(engine_fast, CPU, m) { EF_IMPLEMENTATIONS(m); }
#ifdef ENGINE_FAST_WITH_CUDA
TORCH_LIBRARY_IMPL(engine_fast, CUDA, m) { EF_IMPLEMENTATIONS(m); }
#endif
