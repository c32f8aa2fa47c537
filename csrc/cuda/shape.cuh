// Grid and block of a launch: enough threads to keep the memory busy, and as few as that allows on one row, because
// whole batches fill short rows better and a small block merges sooner.
#pragma once

#include "cuda/student.cuh"

namespace engine_fast::cuda {

constexpr int64_t kMaxColumns = int64_t{1} << 24;  // columns are int here and exact in the float32 of the statistics
constexpr int64_t kWarpColumns = 1024;             // up to here a warp takes a row
constexpr int64_t kColumnsAThread = 16;            // one batch
constexpr int64_t kThreadsAProcessor = 1024;       // with some 64 bytes in flight each

// __launch_bounds__, chosen for the registers that they leave a thread: 64, with noise 80, for double 128.
template <typename Z, bool kNoise = false>
struct Bounds {
  static constexpr int kThreads = sizeof(Z) == 8 || kNoise ? 256 : 512;
  static constexpr int kBlocks = kNoise && sizeof(Z) < 8 ? 3 : 2;
};

struct Shape {
  dim3 grid, block;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline cudaError_t device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device);
}

// Of a kernel that reduces, one block has a row; of the others several may.
enum class Reduces : bool { kNo, kYes };

inline cudaError_t shape_of(int64_t n, int64_t v, int max_threads, Reduces reduces, Shape* shape) {
  int processors = 0;
  if (const auto error = device_attribute(cudaDevAttrMultiProcessorCount, &processors); error != cudaSuccess)
    return error;
  const int64_t wanted = processors * kThreadsAProcessor;
  int64_t threads = v <= kWarpColumns ? 32 : v <= 16 * kWarpColumns ? 128 : 256;
  while (v > kWarpColumns && threads < max_threads && n * threads < wanted && threads * kColumnsAThread < v)
    threads *= 2;
  const int64_t rows = threads == 32 && n * 32 >= wanted ? 4 : 1;
  const int64_t blocks = ceil_div(n, rows);
  int64_t parts = 1;
  if (reduces == Reduces::kNo && blocks * rows * threads < wanted) {
    parts = ceil_div(wanted, blocks * rows * threads);
    if (parts > ceil_div(v, threads * kColumnsAThread)) parts = ceil_div(v, threads * kColumnsAThread);
  }
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  shape->grid = dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), static_cast<unsigned>(parts));
  shape->block = dim3(static_cast<unsigned>(threads), static_cast<unsigned>(rows));
  return cudaSuccess;
}

template <typename... Args>
cudaError_t start(void (*kernel)(Args...), const Shape& shape, int64_t shared_bytes, cudaStream_t stream,
                  const std::type_identity_t<Args>&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  return error != cudaSuccess ? error : cudaGetLastError();
}

// launch(Type<Z>, Type<other>, noise or not as a constant, shape) -> cudaError_t, for `columns` of each row, unless
// there is nothing to do.
template <typename Launch>
cudaError_t launch_pair(const Student& student, DType other, int64_t columns, Reduces reduces, Launch launch) {
  if (student.n == 0 || student.v == 0 || columns == 0) return cudaSuccess;
  if (student.v > kMaxColumns) return cudaErrorInvalidValue;
  return with_types(student.z.dtype, other, [&](auto z, auto second) {
    using Z = typename decltype(z)::type;
    const auto launch_with = [&](auto noise) {
      Shape shape;
      const cudaError_t error = shape_of(student.n, columns, Bounds<Z, noise.value>::kThreads, reduces, &shape);
      if (error != cudaSuccess) return error;
      return launch(z, second, noise, shape);
    };
    return has_noise(student) ? launch_with(std::true_type{}) : launch_with(std::false_type{});
  });
}

}  // namespace engine_fast::cuda
