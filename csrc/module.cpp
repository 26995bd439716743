// The Python module mflow_kernels._C.

#include <pybind11/pybind11.h>

#include "common/bindings.h"

// setup.py sets these: the GPU architectures of this build, separated by spaces, and the reason if there
// are none.
#ifndef MFLOW_CUDA_ARCHS
#define MFLOW_CUDA_ARCHS ""
#endif
#ifndef MFLOW_CUDA_NOTE
#define MFLOW_CUDA_NOTE ""
#endif

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU loops of steps of flow, splines, autoregressive inverses and the masked penalty; "
              "CUDA kernels of the latter.";
    mflow::bind_autoregressive(m);
    mflow::bind_coupling(m);
    mflow::bind_conv1x1(m);
    mflow::bind_actnorm(m);
    mflow::bind_fold(m);
    mflow::bind_step(m);
    mflow::bind_spline(m);
    mflow::bind_masked_penalty(m);
    m.attr("cuda_archs") = pybind11::str(MFLOW_CUDA_ARCHS).attr("split")();
    m.attr("cuda_note") = MFLOW_CUDA_NOTE;
}
