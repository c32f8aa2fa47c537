// Runs every CUDA launcher without torch and compares with a plain computation in double precision.
// Usage: cuda_smoke [--quick | --host]     --host: only what CPU and GPU share, needs no GPU
// Exit code 0: all right, 1: not, 77: no GPU.
#include <algorithm>
#include <cstring>

#include "compare.h"
#include "cuda/launch.h"
#include "host_checks.h"
#include "reference.h"
#include "row/state.h"

namespace smoke {
namespace {

using engine_fast::kEnergyStats;
using engine_fast::kSoftStats;
using engine_fast::Student;
namespace kernels = engine_fast::cuda;

// A problem on the device.
struct Uploaded {
  const Problem& p;
  DeviceMatrix z, s, g, dq, base, weight, grad;
  DeviceVector<uint8_t> ignore;
  DeviceVector<int64_t> seed{{kSeed}};

  explicit Uploaded(const Problem& problem)
      : p(problem),
        z(p.z_type, p.layout.n, p.layout.v, p.layout.z_offset, p.layout.z_pad),
        s(p.s_type, p.layout.n, p.layout.v, p.layout.s_offset, p.layout.s_pad),
        g(p.wide(), p.layout.n, p.layout.v),
        dq(p.s_type, p.layout.n, p.layout.v, p.layout.s_offset, p.layout.s_pad),
        base(p.z_type, p.layout.n, p.layout.v, p.layout.z_offset, p.layout.z_pad),
        weight(p.wide(), 1, p.layout.n),
        grad(p.wide(), 1, p.layout.n),
        ignore(p.ignore) {
    refresh();
    g.upload(p.g);
    weight.upload(p.weight);
    grad.upload(p.grad);
  }

  void refresh() {  // after kernels that wrote in place
    z.upload(p.z);
    s.upload(p.s);
    dq.upload(p.dq);
    base.upload(p.base);
  }

