// What a kernel is told, on any device: plain pointers and sizes. n rows, v vocabulary.
//
// Dtypes: z, s and what is written for them float32, float64, bfloat16 or float16. Statistics, energies, weights,
// upstream gradients and explicit noise are of the accumulation type: float64 if z is float64, else float32.
#pragma once

#include <cstdint>

namespace engine_fast {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct Matrix {
  void* data = nullptr;  // null: absent
  int64_t stride = 0;    // elements from one row to the next; columns are adjacent
  DType dtype = DType::kFloat32;
};

struct Relaxation {
  bool hard = false;             // q is the one-hot argmax rather than the softmax
  bool identity = false;         // Jacobian: identity rather than that of the softmax
  double inv_temperature = 1.0;  // multiplies z + g under the softmax
};

struct Noise {              // at most one of the two; neither: g = 0
  Matrix values;            // (n, v), accumulation type
  const int64_t* seed = nullptr;  // one number on the kernel's device: g(seed, first_row + i, column), see philox.h
  int64_t first_row = 0;
};

struct Student {  // what every kernel reads
  Matrix z;       // (n, v) logits
  Noise noise;
  Relaxation relaxation;
  const uint8_t* ignore = nullptr;  // (n,) rows that are not read: their results are 0; null: none
  int64_t n = 0, v = 0;
};

// energy[i] = weight[i] * (logsumexp(s[i]) - <q[i], s[i]>), and the statistics of state.h.
struct EnergyForward {
  Student student;
  Matrix s;                      // (n, v)
  const void* weight = nullptr;  // (n,) or null
  void* energy = nullptr;        // (n,)
  void* stats = nullptr;         // (n, kEnergyStats)
};

// With u[i] = grad[i] * weight[i]: ds = u (softmax(s) - q), dz as in jacobian.h. dz may be z or s, ds may be s or z.
struct EnergyBackward {
  Student student;
  Matrix s;
  const void* weight = nullptr;
  const void* grad = nullptr;   // (n,)
  const void* stats = nullptr;  // (n, kEnergyStats)
  Matrix dz, ds;                // (n, v), dtypes of z and s; data null: not wanted
};

// The statistics of z alone.
struct SoftForward {
  Student student;
  void* stats = nullptr;  // (n, kSoftStats)
};

// out[i, j] = softmax((z + g) / temperature)[i, first_column + j] for j < columns.
struct Carrier {
  Student student;
  const void* stats = nullptr;  // (n, kSoftStats)
  int64_t first_column = 0, columns = 0;
  Matrix out;  // (n, columns)
};

// out = base + c (dq - <c, dq>) / temperature; for the identity base + dq, and base where z is -inf. out may be dq, base or z.
struct CarrierBackward {
  Student student;
  const void* stats = nullptr;  // (n, kSoftStats)
  Matrix dq;                    // (n, v)
  Matrix base;                  // (n, v), dtype of z; data null: 0
  Matrix out;                   // (n, v), dtype of z
};

}  // namespace engine_fast
