// The table of kernels per kind of device, and the CPU's entry in it.
#include "backend.h"

#include <c10/util/Exception.h>

#include <array>

#include "cpu/kernels.h"

namespace engine_fast {
namespace {

constexpr auto kNumDevices = static_cast<size_t>(c10::DeviceType::COMPILE_TIME_MAX_DEVICE_TYPES);

std::array<Backend, kNumDevices>& backends() {
  static std::array<Backend, kNumDevices> table;
  return table;
}

const bool kRegistered =
    register_backend(c10::DeviceType::CPU, {&cpu::energy_forward, &cpu::energy_backward, &cpu::soft_forward,
                                            &cpu::carrier, &cpu::carrier_backward});

}  // namespace

bool register_backend(c10::DeviceType device, const Backend& backend) {
  backends()[static_cast<size_t>(device)] = backend;
  return true;
}

const Backend& backend_of(c10::DeviceType device) {
  const Backend& backend = backends()[static_cast<size_t>(device)];
  TORCH_INTERNAL_ASSERT(backend.energy_forward != nullptr, "no kernels for ", c10::DeviceTypeName(device));
  return backend;
}

}  // namespace engine_fast