  Student student() const {
    Student student;
    student.z = z.matrix();
    if (p.op.noise == NoiseKind::kSeed) student.noise.seed = seed.data();
    if (p.op.noise == NoiseKind::kSeed) student.noise.first_row = kFirstRow;
    if (p.op.noise == NoiseKind::kValues) student.noise.values = g.matrix();
    student.relaxation = {p.op.hard, p.op.identity, 1 / p.op.temperature};
    student.ignore = ignore.data();
    student.n = p.layout.n;
    student.v = p.layout.v;
    return student;
  }
};

// Statistics: maxima and argmax exactly, sums nearly; what a NaN row has beside its maximum is free, argmax in range.
void compare_stats(const char* what, Comparison& c, const Problem& p, std::vector<double> got,
                   std::vector<double> truth, int64_t count) {
  for (int64_t i = 0; i < p.layout.n; ++i) {
    double *a = &got[i * count], *b = &truth[i * count];
    if (p.op.identity) a[1] = b[1];
    if (p.op.identity && count == kEnergyStats) a[5] = b[5];
    const bool lost = !std::isfinite(b[0]) || (count == kEnergyStats && std::isnan(b[3]));
    c.that(std::string(what) + ": argmax in range", a[2] >= 0 && a[2] < p.layout.v);
    if (!lost) c.that(std::string(what) + ": maxima and argmax", a[0] == b[0] && a[2] == b[2]);
    if (lost) std::copy(b, b + count, a);
  }
  for (int64_t k = 0; k < count; ++k) {  // a column at a time: each has its own scale
    std::vector<double> x, y;
    for (int64_t i = 0; i < p.layout.n; ++i) x.push_back(got[i * count + k]), y.push_back(truth[i * count + k]);
    c.rows(std::string(what) + " " + std::to_string(k), x, y, 1, p.wide(), p.wide(), 1);
  }
}

void check_energy(Comparison& c, const Problem& p, const Truth& truth) {
  const auto [n, v, z_offset, z_pad, s_offset, s_pad] = p.layout;
  Uploaded d(p);
  DeviceMatrix energy(p.wide(), 1, n), stats(p.wide(), n, kEnergyStats);
  const engine_fast::EnergyForward forward{d.student(), d.s.matrix(), d.weight.data(), energy.data(), stats.data()};
  CHECK_CUDA(kernels::energy_forward(forward, nullptr));
  const auto energies = energy.download(), all_stats = stats.download();
  c.rows("energy", energies, truth.energy, 1, p.wide(), p.wide(), 5);
  compare_stats("stats", c, p, all_stats, truth.stats, kEnergyStats);
  energy.poison();
  CHECK_CUDA(kernels::energy_forward(forward, nullptr));
  c.equal("energy again", energy.download(), energies);

  DeviceMatrix dz(p.z_type, n, v, z_offset, z_pad), ds(p.s_type, n, v, s_offset, s_pad);
  engine_fast::EnergyBackward backward{d.student(),  d.s.matrix(), d.weight.data(), d.grad.data(),
                                       stats.data(), dz.matrix(),  ds.matrix()};
  CHECK_CUDA(kernels::energy_backward(backward, nullptr));
  const auto dz_both = dz.download(), ds_both = ds.download();
  c.rows("dz", dz_both, truth.dz, v, p.z_type, p.wide(), 0, &truth.dz_terms);
  c.rows("ds", ds_both, truth.ds, v, p.s_type, p.wide(), 0, &truth.ds_terms);
  c.that("around dz and ds", dz.surroundings_intact() && ds.surroundings_intact());

  dz.poison(), ds.poison();
  backward.ds.data = nullptr;
  CHECK_CUDA(kernels::energy_backward(backward, nullptr));
  c.equal("dz alone", dz.download(), dz_both);
  backward.dz.data = nullptr, backward.ds = ds.matrix();
  CHECK_CUDA(kernels::energy_backward(backward, nullptr));
  c.equal("ds alone", ds.download(), ds_both);

  backward.dz = d.z.matrix(), backward.ds = d.s.matrix();
  CHECK_CUDA(kernels::energy_backward(backward, nullptr));
  c.equal("dz in place of z", d.z.download(), dz_both);
  c.equal("ds in place of s", d.s.download(), ds_both);
  c.that("around z and s", d.z.surroundings_intact() && d.s.surroundings_intact());
  d.refresh();
  backward.dz = d.s.matrix(), backward.ds = d.z.matrix();
  CHECK_CUDA(kernels::energy_backward(backward, nullptr));
  c.rows("dz in place of s", d.s.download(), truth.dz, v, p.s_type, p.wide(), 0, &truth.dz_terms);
  c.rows("ds in place of z", d.z.download(), truth.ds, v, p.z_type, p.wide(), 0, &truth.ds_terms);
}

void check_soft(Comparison& c, const Problem& p, const Truth& truth) {
  const auto [n, v, z_offset, z_pad, s_offset, s_pad] = p.layout;
  Uploaded d(p);
  DeviceMatrix stats(p.wide(), n, kSoftStats);
  CHECK_CUDA(kernels::soft_forward({d.student(), stats.data()}, nullptr));
  compare_stats("soft stats", c, p, stats.download(), truth.soft_stats, kSoftStats);

  for (const int64_t first : {int64_t{0}, v / 3, v - 1}) {
    if (p.op.identity) break;  // has no softmax
    const int64_t columns = first == 0 ? v : (v - first + 1) / 2;
    DeviceMatrix out(p.s_type, n, columns, s_offset, s_pad);
    CHECK_CUDA(kernels::carrier({d.student(), stats.data(), first, columns, out.matrix()}, nullptr));
    std::vector<double> wanted(n * columns);
    for (int64_t i = 0; i < n; ++i)
      std::copy_n(&truth.c[i * v + first], columns, &wanted[i * columns]);
    c.rows("carrier from " + std::to_string(first), out.download(), wanted, columns, p.s_type, p.wide());
    c.that("around the carrier", out.surroundings_intact());
  }

  std::vector<double> with_base = truth.embedding;
  for (size_t e = 0; e < with_base.size(); ++e) with_base[e] += p.base[e];
  DeviceMatrix out(p.z_type, n, v, z_offset, z_pad);
  const auto run = [&](const Matrix& base, const Matrix& into) {
    CHECK_CUDA(kernels::carrier_backward({d.student(), stats.data(), d.dq.matrix(), base, into}, nullptr));
  };
  run({}, out.matrix());
  c.rows("embedding gradient", out.download(), truth.embedding, v, p.z_type, p.wide(), 0, &truth.embedding_terms);
  c.that("around the gradient", out.surroundings_intact());
  out.poison();
  run(d.base.matrix(), out.matrix());
  const auto sum = out.download();
  c.rows("base + gradient", sum, with_base, v, p.z_type, p.wide(), 0, &truth.embedding_terms);
  run(d.base.matrix(), d.base.matrix());
  c.equal("in place of base", d.base.download(), sum);
  d.refresh();
  run(d.base.matrix(), d.z.matrix());
  c.equal("in place of z", d.z.download(), sum);
  d.refresh();
  if (p.z_type == p.s_type && p.layout.z_offset == p.layout.s_offset && p.layout.z_pad == p.layout.s_pad) {
    run(d.base.matrix(), d.dq.matrix());
    c.equal("in place of dq", d.dq.download(), sum);
  }
}

__global__ void noise_kernel(float* out, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x)
    out[i] = engine_fast::gumbel_at(kSeed, kFirstRow + i % 3, i);
}

// The same bits on both sides: the energies of SG and GX would agree with noise that is only close.
void check_noise_bits(Comparison& c) {
  constexpr int64_t kCount = 100000;
  DeviceMatrix out(DType::kFloat32, 1, kCount);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(256);
  CHECK_CUDA(cudaLaunchKernelEx(&config, noise_kernel, static_cast<float*>(out.data()), kCount));
  std::vector<double> wanted;
  for (int64_t i = 0; i < kCount; ++i) wanted.push_back(engine_fast::gumbel_at(kSeed, kFirstRow + i % 3, i));
  c.equal("noise bits", out.download(), wanted);
}

void check_refusals(Comparison& c) {
  Student student;
  engine_fast::EnergyForward forward{student, {}, nullptr, nullptr, nullptr};
  c.that("no rows, nothing launched", kernels::energy_forward(forward, nullptr) == cudaSuccess);
  forward.student.n = forward.student.v = 1;
  forward.student.z.dtype = DType::kBFloat16, forward.s.dtype = DType::kFloat16;
  c.that("bfloat16 with float16", kernels::energy_forward(forward, nullptr) == cudaErrorInvalidValue);
  forward.student.z.dtype = DType::kFloat64, forward.s.dtype = DType::kFloat32;
  c.that("float64 with float32", kernels::energy_forward(forward, nullptr) == cudaErrorInvalidValue);
}

#ifndef ENGINE_FAST_EMULATED
// A captured graph reads the seed that the device holds when it is replayed.
void check_graph(Comparison& c) {
  const Layout layout{9, 1271, 0, 0, 0, 0};
  const Problem p = make_problem(layout, DType::kBFloat16, DType::kBFloat16, kOperators[4]);
  Uploaded d(p);
  DeviceMatrix energy(p.wide(), 1, layout.n), stats(p.wide(), layout.n, kEnergyStats);
  const engine_fast::EnergyForward forward{d.student(), d.s.matrix(), nullptr, energy.data(), stats.data()};
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK_CUDA(cudaStreamCreate(&stream));
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  CHECK_CUDA(kernels::energy_forward(forward, stream));
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  const auto replay = [&] {
    CHECK_CUDA(cudaGraphLaunch(executable, stream));
    CHECK_CUDA(cudaStreamSynchronize(stream));
    return energy.download();
  };
  const auto first = replay();
  const int64_t other = kSeed + 1;
  CHECK_CUDA(cudaMemcpy(d.seed.data(), &other, sizeof(other), cudaMemcpyHostToDevice));
  const auto second = replay();
  energy.poison();
  CHECK_CUDA(kernels::energy_forward(forward, nullptr));
  c.equal("graph with another seed", second, energy.download());
  c.that("another seed, another energy", first[0] != second[0]);
  CHECK_CUDA(cudaGraphExecDestroy(executable));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaStreamDestroy(stream));
}
#endif

