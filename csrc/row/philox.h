// Gumbel noise from a counter: g(seed, row, column), the same bits on CPU and GPU, made again wherever it is needed.
//
// Philox4x32-10 (Salmon et al., SC 2011) with key = seed and counter = (column / 4, row low, row high, 0); word
// column % 4 gives u = (k + 1/2) / 2^23, k its upper 23 bits, and g = -log(-log u). All arithmetic is integer or an
// explicit fused multiply-add, hence the equality.
#pragma once

#include "portable.h"

namespace engine_fast {

struct Words4 {
  uint32_t x0, x1, x2, x3;
};

EF_HD Words4 philox(uint64_t seed, uint64_t row, uint32_t column_block) {
  Words4 c{column_block, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0u};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c.x0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c.x2;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.x1 ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.x3 ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

EF_HD float uniform_of(uint32_t word) {  // exact, in (0, 1)
  return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 1.1920928955078125e-7f;
}

EF_HD float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

EF_HD int32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_int(x);
#else
  return __builtin_bit_cast(int32_t, x);
#endif
}

EF_HD float float_of(int32_t bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

// log x of a normal x > 0, within 2 ulp: x = 2^e m with m in [sqrt(1/2), sqrt 2), log m by a polynomial in m - 1
// (coefficients of Cephes' logf).
EF_HD float log_by_fma(float x) {
  const int32_t offset = bits_of(x) - 0x3f3504f3;  // of sqrt(1/2)
  const int32_t exponent = offset >> 23;
  const float f = float_of((offset & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const float e = static_cast<float>(exponent), f2 = f * f;
  float p = 7.0376836292e-2f;
  p = fused(p, f, -1.1514610310e-1f);
  p = fused(p, f, 1.1676998740e-1f);
  p = fused(p, f, -1.2420140846e-1f);
  p = fused(p, f, 1.4249322787e-1f);
  p = fused(p, f, -1.6668057665e-1f);
  p = fused(p, f, 2.0000714765e-1f);
  p = fused(p, f, -2.4999993993e-1f);
  p = fused(p, f, 3.3333331174e-1f);
  p = fused(p, f * f2, e * -2.12194440e-4f);
  p = fused(f2, -0.5f, p);
  return fused(e, 0.693359375f, f + p);
}

EF_HD float gumbel_of(uint32_t word) { return -log_by_fma(-log_by_fma(uniform_of(word))); }

// The noise of one element; kernels that walk a row take all four words of a block instead.
EF_HD float gumbel_at(uint64_t seed, uint64_t row, int64_t column) {
  const Words4 words = philox(seed, row, static_cast<uint32_t>(column >> 2));
  const uint32_t pairs[4] = {words.x0, words.x1, words.x2, words.x3};
  return gumbel_of(pairs[column & 3]);
}

}  // namespace engine_fast
