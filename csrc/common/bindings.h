// The functions that fill the Python module, and the error that they raise.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace mflow {

[[noreturn]] inline void fail(const std::string& what) {
    throw std::invalid_argument("mflow_kernels._C: " + what);
}

// Arguments have no names in Python: matching names would take as long as converting the values.
void bind_autoregressive(pybind11::module_& m);
void bind_coupling(pybind11::module_& m);
void bind_conv1x1(pybind11::module_& m);
void bind_fold(pybind11::module_& m);
void bind_step(pybind11::module_& m);
void bind_actnorm(pybind11::module_& m);
void bind_spline(pybind11::module_& m);
void bind_masked_penalty(pybind11::module_& m);

}  // namespace mflow
