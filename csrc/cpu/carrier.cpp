// The softmax of the student's logits, block by block, and the gradient through it, on a CPU.
#include "cpu/kernels.h"
#include "cpu/student.h"
#include "row/jacobian.h"

namespace engine_fast::cpu {
namespace {

template <typename A, typename Z>
void statistics_row(const SoftForward& args, int64_t row) {
  const Student& student = args.student;
  A* stats = static_cast<A*>(args.stats) + row * kSoftStats;
  if (ignored(student, row)) return (void)std::fill_n(stats, kSoftStats, A(0));
  const Z* z = row_of<Z>(student.z, row);
  const auto inv_temperature = static_cast<A>(student.relaxation.inv_temperature);
  SoftState<A> state;
  for_blocks<A>(student, row, 0, student.v, [&](int64_t begin, int64_t count, const A* noise) {
    SoftState<A> block = largest<A>(z + begin, noise, count, begin);
    if (student.relaxation.identity)
      look_for_nan(z + begin, noise, count, block);
    else
      add_up(z + begin, noise, count, inv_temperature, block);
    state = merge(state, block, inv_temperature);
  });
  find_argmax<A, Z>(student, row, state);
  store(state, stats);
}

// One row's softmax: c of the lanes of x.
template <typename A>
struct Soft {
  Pair<A> max, inv_sum, inv_temperature;

  Soft(const Student& student, const void* stats, int64_t row)
      : max(static_cast<const A*>(stats)[row * kSoftStats]),
        inv_sum(A(1) / static_cast<const A*>(stats)[row * kSoftStats + 1]),
        inv_temperature(static_cast<A>(student.relaxation.inv_temperature)) {}

  Pair<A> operator()(const Pair<A>& x) const { return carrier(x, max, inv_sum, inv_temperature); }
};

template <typename A, typename Z, typename Q>
void carrier_row(const Carrier& args, int64_t row) {
  Q* out = row_of<Q>(args.out, row);
  if (ignored(args.student, row)) return (void)std::fill_n(out, args.columns, Q(0));
  const Z* z = row_of<Z>(args.student.z, row);
  const Soft<A> soft(args.student, args.stats, row);
  for_blocks<A>(args.student, row, args.first_column, args.columns, [&](int64_t begin, int64_t count, const A* noise) {
    Q* block = out + begin - args.first_column;
    for_lanes<A>(count, EF_LANES(i, lanes) {
      fetch<A>(z + begin + i + args.student.z.stride);  // a chunk of columns is narrow: the next row comes next
      store(soft(perturbed(z + begin, noise, i, lanes)), block + i, lanes);
    });
  });
}

template <typename A, typename Z, typename Q>
void backward_row(const CarrierBackward& args, int64_t row) {
  using F = Pair<A>;
  const Student& student = args.student;
  Z *out = row_of<Z>(args.out, row), *base = row_of<Z>(args.base, row);
  const Q* dq = row_of<Q>(args.dq, row);
  const auto finish = [&](const F& gradient, int64_t i, int64_t count) {
    store(base ? load<A>(base + i, count) + gradient : gradient, out + i, count);
  };
  if (ignored(student, row)) {
    for_lanes<A>(student.v, EF_LANES(i, lanes) { finish(F(A(0)), i, lanes); });
    return;
  }
  const Z* z = row_of<Z>(student.z, row);
  if (student.relaxation.identity) {  // no operator with it has noise, which would not move an infinity either
    for_lanes<A>(student.v, EF_LANES(i, lanes) {
      finish(unless_forbidden(load<A>(z + i, lanes), load<A>(dq + i, lanes)), i, lanes);
    });
    return;
  }
  const Soft<A> soft(student, args.stats, row);
  F dot(A(0));
  for_blocks<A>(student, row, 0, student.v, [&](int64_t begin, int64_t count, const A* noise) {
    for_lanes<A>(count, EF_LANES(i, lanes) {
      fetch_ahead<A>(z + begin + i);
      fetch_ahead<A>(dq + begin + i);
      const F c = soft(perturbed(z + begin, noise, i, lanes, minus_infinity<A>()));
      dot = dot + unless_zero(c, c * load<A>(dq + begin + i, lanes));
    });
  });
  const F mean(sum_lanes(dot));
  for_blocks<A>(student, row, 0, student.v, [&](int64_t begin, int64_t count, const A* noise) {
    for_lanes<A>(count, EF_LANES(i, lanes) {
      fetch_ahead<A>(z + begin + i);
      fetch_ahead<A>(dq + begin + i);
      const F c = soft(perturbed(z + begin, noise, i, lanes));
      const F gradient = embedding_gradient(c, load<A>(dq + begin + i, lanes), mean, soft.inv_temperature);
      finish(gradient, begin + i, lanes);
    });
  });
}

}  // namespace

void soft_forward(const SoftForward& args) {
  with_types(args.student.z.dtype, args.student.z.dtype, [&](auto z, auto) {
    using Z = decltype(z);
    for_rows(args.student.n, args.student.v, [&](int64_t row) { statistics_row<Accumulate<Z>, Z>(args, row); });
  });
}

void carrier(const Carrier& args) {
  with_types(args.student.z.dtype, args.out.dtype, [&](auto z, auto q) {
    using Z = decltype(z);
    using Q = decltype(q);
    for_rows(args.student.n, args.columns, [&](int64_t row) { carrier_row<Accumulate<Z>, Z, Q>(args, row); });
  });
}

void carrier_backward(const CarrierBackward& args) {
  with_types(args.student.z.dtype, args.dq.dtype, [&](auto z, auto q) {
    using Z = decltype(z);
    using Q = decltype(q);
    for_rows(args.student.n, args.student.v, [&](int64_t row) { backward_row<Accumulate<Z>, Z, Q>(args, row); });
  });
}

}  // namespace engine_fast::cpu
