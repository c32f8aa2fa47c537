// Energies and statistics of rows: z and s are read once, whatever the vocabulary.
#include "cuda/batch_state.cuh"
#include "cuda/launch.h"
#include "cuda/shape.cuh"

namespace engine_fast::cuda {
namespace {

template <typename Z, typename S, bool kNoise>
__global__ __launch_bounds__(Bounds<Z, kNoise>::kThreads, Bounds<Z, kNoise>::kBlocks) void energy_forward_kernel(
    const EnergyForward args) {
  using A = Accumulate<Z>;
  using B = Batch<kNoise || sizeof(A) == 8 ? 8 : 16, Z, S>;
  const Student& student = args.student;
  const bool hard = student.relaxation.hard;
  const bool sums = !(hard && student.relaxation.identity);  // nothing of STL needs the softmax of z
  const A inv_temperature = static_cast<A>(student.relaxation.inv_temperature);
  A* const energies = static_cast<A*>(args.energy);
  A* const all_stats = static_cast<A*>(args.stats);
  for (int64_t row = first_row(); row < student.n; row += row_step()) {
    A* const stats = all_stats + row * kEnergyStats;
    if (ignored(student, row)) {
      if (threadIdx.x == 0) energies[row] = A(0);
      if (threadIdx.x < kEnergyStats) stats[threadIdx.x] = A(0);
      continue;
    }
    const StudentRow<Z, kNoise> student_row(student, row);
    const S* const s_row = row_of<const S>(args.s, row);
    const Columns columns = columns_of<B::kUnit>(0, static_cast<int>(student.v), origin(student_row.z, 0),
                                                 origin(s_row, 0), origin(student_row.values, 0));
    RowState<A> state;
    walk<B::kUnit, B::kUnits>(columns, lane_of_row(), lanes_of_row(), [&](const auto& place) {
      A x[place.kSize], s[place.kSize];
      load(s_row, place, s, minus_infinity<A>());
      student_row.load_x(place, x);
      state = merge(state, row_state_of(place, x, s, inv_temperature, sums), inv_temperature);
    });
    if (!merge_over_row(state, inv_temperature)) continue;
    if (state.z.argmax >= student.v) state.z.argmax = 0;  // NaN has none
    const A energy = energy_of(state, hard, hard ? static_cast<A>(widen(s_row[state.z.argmax])) : A(0));
    energies[row] = args.weight == nullptr ? energy : energy * static_cast<const A*>(args.weight)[row];
    store(state, stats);
  }
}

}  // namespace

cudaError_t energy_forward(const EnergyForward& args, cudaStream_t stream) {
  return launch_pair(
      args.student, args.s.dtype, args.student.v, Reduces::kYes,
      [&]<typename Z, typename S, bool kNoise>(Type<Z>, Type<S>, std::bool_constant<kNoise>, const Shape& shape) {
        return start(energy_forward_kernel<Z, S, kNoise>, shape, 0, stream, args);
      });
}

}  // namespace engine_fast::cuda
