// Affine couplings on the CPU: the struct that describes a problem. The formulas are those of
// mflow_kernels/ops/scale.py and coupling.py. This file does not depend on torch.
//
//   forward     y_b = s (x_b + shift) or s x_b + shift, and the sum of log s of each sample
//   backward    x_b from y_b, if y is given, and the gradients of x_b and params = (raw, shift)
#pragma once

#include "../common/half.h"

namespace mflow {

struct Scale {
    int function = -1;  // its index in ScaleFunctions (scale.h)
    double offset = 0, eps = 0, clamp = 1;
    bool shift_first = true;
};

// In a backward problem, `inverse` says whether the forward pass ran the inverse coupling.
struct Coupling : HalfProblem {
    static constexpr bool can_rebuild = true;
    Scale scale;
    StateView raw, shift, draw, dshift;
    bool rebuilds() const { return dy.data && y.data; }  // backward: reads y and writes x
};

void run(const Coupling& problem, int threads);

}  // namespace mflow
