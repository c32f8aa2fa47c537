// The module engine_fast._C: how it was built, and the batch packer. No tensor crosses pybind11; numpy arrays do.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

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
