// The arithmetic that CPU and GPU share, checked on the host.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "row/philox.h"
#include "row/state.h"

namespace smoke {

struct Plain4 {
  uint32_t c[4];
};

// Philox4x32-10 as the paper has it, with all four counters and both keys.
inline Plain4 plain_philox(Plain4 x, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * x.c[0], p1 = 0xCD9E8D57ull * x.c[2];
    x = {{static_cast<uint32_t>(p1 >> 32) ^ x.c[1] ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ x.c[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return x;
}

// Known answers of the Random123 library for the plain form, then ours against that: ours fixes the last counter to 0.
inline bool philox_is_right() {
  struct Known {
    Plain4 counter;
    uint32_t k0, k1;
    Plain4 answer;
  };
  const Known known[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       0xa4093822,
       0x299f31d0,
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}};
  for (const Known& k : known) {
    const Plain4 got = plain_philox(k.counter, k.k0, k.k1);
    for (int i = 0; i < 4; ++i)
      if (got.c[i] != k.answer.c[i]) return false;
  }
  std::mt19937_64 random(1);
  for (int trial = 0; trial < 1000; ++trial) {
    const uint64_t seed = random(), row = random();
    const auto block = static_cast<uint32_t>(random());
    const auto ours = engine_fast::philox(seed, row, block);
    const Plain4 plain = plain_philox({{block, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0}},
                                      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const uint32_t words[4] = {ours.x0, ours.x1, ours.x2, ours.x3};
    for (int i = 0; i < 4; ++i) {
      const int64_t column = (static_cast<int64_t>(block & 0x3fffffff) << 2) + i;
      const auto first = engine_fast::philox(seed, row, block & 0x3fffffff);
      const uint32_t of_first[4] = {first.x0, first.x1, first.x2, first.x3};
      if (words[i] != plain.c[i]) return false;
      if (engine_fast::gumbel_at(seed, row, column) != engine_fast::gumbel_of(of_first[i])) return false;
    }
  }
  return true;
}

// Of log_by_fma against double precision, over the arguments that noise has.
inline double worst_log_ulps() {
  double worst = 0;
  const auto look = [&](float x) {
    const double truth = std::log(static_cast<double>(x)), got = engine_fast::log_by_fma(x);
    const float near = static_cast<float>(std::fabs(truth));
    const double ulp = std::nextafter(near, INFINITY) - near;
    if (truth != 0) worst = std::fmax(worst, std::fabs(got - truth) / ulp);
  };
  for (uint32_t k = 0; k < (1u << 23); k += 7) look(engine_fast::uniform_of(k << 9));
  for (uint32_t k = 0; k < (1u << 23); k += 11) look(-engine_fast::log_by_fma(engine_fast::uniform_of(k << 9)));
  look(engine_fast::uniform_of(0));
  look(engine_fast::uniform_of(~0u));
  return worst;
}

// States of single words, merged in random groupings, against sums over the whole row.
template <typename A>
double worst_merge_error() {
  using engine_fast::RowState;
  std::mt19937_64 random(2);
  std::normal_distribution<double> normal;
  double worst = 0;
  for (int trial = 0; trial < 500; ++trial) {
    const int v = 1 + static_cast<int>(random() % 200);
    const A it = static_cast<A>(trial % 3 == 0 ? 0.6 : 1.0);
    std::vector<A> x(v), s(v);
    for (int j = 0; j < v; ++j) {
      x[j] = j != v / 2 && random() % 4 == 0 ? -INFINITY : static_cast<A>(5 * normal(random));
      if (v > 5 && (j == v / 2 || j == v - 1)) x[j] = 30;
      s[j] = x[j] == -INFINITY && random() % 2 == 0 ? -INFINITY : static_cast<A>(5 * normal(random));
    }
    std::vector<RowState<A>> parts;
    for (int j = 0; j < v; ++j) {
      RowState<A> part;
      const bool forbidden = x[j] == -INFINITY;
      part.z = {x[j], forbidden ? A(0) : A(1), j};
      part.max_s = s[j];
      part.sum_s = s[j] == -INFINITY ? A(0) : A(1);
      parts.push_back(part);
    }
    while (parts.size() > 1) {
      const size_t a = random() % parts.size();
      RowState<A> first = parts[a];
      parts.erase(parts.begin() + a);
      const size_t b = random() % parts.size();
      parts[b] = engine_fast::merge(first, parts[b], it);
    }
    double max = -INFINITY, max_s = -INFINITY, sum = 0, sum_s = 0, dot = 0;
    int argmax = 0;
    for (int j = 0; j < v; ++j) {
      if (x[j] > max) max = x[j], argmax = j;
      max_s = std::fmax(max_s, s[j]);
    }
    for (int j = 0; j < v; ++j) {
      const double c = std::exp((x[j] - max) * static_cast<double>(it));
      sum += c;
      sum_s += std::exp(s[j] - max_s);
      if (c != 0) dot += c * (s[j] - max_s);
    }
    const RowState<A>& got = parts[0];
    if (got.z.max != max || got.z.argmax != argmax || got.max_s != max_s) return INFINITY;
    const double pairs[3][2] = {{got.z.sum, sum}, {got.sum_s, sum_s}, {got.dot, dot}};
    for (const auto& pair : pairs) {
      const double error = std::fabs(pair[0] - pair[1]) / std::fmax(std::fabs(pair[1]), 1e-30);
      worst = std::isfinite(error) ? std::fmax(worst, error) : INFINITY;
    }
  }
  return worst;
}

inline bool report(const char* what, bool ok, double figure) {
  std::printf("%-58s %-9.3g %s\n", what, figure, ok ? "ok" : "FAILED");
  return ok;
}

inline bool host_checks() {
  bool ok = true;
  ok &= report("philox: known answers, words in column order", philox_is_right(), 0);
  const double ulps = worst_log_ulps();
  ok &= report("log_by_fma: worst error in ulp (2 allowed)", ulps <= 2, ulps);
  const double wide = worst_merge_error<double>(), narrow = worst_merge_error<float>();
  ok &= report("merge, float64: worst relative error", wide < 1e-12, wide);
  ok &= report("merge, float32: worst relative error", narrow < 1e-4, narrow);
  return ok;
}

}  // namespace smoke
