// What the kernels must compute, in double precision and as plainly as possible, and the problems they are given.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "buffers.h"
#include "row/philox.h"

namespace smoke {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

enum class NoiseKind { kNone, kSeed, kValues };

struct Operator {
  const char* name;
  bool hard, identity;
  NoiseKind noise;
  double temperature;
};

constexpr Operator kOperators[] = {
    {"SX", false, false, NoiseKind::kNone, 1.0},   {"STL", true, true, NoiseKind::kNone, 1.0},
    {"SG", true, false, NoiseKind::kSeed, 1.0},    {"ST", true, false, NoiseKind::kNone, 1.0},
    {"GX", false, false, NoiseKind::kSeed, 1.0},   {"GX values 0.7", false, false, NoiseKind::kValues, 0.7},
    {"SX 1.7", false, false, NoiseKind::kNone, 1.7}};

struct Layout {  // elements before the first row and between rows
  int64_t n, v, z_offset, z_pad, s_offset, s_pad;
};

constexpr int64_t kSeed = 0x123456789abcdef, kFirstRow = (int64_t{1} << 33) + 5;

struct Problem {
  Layout layout;
  DType z_type, s_type;
  Operator op;
  std::vector<double> z, s, g, x, dq, base;  // x = z + g as the kernels round it
  std::vector<double> weight, grad;
  std::vector<uint8_t> ignore;

