// From tensors to the plain structs of row/args.h: what every operator is told besides its matrices, checked once.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <string>

#include "row/args.h"

namespace engine_fast {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kMaxVocabulary = int64_t{1} << 24;  // float32 statistics hold the argmax exactly

[[noreturn]] void refuse_shape(const char* where, const char* name, const Tensor& got, const std::string& wanted);

// float64 for float64, float32 for everything else.
at::ScalarType accumulation_type(const Tensor& x);

// x itself where its columns are adjacent, a copy where they are not.
Tensor with_adjacent_columns(const Tensor& x);

Matrix matrix_of(const Tensor& x);

// Of every operator while it runs: its device, and no autocast, which would round inside some products and not others.
struct Scope {
  explicit Scope(const Tensor& on) : device(on.device()), no_autocast(c10::autocast_dispatch_keyset) {}
  c10::DeviceGuard device;
  c10::impl::ExcludeDispatchKeyGuard no_autocast;
};

class Options {
 public:
  // Checks everything against the (n, v) logits of operator `where`, on `z`'s device.
  Options(const char* where, const Tensor& z, int64_t n, int64_t v, const Maybe& noise, const Maybe& seed,
          const Maybe& weight, const Maybe& ignore, bool hard, bool identity, double temperature);

  // The same for rows begin .. begin + count - 1.
  Options rows(int64_t begin, int64_t count) const;

  Student student(const Tensor& z) const;
  const void* weight() const { return weight_ ? weight_->data_ptr() : nullptr; }
  const Maybe& ignore() const { return ignore_; }
  bool hard() const { return relaxation_.hard; }

 private:
  Maybe noise_, seed_, weight_, ignore_;
  Relaxation relaxation_;
  int64_t first_row_ = 0;
};

// Names and dtypes of two matrices that one kernel reads: equal, or one of them float32.
void check_dtypes(const char* where, const char* first_name, const Tensor& first, const char* second_name,
                  const Tensor& second);
void check_matrix(const char* where, const char* name, const Tensor& x, int64_t rows, int64_t columns,
                  const std::string& wanted);
// On the device of `like`, of that dtype.
void check_like(const char* where, const char* name, const Tensor& x, const Tensor& like, at::ScalarType wanted);
void check_device(const char* where, const char* name, const Tensor& x, const Tensor& like);

}  // namespace engine_fast
