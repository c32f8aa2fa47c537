// The statistics of the student's logits alone: z is read once.
#include "cuda/batch_state.cuh"
#include "cuda/launch.h"
#include "cuda/shape.cuh"

namespace engine_fast::cuda {
namespace {

template <typename Z, bool kNoise>
__global__ __launch_bounds__(Bounds<Z, kNoise>::kThreads, Bounds<Z, kNoise>::kBlocks) void soft_forward_kernel(
    const SoftForward args) {
  using A = Accumulate<Z>;
  using B = Batch<kNoise || sizeof(A) == 8 ? 8 : 16, Z>;
  const Student& student = args.student;
  const bool sums = !(student.relaxation.hard && student.relaxation.identity);
  const A inv_temperature = static_cast<A>(student.relaxation.inv_temperature);
  for (int64_t row = first_row(); row < student.n; row += row_step()) {
    A* const stats = static_cast<A*>(args.stats) + row * kSoftStats;
    if (ignored(student, row)) {
      if (threadIdx.x < kSoftStats) stats[threadIdx.x] = A(0);
      continue;
    }
    const StudentRow<Z, kNoise> student_row(student, row);
    const Columns columns = columns_of<B::kUnit>(0, static_cast<int>(student.v), origin(student_row.z, 0),
                                                 origin(student_row.values, 0));
    SoftState<A> state;
    walk<B::kUnit, B::kUnits>(columns, lane_of_row(), lanes_of_row(), [&](const auto& place) {
      A x[place.kSize];
      student_row.load_x(place, x);
      state = merge(state, soft_state_of(place, x, inv_temperature, sums), inv_temperature);
    });
    if (!merge_over_row(state, inv_temperature)) continue;
    if (state.argmax >= student.v) state.argmax = 0;  // NaN has none
    store(state, stats);
  }
}

}  // namespace

cudaError_t soft_forward(const SoftForward& args, cudaStream_t stream) {
  return launch_pair(
      args.student, args.student.z.dtype, args.student.v, Reduces::kYes,
      [&]<typename Z, bool kNoise>(Type<Z>, auto, std::bool_constant<kNoise>, const Shape& shape) {
        return start(soft_forward_kernel<Z, kNoise>, shape, 0, stream, args);
      });
}

}  // namespace engine_fast::cuda
