// Gumbel noise of a stretch of one row. The loops are written for the compiler to put on vector lanes.
#include "cpu/rows.h"

namespace engine_fast {
namespace {

constexpr int64_t kChunk = 64;

// Columns first .. first + kChunk - 1, first a multiple of 4.
void chunk(uint64_t seed, uint64_t row, int64_t first, float* out) {
  alignas(64) uint32_t words[4][kChunk / 4];
  for (int64_t i = 0; i < kChunk / 4; ++i) {
    const Words4 made = philox(seed, row, static_cast<uint32_t>((first >> 2) + i));
    words[0][i] = made.x0;
    words[1][i] = made.x1;
    words[2][i] = made.x2;
    words[3][i] = made.x3;
  }
  alignas(64) float planes[4][kChunk / 4];
  for (int64_t k = 0; k < 4; ++k)
    for (int64_t i = 0; i < kChunk / 4; ++i) planes[k][i] = gumbel_of(words[k][i]);
  for (int64_t i = 0; i < kChunk / 4; ++i)
    for (int64_t k = 0; k < 4; ++k) out[4 * i + k] = planes[k][i];
}

template <typename A>
void make(uint64_t seed, int64_t row, int64_t first_column, int64_t columns, A* out) {
  float made[kChunk];
  int64_t done = 0;
  while (done < columns) {
    const int64_t start = first_column + done, aligned = start & ~int64_t{3};
    chunk(seed, static_cast<uint64_t>(row), aligned, made);
    const int64_t skip = start - aligned, count = std::min(kChunk - skip, columns - done);
    for (int64_t i = 0; i < count; ++i) out[done + i] = static_cast<A>(made[skip + i]);
    done += count;
  }
}

}  // namespace

void make_gumbel(uint64_t seed, int64_t row, int64_t first_column, int64_t columns, float* out) {
  make(seed, row, first_column, columns, out);
}
void make_gumbel(uint64_t seed, int64_t row, int64_t first_column, int64_t columns, double* out) {
  make(seed, row, first_column, columns, out);
}

}  // namespace engine_fast
