// The functions that fill the Python module, and the error that they raise.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace mflow {

[[noreturn]] inline void fail(const std::string& what) {
    throw std::invalid_argument("mflow_kernels._C: " + what);
}

// Arguments are passed by position, because their names would cost as much time as the arguments.
void bind_coupling(pybind11::module_& m);
void bind_conv1x1(pybind11::module_& m);
void bind_masked_penalty(pybind11::module_& m);

}  // namespace mflow
