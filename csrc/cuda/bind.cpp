// The CUDA entry in the table of kernels: the one file that sees both torch and the launchers.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "backend.h"
#include "cuda/launch.h"

namespace engine_fast {
namespace {

// On the current stream of the current device, which csrc/aten has made that of the tensors.
template <typename Args, cudaError_t (*kLaunch)(const Args&, cudaStream_t)>
void run(const Args& args) {
  C10_CUDA_CHECK(kLaunch(args, c10::cuda::getCurrentCUDAStream().stream()));
}

[[maybe_unused]] const bool kRegistered = register_backend(
    c10::DeviceType::CUDA,
    {&run<EnergyForward, &cuda::energy_forward>, &run<EnergyBackward, &cuda::energy_backward>,
     &run<SoftForward, &cuda::soft_forward>, &run<Carrier, &cuda::carrier>,
     &run<CarrierBackward, &cuda::carrier_backward>});

}  // namespace
}  // namespace engine_fast
