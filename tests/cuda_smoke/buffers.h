// Matrices on the device that start as NaN, inside and out, and know when somebody wrote beside their rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "row/args.h"

#define CHECK_CUDA(call)                                                                         \
  do {                                                                                           \
    const cudaError_t check_error = (call);                                                      \
    if (check_error != cudaSuccess) {                                                            \
      std::fprintf(stderr, "%s:%d: %s: CUDA error %d\n", __FILE__, __LINE__, #call, check_error); \
      std::exit(1);                                                                              \
    }                                                                                            \
  } while (0)

namespace smoke {

using engine_fast::DType;
using engine_fast::Matrix;

inline size_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

inline const char* name_of(DType type) {
  switch (type) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kBFloat16: return "bfloat16";
    default: return "float16";
  }
}

template <typename T>
void put(unsigned char* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}
template <typename T>
T get(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

inline void encode(double value, DType type, unsigned char* to) {
  switch (type) {
    case DType::kFloat32: return put(to, static_cast<float>(value));
    case DType::kFloat64: return put(to, value);
    case DType::kBFloat16: return put(to, __float2bfloat16_rn(static_cast<float>(value)));
    case DType::kFloat16: return put(to, __float2half_rn(static_cast<float>(value)));
  }
}

inline double decode(DType type, const unsigned char* from) {
  switch (type) {
    case DType::kFloat32: return get<float>(from);
    case DType::kFloat64: return get<double>(from);
    case DType::kBFloat16: return __bfloat162float(get<__nv_bfloat16>(from));
    default: return __half2float(get<__half>(from));
  }
}

inline double rounded(double value, DType type) {
  unsigned char bytes[8] = {};
  encode(value, type, bytes);
  return decode(type, bytes);
}

// `offset` elements before the first row, `pad` after each.
class DeviceMatrix {
 public:
  DeviceMatrix(DType type, int64_t n, int64_t v, int64_t offset = 0, int64_t pad = 0)
      : type_(type), n_(n), v_(v), offset_(offset), stride_(v + pad), image_((offset + n * stride_) * size_of(type)) {
    CHECK_CUDA(cudaMalloc(&data_, image_.size() + 1));
    poison();
  }
  DeviceMatrix(const DeviceMatrix&) = delete;
  ~DeviceMatrix() { CHECK_CUDA(cudaFree(data_)); }

  void poison() { CHECK_CUDA(cudaMemset(data_, 0xff, image_.size())); }

  void upload(const std::vector<double>& values) {
    std::memset(image_.data(), 0xff, image_.size());
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < v_; ++j) encode(values[i * v_ + j], type_, image_.data() + at(i, j));
    CHECK_CUDA(cudaMemcpy(data_, image_.data(), image_.size(), cudaMemcpyHostToDevice));
  }

  std::vector<double> download() {
    CHECK_CUDA(cudaDeviceSynchronize());
    CHECK_CUDA(cudaMemcpy(image_.data(), data_, image_.size(), cudaMemcpyDeviceToHost));
    std::vector<double> values(n_ * v_);
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < v_; ++j) values[i * v_ + j] = decode(type_, image_.data() + at(i, j));
    return values;
  }

  // After download(): nothing but the rows has been written.
  bool surroundings_intact() const {
    const size_t size = size_of(type_);
    const auto poisoned = [&](int64_t element) {
      for (size_t b = 0; b < size; ++b)
        if (image_[element * size + b] != 0xff) return false;
      return true;
    };
    for (int64_t e = 0; e < offset_; ++e)
      if (!poisoned(e)) return false;
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t e = v_; e < stride_; ++e)
        if (!poisoned(offset_ + i * stride_ + e)) return false;
    return true;
  }

  Matrix matrix() const { return {static_cast<unsigned char*>(data_) + offset_ * size_of(type_), stride_, type_}; }
  void* data() const { return matrix().data; }
  DType type() const { return type_; }

 private:
  size_t at(int64_t i, int64_t j) const { return (offset_ + i * stride_ + j) * size_of(type_); }

  DType type_;
  int64_t n_, v_, offset_, stride_;
  std::vector<unsigned char> image_;
  void* data_ = nullptr;
};

// Bytes as they are.
template <typename T>
class DeviceVector {
 public:
  explicit DeviceVector(const std::vector<T>& values) {
    CHECK_CUDA(cudaMalloc(&data_, values.size() * sizeof(T) + 1));
    CHECK_CUDA(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceVector(const DeviceVector&) = delete;
  ~DeviceVector() { CHECK_CUDA(cudaFree(data_)); }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace smoke
