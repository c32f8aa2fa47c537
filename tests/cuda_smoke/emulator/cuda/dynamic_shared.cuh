// Found before csrc/cuda's file of this name: the emulator allocates each block's memory.
#pragma once

namespace engine_fast::cuda {

inline unsigned char* dynamic_shared() { return emulator::shared_memory; }

}  // namespace engine_fast::cuda