  DType wide() const { return z_type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
};

// Every ninth row is of one kind: plain; z forbids its first half; ties; ignored, full of NaN; NaN in z; NaN in s;
// z forbids everything; s forbids a word that z allows; z allows one word.
inline void make_special(Problem& p, int64_t i) {
  const int64_t v = p.layout.v;
  double *z = p.z.data() + i * v, *s = p.s.data() + i * v;
  switch (v < 3 ? 0 : i % 9) {
    case 1: std::fill(z, z + v / 2, -kInfinity); break;
    case 2: z[v / 3] = z[v - 1] = z[v / 2] = 40; break;
    case 3:
      p.ignore[i] = 1;
      std::fill(z, z + v, kNaN);
      std::fill(s, s + v, kNaN);
      break;
    case 4: z[v / 2] = kNaN; break;
    case 5: s[v - 1] = kNaN; break;
    case 6: std::fill(z, z + v, -kInfinity); break;
    case 7: s[0] = -kInfinity; break;
    case 8:
      for (int64_t j = 0; j < v; ++j) {
        if (j != v - 2) z[j] = -kInfinity;
        if (j % 3 == 0 && j != v - 2) s[j] = -kInfinity;
      }
      break;
    default: break;
  }
}

inline Problem make_problem(const Layout& layout, DType z_type, DType s_type, const Operator& op) {
  Problem p{layout, z_type, s_type, op, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  const int64_t n = layout.n, v = layout.v;
  std::mt19937_64 random(7 * n + v);
  std::normal_distribution<double> normal;
  const auto draw = [&](int64_t count, double scale) {
    std::vector<double> values(count);
    for (double& value : values) value = scale * normal(random);
    return values;
  };
  p.z = draw(n * v, 4);
  p.s = draw(n * v, 4);
  p.dq = draw(n * v, 1);
  p.base = draw(n * v, 1);
  p.weight = draw(n, 1);
  p.grad = draw(n, 1);
  p.ignore.assign(n, 0);
  for (int64_t i = 0; i < n; ++i) make_special(p, i);
  p.g.assign(n * v, 0.0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < v; ++j)
      if (op.noise == NoiseKind::kSeed) p.g[i * v + j] = engine_fast::gumbel_at(kSeed, kFirstRow + i, j);
  if (op.noise == NoiseKind::kValues) p.g = draw(n * v, 1);
  const auto round_all = [](std::vector<double>& values, DType type) {
    for (double& value : values) value = rounded(value, type);
  };
  round_all(p.z, z_type);
  round_all(p.s, s_type);
  round_all(p.dq, s_type);
  round_all(p.base, z_type);
  for (auto* values : {&p.g, &p.weight, &p.grad}) round_all(*values, p.wide());
  p.x.resize(n * v);
  for (int64_t e = 0; e < n * v; ++e) p.x[e] = rounded(p.z[e] + p.g[e], p.wide());
  return p;
}

struct Truth {
  std::vector<double> energy, stats, soft_stats, dz, ds, c, embedding;  // stats: 6 a row, soft_stats: 3 a row
  std::vector<double> dz_terms, ds_terms, embedding_terms;  // the sizes of what cancels in a difference
};

inline Truth truth_of(const Problem& p) {
  const int64_t n = p.layout.n, v = p.layout.v;
  const double it = 1 / p.op.temperature;
  Truth t;
  t.energy.assign(n, 0);
  t.stats.assign(n * 6, 0);
  t.soft_stats.assign(n * 3, 0);
  for (auto* out : {&t.dz, &t.ds, &t.c, &t.embedding, &t.dz_terms, &t.ds_terms, &t.embedding_terms})
    out->assign(n * v, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (p.ignore[i]) continue;
    const double *x = &p.x[i * v], *s = &p.s[i * v], *dq = &p.dq[i * v];
    double max = -kInfinity, max_s = -kInfinity;
    int64_t argmax = 0;
    for (int64_t j = 0; j < v; ++j) {  // a maximum that is NaN stays so
      if (x[j] > max) argmax = j;
      if (x[j] > max || std::isnan(x[j])) max = x[j];
      if (s[j] > max_s || std::isnan(s[j])) max_s = s[j];
    }
    double sum = 0, sum_s = 0, dot = 0, mean_dq = 0;
    for (int64_t j = 0; j < v; ++j) {
      const double c = std::exp((x[j] - max) * it);
      sum += c;
      sum_s += std::exp(s[j] - max_s);
      if (c != 0) dot += c * (s[j] - max_s);
      if (c != 0) mean_dq += c * dq[j];
    }
    const double mean = dot / sum;
    mean_dq /= sum;
    const double q_s = p.op.hard ? s[argmax] - max_s : mean;
    const double nan_of_row = max - max;
    t.energy[i] = (std::log(sum_s) - q_s + nan_of_row) * p.weight[i];
    const double stats[6] = {max, sum, static_cast<double>(argmax), max_s, sum_s, mean};
    std::copy(stats, stats + 6, &t.stats[i * 6]);
    std::copy(stats, stats + 3, &t.soft_stats[i * 3]);
    const double u = p.grad[i] * p.weight[i] + nan_of_row;
    for (int64_t j = 0; j < v; ++j) {
      const double c = std::exp((x[j] - max) * it) / sum, q = p.op.hard ? (j == argmax ? 1.0 : 0.0) : c;
      double& dz = t.dz[i * v + j];
      if (p.op.identity)
        dz = x[j] == -kInfinity ? 0 : u * (std::log(sum_s) - (s[j] - max_s));
      else
        dz = c == 0 ? 0 : u * it * c * (mean - (s[j] - max_s));
      const double teacher = std::exp(s[j] - max_s) / sum_s;
      t.ds[i * v + j] = u * (teacher - q);
      t.ds_terms[i * v + j] = std::fabs(u) * (teacher + q);
      t.c[i * v + j] = c;
      // The identity's terms are not weighted by c; the 1 is the sum, whose own rounding its logarithm keeps.
      t.dz_terms[i * v + j] = p.op.identity
                                  ? std::fabs(u) * (1 + std::log(sum_s) + std::fabs(s[j] - max_s))
                                  : std::fabs(u) * it * c * (std::fabs(mean) + std::fabs(s[j] - max_s));
      t.embedding_terms[i * v + j] = it * c * (std::fabs(mean_dq) + std::fabs(dq[j]));
      double& embedding = t.embedding[i * v + j];
      if (p.op.identity)
        embedding = x[j] == -kInfinity ? 0 : dq[j];
      else
        embedding = c == 0 ? 0 : c * (dq[j] - mean_dq) * it;
    }
  }
  return t;
}

}  // namespace smoke
