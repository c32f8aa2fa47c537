// Gradients of energies: one pass over the elements, because everything about a row is in its saved scalars. Each
// thread reads an element's z and s before it writes the element's gradients, which may stand in their place.
#include "cuda/launch.h"
#include "cuda/shape.cuh"
#include "row/jacobian.h"
#include "row/state.h"

namespace engine_fast::cuda {
namespace {

// One row's scalars.
template <typename A>
struct Saved {
  A u, max_z, inv_sum_z, max_s, log_sum_s, u_over_sum_s, mean;
  int argmax;

  __device__ __forceinline__ Saved(const EnergyBackward& args, int64_t row) {
    const A* stats = static_cast<const A*>(args.stats) + row * kEnergyStats;
    max_z = stats[0];
    inv_sum_z = A(1) / stats[1];
    argmax = static_cast<int>(stats[2]);
    max_s = stats[3];
    log_sum_s = log_of(stats[4]);
    mean = stats[5];
    u = static_cast<const A*>(args.grad)[row];
    if (args.weight != nullptr) u *= static_cast<const A*>(args.weight)[row];
    u += max_z - max_z;  // NaN where energy_of says so: a hard q or the identity would not show it
    u_over_sum_s = u / stats[4];
  }
};

template <int kSize, typename A>
__device__ __forceinline__ void fill(A* to, A value) {
#pragma unroll
  for (int e = 0; e < kSize; ++e) to[e] = value;
}

// An output is of its own logits' dtype, or of the other's where it replaces those.
template <typename Own, typename Other, typename Place, typename A>
__device__ __forceinline__ void store_as(const Matrix& matrix, bool own, int64_t row, const Place& place,
                                         const A* from) {
  if (own)
    store(from, place, row_of<Own>(matrix, row));
  else
    store(from, place, row_of<Other>(matrix, row));
}

// With noise it wants more registers than Bounds leaves.
template <typename Z, typename S, bool kNoise>
__global__ __launch_bounds__(Bounds<Z, kNoise>::kThreads, 2) void energy_backward_kernel(const EnergyBackward args,
                                                                                         bool own_dz, bool own_ds) {
  using A = Accumulate<Z>;
  using B = Batch<8, Z, S>;
  const Student& student = args.student;
  const bool hard = student.relaxation.hard, identity = student.relaxation.identity;
  const bool dz = args.dz.data != nullptr, ds = args.ds.data != nullptr;
  const bool reads_z = dz || !hard, needs_c = (dz && !identity) || (ds && !hard);
  const A inv_temperature = static_cast<A>(student.relaxation.inv_temperature);
  for (int64_t row = first_row(); row < student.n; row += row_step()) {
    const StudentRow<Z, kNoise> student_row(student, row);
    const S* const s_row = row_of<const S>(args.s, row);
    const Columns columns = columns_of<B::kUnit>(
        0, static_cast<int>(student.v), origin(student_row.z, 0), origin(s_row, 0), origin(student_row.values, 0),
        own_dz ? origin(row_of<Z>(args.dz, row), 0) : origin(row_of<S>(args.dz, row), 0),
        own_ds ? origin(row_of<S>(args.ds, row), 0) : origin(row_of<Z>(args.ds, row), 0));
    const auto put_dz = [&](const auto& place, const A* from) { store_as<Z, S>(args.dz, own_dz, row, place, from); };
    const auto put_ds = [&](const auto& place, const A* from) { store_as<S, Z>(args.ds, own_ds, row, place, from); };
    if (ignored(student, row)) {
      walk<B::kUnit, B::kUnits>(columns, lane_of_row(), lanes_of_row(), [&](const auto& place) {
        A zeros[place.kSize];
        fill<place.kSize>(zeros, A(0));
        if (dz) put_dz(place, zeros);
        if (ds) put_ds(place, zeros);
      });
      continue;
    }
    const Saved<A> saved(args, row);
    const A u_over_temperature = saved.u * inv_temperature;
    walk<B::kUnit, B::kUnits>(columns, lane_of_row(), lanes_of_row(), [&](const auto& place) {
      constexpr int kSize = std::remove_cvref_t<decltype(place)>::kSize;
      A x[kSize], s[kSize], out[kSize];
      load(s_row, place, s, A(0));
      if (reads_z)
        student_row.load_x(place, x);
      else
        fill<kSize>(x, A(0));
      if (dz && identity) {
#pragma unroll
        for (int e = 0; e < kSize; ++e)
          out[e] = identity_gradient(x[e], s[e] - saved.max_s, saved.log_sum_s, saved.u);
        put_dz(place, out);
      }
      if (needs_c) {
#pragma unroll
        for (int e = 0; e < kSize; ++e)
          x[e] = engine_fast::carrier(x[e], saved.max_z, saved.inv_sum_z, inv_temperature);
      }
      if (dz && !identity) {
#pragma unroll
        for (int e = 0; e < kSize; ++e)
          out[e] = softmax_gradient(x[e], s[e] - saved.max_s, saved.mean, u_over_temperature);
        put_dz(place, out);
      }
      if (ds) {
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const A q = hard ? (place.column(e) == saved.argmax ? A(1) : A(0)) : x[e];
          out[e] = teacher_gradient(s[e], saved.max_s, saved.u_over_sum_s) - unless_zero(q, saved.u * q);
        }
        put_ds(place, out);
      }
    });
  }
}

// Whether `matrix`, of one of two dtypes, has the first; an absent one does.
cudaError_t is_own(const Matrix& matrix, DType own, DType other, bool* result) {
  *result = matrix.data == nullptr || matrix.dtype == own;
  return *result || matrix.dtype == other ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t energy_backward(const EnergyBackward& args, cudaStream_t stream) {
  if (args.dz.data == nullptr && args.ds.data == nullptr) return cudaSuccess;
  const DType z_type = args.student.z.dtype, s_type = args.s.dtype;
  bool own_dz = true, own_ds = true;
  for (const cudaError_t error : {is_own(args.dz, z_type, s_type, &own_dz), is_own(args.ds, s_type, z_type, &own_ds)})
    if (error != cudaSuccess) return error;
  return launch_pair(
      args.student, s_type, args.student.v, Reduces::kNo,
      [&]<typename Z, typename S, bool kNoise>(Type<Z>, Type<S>, std::bool_constant<kNoise>, const Shape& shape) {
        return start(energy_backward_kernel<Z, S, kNoise>, shape, 0, stream, args, own_dz, own_ds);
      });
}

}  // namespace engine_fast::cuda
