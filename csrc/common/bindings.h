// What the files of the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mflow {

using Pointer = std::uintptr_t;

[[noreturn]] inline void fail(const std::string& what) {
    throw std::invalid_argument("mflow_kernels._C: " + what);
}

void bind_couplings(pybind11::module_& m);
void bind_mixes(pybind11::module_& m);

}  // namespace mflow