int finish(const char* group, const Comparison& c) {
  std::printf("%-58s worst %-8.2g %s\n", group, c.worst(), c.failures() == 0 ? "ok" : "FAILED");
  std::fflush(stdout);
  return c.failures();
}

int run_all(bool quick) {
  constexpr DType f32 = DType::kFloat32, f64 = DType::kFloat64, b16 = DType::kBFloat16, f16 = DType::kFloat16;
  constexpr DType pairs[][2] = {{f32, f32}, {b16, b16}, {f16, f16}, {f32, b16},
                                {b16, f32}, {f32, f16}, {f16, f32}, {f64, f64}};
  const Layout layouts[] = {
      {1, 1, 0, 0, 0, 0},    {3, 7, 0, 0, 0, 0},     {9, 16, 0, 0, 0, 0},    {9, 17, 1, 0, 1, 0},
      {9, 1271, 0, 0, 0, 0}, {9, 1271, 1, 3, 2, 5},  {9, 1032, 3, 1, 3, 1},  {9, 4000, 0, 0, 0, 0},
      {260, 12, 0, 0, 0, 0}, {4, 32000, 0, 0, 0, 0}, {4243, 12, 0, 0, 0, 0}, {2, 131072, 0, 0, 0, 0}};
  int failures = 0;
  Comparison noise, refusals;
  check_noise_bits(noise);
  failures += finish("noise has the same bits as on the host", noise);
  check_refusals(refusals);
  failures += finish("refusals and empty launches", refusals);
#ifndef ENGINE_FAST_EMULATED
  Comparison graph;
  check_graph(graph);
  failures += finish("CUDA graph", graph);
#endif
  for (const auto& [z_type, s_type] : pairs)
    for (const Layout& layout : layouts) {
      if (quick && layout.n * layout.v > 12000 && !(z_type == b16 && s_type == b16 && layout.v == 32000)) continue;
      Comparison c;
      for (const Operator& op : kOperators) {
        const Problem p = make_problem(layout, z_type, s_type, op);
        const Truth truth = truth_of(p);
        const int before = c.failures();
        check_energy(c, p, truth);
        check_soft(c, p, truth);
        if (c.failures() > before) std::printf("  ^ operator %s\n", op.name);
      }
      char group[128];
      std::snprintf(group, sizeof(group), "%s, %s: %lld x %lld, offsets %lld %lld", name_of(z_type), name_of(s_type),
                    static_cast<long long>(layout.n), static_cast<long long>(layout.v),
                    static_cast<long long>(layout.z_offset), static_cast<long long>(layout.s_offset));
      failures += finish(group, c);
    }
  return failures;
}

}  // namespace
}  // namespace smoke

int main(int argc, char** argv) {
  const auto given = [&](const char* flag) { return argc == 2 && std::strcmp(argv[1], flag) == 0; };
  if (argc > 1 && !given("--host") && !given("--quick")) {
    std::fprintf(stderr, "usage: cuda_smoke [--quick | --host]\n");
    return 2;
  }
  if (given("--host")) return smoke::host_checks() ? 0 : 1;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "cuda_smoke: no GPU here. --host checks what needs none.\n");
    return 77;
  }
  const int failures = smoke::run_all(given("--quick"));
  std::printf(failures == 0 ? "cuda_smoke: everything agrees\n" : "cuda_smoke: %d differences\n", failures);
  return failures == 0 ? 0 : 1;
}
