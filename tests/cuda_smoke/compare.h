// Whether a kernel's numbers are those of the reference.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "buffers.h"

namespace smoke {

// Sums in float32 and the GPU's exp leave about 1e-6 of the row's scale; storing adds half a unit of the dtype.
inline double storage_error(DType type) {
  switch (type) {
    case DType::kFloat64: return 1e-13;
    case DType::kFloat32: return 1e-6;
    case DType::kBFloat16: return 1.01 / 256;
    default: return 1.01 / 2048;
  }
}

class Comparison {
 public:
  int failures() const { return failures_; }
  double worst() const { return worst_; }  // in units of what is allowed

  // Rows of `v`: |got - truth| <= storage * |truth| + sums * (the row's largest finite |truth|, at least floor) and
  // what rounding the terms of a difference explains.
  void rows(const std::string& what, const std::vector<double>& got, const std::vector<double>& truth, int64_t v,
            DType type, DType wide, double floor = 0, const std::vector<double>* terms = nullptr) {
    const double sums = wide == DType::kFloat64 ? 1e-11 : 1e-5, rounding = wide == DType::kFloat64 ? 1e-14 : 1e-6;
    for (size_t row = 0; row * v < truth.size(); ++row) {
      double scale = floor;
      for (int64_t j = 0; j < v; ++j)
        if (const double t = std::fabs(truth[row * v + j]); std::isfinite(t) && t > scale) scale = t;
      const double tiny = type == DType::kFloat16 ? 6e-8 : 0;
      for (int64_t j = 0; j < v; ++j) {
        const double t = truth[row * v + j], g = got[row * v + j];
        double allowed = storage_error(type) * std::fabs(t) + sums * scale + tiny;
        if (terms != nullptr && std::isfinite((*terms)[row * v + j])) allowed += rounding * (*terms)[row * v + j];
        if (std::isnan(t) ? std::isnan(g) : std::isinf(t) ? g == t : std::fabs(g - t) <= allowed) {
          if (std::isfinite(t) && allowed > 0) worst_ = std::fmax(worst_, std::fabs(g - t) / allowed);
          continue;
        }
        fail(what + " at row " + std::to_string(row) + ", column " + std::to_string(j), g, t);
      }
    }
  }

  void equal(const std::string& what, const std::vector<double>& got, const std::vector<double>& wanted) {
    for (size_t e = 0; e < wanted.size(); ++e)
      if (!(got[e] == wanted[e] || (std::isnan(got[e]) && std::isnan(wanted[e]))))
        fail(what + " at element " + std::to_string(e), got[e], wanted[e]);
  }

  void that(const std::string& what, bool ok) {
    if (!ok) fail(what, 0, 1);
  }

 private:
  void fail(const std::string& what, double got, double wanted) {
    if (++failures_ <= 5) std::printf("  %s: got %.9g, expected %.9g\n", what.c_str(), got, wanted);
  }

  int failures_ = 0;
  double worst_ = 0;
};

}  // namespace smoke
