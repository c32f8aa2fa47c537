// The five kernels of row/args.h on a CPU.
#pragma once

#include "row/args.h"

namespace engine_fast::cpu {

void energy_forward(const EnergyForward& args);
void energy_backward(const EnergyBackward& args);
void soft_forward(const SoftForward& args);
void carrier(const Carrier& args);
void carrier_backward(const CarrierBackward& args);

}  // namespace engine_fast::cpu
