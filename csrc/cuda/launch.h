// One launcher per struct of row/args.h. They know no torch, allocate nothing, wait for nothing and can be captured
// in a CUDA graph. cudaErrorInvalidValue: a pair of dtypes outside the list below, or a vocabulary above 2^24.
//
// Pairs (z and s, z and out, z and dq): equal dtypes, or one of the two float32; float64 only with itself.
#pragma once

#include <cuda_runtime_api.h>

#include "row/args.h"

namespace engine_fast::cuda {

cudaError_t energy_forward(const EnergyForward& args, cudaStream_t stream);
cudaError_t energy_backward(const EnergyBackward& args, cudaStream_t stream);
cudaError_t soft_forward(const SoftForward& args, cudaStream_t stream);
cudaError_t carrier(const Carrier& args, cudaStream_t stream);
cudaError_t carrier_backward(const CarrierBackward& args, cudaStream_t stream);

}  // namespace engine_fast::cuda
