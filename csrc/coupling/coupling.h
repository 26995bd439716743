// Affine couplings on the CPU: the struct that describes a problem. The formulas are those of
// mflow_kernels/ops/scale.py and coupling.py. This file does not depend on torch.
//
//   couple              y_b = s (x_b + shift) or s x_b + shift, and the sum of log s of each sample
//   coupling_backward   x_b from y_b (unless x_given), and the gradients of x_b and params = (raw, shift)
#pragma once

#include <cstdint>

#include "../common/state_view.h"

namespace mflow {

struct Scale {
    int function = -1;  // its index in ScaleFunctions (scale.h)
    double offset = 0, eps = 0, clamp = 1;
    bool shift_first = true;
};

struct Coupling {
    bool is_double = false;
    Scale scale;
    bool inverse = false;  // whether the forward pass ran the inverse coupling
    bool x_given = false;  // coupling_backward: x is given and y is absent
    Shape shape;           // of the half that is scaled
    StateView raw, shift;

    // couple reads x and writes y. coupling_backward reads y and writes x; if `x_given` it only reads x.
    StateView x, y;
    void* ledger = nullptr;  // couple: one sum for each sample

    // coupling_backward reads dy and one dlogdet for each sample, and writes dx, draw and dshift.
    const void* dlogdet = nullptr;
    int64_t dlogdet_stride = 0;
    StateView dy, dx, draw, dshift;

    // The identity half, which the coupling passes through, is copied from `from` to `to`. couple copies
    // that of the state, coupling_backward that of the gradient.
    int64_t identity_channels = 0;  // no more than the channels of the other half; 0 copies nothing
    StateView from, to;
};

void couple_cpu(const Coupling& problem, int threads);
void coupling_backward_cpu(const Coupling& problem, int threads);

}  // namespace mflow
