// The kernels of one kind of device. The code in csrc/aten checks, allocates and tiles for all of them alike.
#pragma once

#include <c10/core/DeviceType.h>

#include "row/args.h"

namespace engine_fast {

// Each runs on the current device and, where there are streams, on the current one, without waiting for it.
struct Backend {
  void (*energy_forward)(const EnergyForward&) = nullptr;
  void (*energy_backward)(const EnergyBackward&) = nullptr;
  void (*soft_forward)(const SoftForward&) = nullptr;
  void (*carrier)(const Carrier&) = nullptr;
  void (*carrier_backward)(const CarrierBackward&) = nullptr;
};

// Called once per kind while the extension is loaded.
bool register_backend(c10::DeviceType device, const Backend& backend);

const Backend& backend_of(c10::DeviceType device);

}  // namespace engine_fast
