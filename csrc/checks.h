// One wording for every argument error, CPU and CUDA: "where: name = got, expected wanted."
#pragma once

#include <stdexcept>
#include <string>

namespace engine_fast {

// Arrives in Python as ValueError. Called only once something is wrong, so that a passing check builds no strings.
[[noreturn]] inline void refuse(const std::string& where, const std::string& name, const std::string& got,
                                const std::string& wanted) {
  throw std::invalid_argument(where + ": " + name + " = " + got + ", expected " + wanted + ".");
}

}  // namespace engine_fast
