// Energies of rows of logits and their gradients, on a CPU.
#include "cpu/kernels.h"
#include "cpu/student.h"
#include "row/jacobian.h"

namespace engine_fast::cpu {
namespace {

// Adds the teacher's sum and the dot product to a block whose maxima are known.
template <typename A, typename Z, typename S>
void add_up(const Z* z, const S* s, const A* noise, int64_t count, A inv_temperature, bool soft, RowState<A>& block) {
  constexpr A low = minus_infinity<A>();
  const Pair<A> max_z(origin(block.z.max)), max_s(origin(block.max_s)), scale(inv_temperature);
  Pair<A> sum_z(A(0)), sum_s(A(0)), dot(A(0));
  if (soft) {
    for_lanes<A>(count, EF_LANES(i, n) {
      fetch_ahead<A>(z + i);
      fetch_ahead<A>(s + i);
      const Pair<A> below = load<A>(s + i, n, low) - max_s;
      const Pair<A> c = exp_of((perturbed(z, noise, i, n, low) - max_z) * scale);
      sum_s = sum_s + exp_of(below);
      sum_z = sum_z + c;
      dot = dot + unless_zero(c, c * below);
    });
    block.z.sum = sum_lanes(sum_z);
    block.dot = sum_lanes(dot);
  } else {
    for_lanes<A>(count, EF_LANES(i, n) {
      fetch_ahead<A>(z + i);
      fetch_ahead<A>(s + i);
      sum_s = sum_s + exp_of(load<A>(s + i, n, low) - max_s);
      sum_z = sum_z + nan_of(perturbed(z, noise, i, n));
    });
    block.z.sum = sum_lanes(sum_z);
  }
  block.sum_s = sum_lanes(sum_s);
}

template <typename A, typename S>
A largest_of(const S* s, int64_t count) {
  constexpr A low = minus_infinity<A>();
  Pair<A> lanes(low);
  for_lanes<A>(count, EF_LANES(i, n) { lanes = max_but_nan(lanes, load<A>(s + i, n, low)); });
  return max_lanes(lanes);
}

template <typename A, typename Z, typename S>
void forward_row(const EnergyForward& args, int64_t row) {
  A *energy = static_cast<A*>(args.energy) + row, *stats = static_cast<A*>(args.stats) + row * kEnergyStats;
  const Student& student = args.student;
  if (ignored(student, row)) {
    *energy = 0;
    std::fill_n(stats, kEnergyStats, A(0));
    return;
  }
  const Z* z = row_of<Z>(student.z, row);
  const S* s = row_of<S>(args.s, row);
  const auto inv_temperature = static_cast<A>(student.relaxation.inv_temperature);
  RowState<A> state;
  for_blocks<A>(student, row, 0, student.v, [&](int64_t begin, int64_t count, const A* noise) {
    RowState<A> block;
    block.z = largest<A>(z + begin, noise, count, begin);
    block.max_s = largest_of<A>(s + begin, count);
    add_up(z + begin, s + begin, noise, count, inv_temperature, !student.relaxation.identity, block);
    state = merge(state, block, inv_temperature);
  });
  find_argmax<A, Z>(student, row, state.z);
  store(state, stats);
  *energy = energy_of(state, student.relaxation.hard, static_cast<A>(s[state.z.argmax]));
  if (args.weight) *energy *= static_cast<const A*>(args.weight)[row];
}

// One row's saved numbers, as the formulas of row/jacobian.h want them.
template <typename A>
struct Saved {
  A max_z, inv_sum_z, max_s, mean, log_sum_s, u, u_over_sum_s, inv_temperature;
  int64_t argmax;
};

template <typename A>
Saved<A> saved_of(const EnergyBackward& args, int64_t row) {
  const A* stats = static_cast<const A*>(args.stats) + row * kEnergyStats;
  A u = static_cast<const A*>(args.grad)[row];
  if (args.weight) u *= static_cast<const A*>(args.weight)[row];
  u += stats[0] - stats[0];  // NaN where the forward pass was
  Saved<A> saved;
  saved.max_z = stats[0];
  saved.inv_sum_z = A(1) / stats[1];
  saved.argmax = stats[2] >= 0 && stats[2] < args.student.v ? static_cast<int64_t>(stats[2]) : 0;  // never outside
  saved.max_s = stats[3];
  saved.log_sum_s = log_of(stats[4]);
  saved.mean = stats[5];
  saved.u = u;
  saved.u_over_sum_s = u / stats[4];
  saved.inv_temperature = static_cast<A>(args.student.relaxation.inv_temperature);
  return saved;
}

enum class Kind { kSoft, kHard, kHardIdentity };

// Every element is read before anything is written in its place: dz and ds may stand where z and s do.
template <Kind kKind, bool kDz, bool kDs, typename A, typename Z, typename S>
void backward_block(const Saved<A>& saved, const Z* z, const S* s, const A* noise, int64_t count, Z* dz, S* ds) {
  using F = Pair<A>;
  constexpr bool kCarrier = kKind == Kind::kSoft || (kDz && kKind == Kind::kHard);
  const F u_over_temperature(saved.u * saved.inv_temperature);
  for_lanes<A>(count, EF_LANES(i, n) {
    if constexpr (kDz || kCarrier) fetch_ahead<A>(z + i);
    fetch_ahead<A>(s + i);
    const F x = kDz || kCarrier ? perturbed(z, noise, i, n) : F(A(0));
    const F below = load<A>(s + i, n) - F(saved.max_s);
    F c(A(0));
    if constexpr (kCarrier) c = carrier(x, F(saved.max_z), F(saved.inv_sum_z), F(saved.inv_temperature));
    if constexpr (kDz) {
      const F gradient = kKind == Kind::kHardIdentity
                             ? identity_gradient(x, below, F(saved.log_sum_s), F(saved.u))
                             : softmax_gradient(c, below, F(saved.mean), u_over_temperature);
      store(gradient, dz + i, n);
    }
    if constexpr (kDs) {
      F gradient = exp_of(below) * F(saved.u_over_sum_s);
      if constexpr (kKind == Kind::kSoft) gradient = gradient - c * F(saved.u);
      store(gradient, ds + i, n);
    }
  });
}

template <Kind kKind, bool kDz, bool kDs, typename A, typename Z, typename S>
void backward_row(const EnergyBackward& args, int64_t row) {
  const Student& student = args.student;
  Z* dz = row_of<Z>(args.dz, row);
  S* ds = row_of<S>(args.ds, row);
  if (ignored(student, row)) {
    if (kDz) std::fill_n(dz, student.v, Z(0));
    if (kDs) std::fill_n(ds, student.v, S(0));
    return;
  }
  const Saved<A> saved = saved_of<A>(args, row);
  const Z* z = row_of<Z>(student.z, row);
  const S* s = row_of<S>(args.s, row);
  const A p = exp_of(static_cast<A>(s[saved.argmax]) - saved.max_s) * saved.u_over_sum_s;
  for_blocks<A>(student, row, 0, student.v, [&](int64_t begin, int64_t count, const A* noise) {
    backward_block<kKind, kDz, kDs>(saved, z + begin, s + begin, noise, count, kDz ? dz + begin : nullptr,
                                    kDs ? ds + begin : nullptr);
  });
  if (kDs && kKind != Kind::kSoft) ds[saved.argmax] = static_cast<S>(p - saved.u);
}

template <bool kDz, bool kDs, typename Z, typename S>
void backward(const EnergyBackward& args) {
  using A = Accumulate<Z>;
  const auto run = [&](auto kind) {
    for_rows(args.student.n, args.student.v,
             [&](int64_t row) { backward_row<decltype(kind)::value, kDz, kDs, A, Z, S>(args, row); });
  };
  if (!args.student.relaxation.hard) return run(std::integral_constant<Kind, Kind::kSoft>{});
  if (!args.student.relaxation.identity) return run(std::integral_constant<Kind, Kind::kHard>{});
  run(std::integral_constant<Kind, Kind::kHardIdentity>{});
}

}  // namespace

void energy_forward(const EnergyForward& args) {
  with_types(args.student.z.dtype, args.s.dtype, [&](auto z, auto s) {
    using Z = decltype(z);
    using S = decltype(s);
    for_rows(args.student.n, args.student.v, [&](int64_t row) { forward_row<Accumulate<Z>, Z, S>(args, row); });
  });
}

void energy_backward(const EnergyBackward& args) {
  with_types(args.student.z.dtype, args.s.dtype, [&](auto z, auto s) {
    using Z = decltype(z);
    using S = decltype(s);
    const bool dz = args.dz.data != nullptr, ds = args.ds.data != nullptr;
    if (dz && ds) return backward<true, true, Z, S>(args);
    if (dz) return backward<true, false, Z, S>(args);
    if (ds) return backward<false, true, Z, S>(args);
  });
}

}  // namespace engine_fast::cpu
