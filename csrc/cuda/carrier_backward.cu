// Gradients through the softmax of the student's logits: a sum over the row, <c, dq>, then one more pass. A row that
// fits keeps c and dq in shared memory in between; of a longer one z and dq are read again, most of it from the L2.
#include "cuda/dynamic_shared.cuh"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/shape.cuh"
#include "row/jacobian.h"
#include "row/state.h"

namespace engine_fast::cuda {
namespace {

constexpr int kVector = 16;         // bytes
constexpr int kStaticShared = 512;  // what sum_over_row may take

// Shared memory of a row: c and dq, each with room to start as far into a unit as the row's first aligned column does.
template <typename A, typename Q, int kUnit>
struct Kept {
  A* c;
  Q* dq;

  template <typename T>
  __host__ __device__ static constexpr int64_t bytes_of(int64_t v) {
    return ((v + kUnit) * static_cast<int64_t>(sizeof(T)) + kVector - 1) / kVector * kVector;
  }
  __host__ __device__ static constexpr int64_t bytes(int64_t v) { return bytes_of<A>(v) + bytes_of<Q>(v); }

  __device__ __forceinline__ Kept(unsigned char* memory, int64_t v, int head) {
    const int shift = (kUnit - head % kUnit) % kUnit;
    c = reinterpret_cast<A*>(memory) + shift;
    dq = reinterpret_cast<Q*>(memory + bytes_of<A>(v)) + shift;
  }
};

// out = base + gradient; base is read before out, perhaps in its place, is written.
template <typename Place, typename A, typename Z>
__device__ __forceinline__ void put(const Z* base_row, const Place& place, const A* gradient, Z* out_row) {
  A out[Place::kSize];
  if (base_row != nullptr) load(base_row, place, out, A(0));
#pragma unroll
  for (int e = 0; e < Place::kSize; ++e) out[e] = base_row != nullptr ? out[e] + gradient[e] : gradient[e];
  store(out, place, out_row);
}

// The identity Jacobian, in a kernel of its own: beside the other's two passes it would spill registers. No operator
// with it has noise.
template <typename Z, typename Q>
__global__ __launch_bounds__(Bounds<Z, false>::kThreads) void identity_backward_kernel(const CarrierBackward args) {
  using A = Accumulate<Z>;
  using B = Batch<8, Z, Q>;
  const Student& student = args.student;
  for (int64_t row = first_row(); row < student.n; row += row_step()) {
    const Z* const z_row = row_of<const Z>(student.z, row);
    const Q* const dq_row = row_of<const Q>(args.dq, row);
    const Z* const base_row = row_of<const Z>(args.base, row);
    Z* const out_row = row_of<Z>(args.out, row);
    const bool skip = ignored(student, row);
    const Columns columns = columns_of<B::kUnit>(0, static_cast<int>(student.v), origin(z_row, 0), origin(dq_row, 0),
                                                 origin(base_row, 0), origin(out_row, 0));
    walk<B::kUnit, B::kUnits>(columns, lane_of_row(), lanes_of_row(), [&](const auto& place) {
      constexpr int kSize = std::remove_cvref_t<decltype(place)>::kSize;
      A x[kSize], dq[kSize];
      if (!skip) load(z_row, place, x, A(0));
      if (!skip) load(dq_row, place, dq, A(0));
#pragma unroll
      for (int e = 0; e < kSize; ++e) dq[e] = skip ? A(0) : unless_forbidden(x[e], dq[e]);
      put(base_row, place, dq, out_row);
    });
  }
}

// Its two passes want more registers than Bounds leaves with noise, or in double.
template <typename Z, typename Q, bool kNoise>
__global__ __launch_bounds__(Bounds<Z, kNoise>::kThreads, sizeof(Z) == 8 ? 1 : 2) void carrier_backward_kernel(
    const CarrierBackward args, bool keep) {
  using A = Accumulate<Z>;
  using B = Batch<8, Z, Q>;
  const Student& student = args.student;
  const A inv_temperature = static_cast<A>(student.relaxation.inv_temperature);
  for (int64_t row = first_row(); row < student.n; row += row_step()) {
    if (keep) sync_row();  // the previous row may be aligned differently, and then kept by other threads
    const StudentRow<Z, kNoise> student_row(student, row);
    const Q* const dq_row = row_of<const Q>(args.dq, row);
    const Z* const base_row = row_of<const Z>(args.base, row);
    Z* const out_row = row_of<Z>(args.out, row);
    const Columns columns = columns_of<B::kUnit>(0, static_cast<int>(student.v), origin(student_row.z, 0),
                                                 origin(dq_row, 0), origin(base_row, 0), origin(out_row, 0),
                                                 origin(student_row.values, 0));
    const auto for_batches = [&](const auto& body) {
      walk<B::kUnit, B::kUnits>(columns, lane_of_row(), lanes_of_row(), body);
    };
    if (ignored(student, row)) {
      for_batches([&](const auto& place) {
        const A nothing[std::remove_cvref_t<decltype(place)>::kSize] = {};
        put(base_row, place, nothing, out_row);
      });
      continue;
    }
    const A* const stats = static_cast<const A*>(args.stats) + row * kSoftStats;
    const A max = stats[0], inv_sum = A(1) / stats[1];
    const Kept<A, Q, B::kUnit> kept(dynamic_shared() + threadIdx.y * Kept<A, Q, B::kUnit>::bytes(student.v), student.v,
                                    columns.head);
    const auto load_c_dq = [&](const auto& place, A* c, A* dq) {
      load(dq_row, place, dq, A(0));
      student_row.load_x(place, c);
#pragma unroll
      for (int e = 0; e < place.kSize; ++e) c[e] = engine_fast::carrier(c[e], max, inv_sum, inv_temperature);
    };
    A dot = 0;
    for_batches([&](const auto& place) {
      constexpr int kSize = std::remove_cvref_t<decltype(place)>::kSize;
      A c[kSize], dq[kSize];
      load_c_dq(place, c, dq);
      if (keep) {
        store(c, place, kept.c);
        store(dq, place, kept.dq);
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e) dot += unless_zero(c[e], c[e] * dq[e]);
    });
    const A mean = sum_over_row(dot);
    // Each thread meets the columns of its first pass again: what it kept, and what it overwrites, is its own.
    for_batches([&](const auto& place) {
      constexpr int kSize = std::remove_cvref_t<decltype(place)>::kSize;
      A c[kSize], dq[kSize];
      if (keep) {
        load(kept.c, place, c, A(0));
        load(kept.dq, place, dq, A(0));
      } else {
        load_c_dq(place, c, dq);
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e) c[e] = embedding_gradient(c[e], dq[e], mean, inv_temperature);
      put(base_row, place, c, out_row);
    });
  }
}

template <typename Z, typename Q, bool kNoise>
cudaError_t launch(const CarrierBackward& args, Shape shape, cudaStream_t stream) {
  if (args.student.relaxation.identity) return start(identity_backward_kernel<Z, Q>, shape, 0, stream, args);
  const auto kernel = carrier_backward_kernel<Z, Q, kNoise>;
  constexpr int kUnit = Batch<8, Z, Q>::kUnit;
  int most = 0;
  cudaError_t error = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most);
  if (error != cudaSuccess) return error;
  const int64_t bytes = Kept<Accumulate<Z>, Q, kUnit>::bytes(args.student.v) * shape.block.y;
  const bool keep = bytes + kStaticShared <= most;
  if (keep) {
    // Few blocks fit beside each other then: each needs more threads to keep the memory busy.
    if (shape.block.y == 1 && shape.block.x > 32)
      while (bytes * kThreadsAProcessor > static_cast<int64_t>(most) * shape.block.x &&
             static_cast<int>(shape.block.x) < Bounds<Z, kNoise>::kThreads)
        shape.block.x *= 2;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  return start(kernel, shape, keep ? bytes : 0, stream, args, keep);
}

}  // namespace

cudaError_t carrier_backward(const CarrierBackward& args, cudaStream_t stream) {
  return launch_pair(
      args.student, args.dq.dtype, args.student.v, Reduces::kYes,
      [&]<typename Z, typename Q, bool kNoise>(Type<Z>, Type<Q>, std::bool_constant<kNoise>, const Shape& shape) {
        return launch<Z, Q, kNoise>(args, shape, stream);
      });
}

}  // namespace engine_fast::cuda
