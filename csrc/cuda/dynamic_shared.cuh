// The shared memory that a launch asks for, aligned for vector accesses.
#pragma once

#include <cuda_runtime.h>

namespace engine_fast::cuda {

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char engine_fast_shared[];
  return engine_fast_shared;
}

}  // namespace engine_fast::cuda
