// Columns of the softmax of the student's logits, from the rows' saved statistics.
#include "cuda/launch.h"
#include "cuda/shape.cuh"
#include "row/jacobian.h"
#include "row/state.h"

namespace engine_fast::cuda {
namespace {

template <typename Z, typename Q, bool kNoise>
__global__ __launch_bounds__(Bounds<Z, kNoise>::kThreads, Bounds<Z, kNoise>::kBlocks) void carrier_kernel(
    const Carrier args) {
  using A = Accumulate<Z>;
  using B = Batch<kNoise || sizeof(A) == 8 ? 8 : 16, Z, Q>;
  const Student& student = args.student;
  const int begin = static_cast<int>(args.first_column), end = begin + static_cast<int>(args.columns);
  const A inv_temperature = static_cast<A>(student.relaxation.inv_temperature);
  for (int64_t row = first_row(); row < student.n; row += row_step()) {
    const StudentRow<Z, kNoise> student_row(student, row);
    Q* const out_row = row_of<Q>(args.out, row) - begin;  // so that it is indexed like z
    const Columns columns = columns_of<B::kUnit>(begin, end, origin(student_row.z, begin), origin(out_row, begin),
                                                 origin(student_row.values, begin));
    const bool skip = ignored(student, row);
    const A* const stats = static_cast<const A*>(args.stats) + row * kSoftStats;
    const A max = stats[0], inv_sum = A(1) / stats[1];
    walk<B::kUnit, B::kUnits>(columns, lane_of_row(), lanes_of_row(), [&](const auto& place) {
      constexpr int kSize = std::remove_cvref_t<decltype(place)>::kSize;
      A x[kSize];
      if (!skip) student_row.load_x(place, x);
#pragma unroll
      for (int e = 0; e < kSize; ++e)
        x[e] = skip ? A(0) : engine_fast::carrier(x[e], max, inv_sum, inv_temperature);
      store(x, place, out_row);
    });
  }
}

}  // namespace

cudaError_t carrier(const Carrier& args, cudaStream_t stream) {
  return launch_pair(
      args.student, args.out.dtype, args.columns, Reduces::kNo,
      [&]<typename Z, typename Q, bool kNoise>(Type<Z>, Type<Q>, std::bool_constant<kNoise>, const Shape& shape) {
        return start(carrier_kernel<Z, Q, kNoise>, shape, 0, stream, args);
      });
}

}  // namespace engine_fast::cuda
