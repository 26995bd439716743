// Affine couplings on the CPU: the problem that a loop is given. The formulas are those of
// mflow_kernels/ops/scale.py and coupling.py; nothing here knows of torch.
//
//   couple     y_b = s (x_b + shift) or s x_b + shift, and the sum of log s of each sample
//   uncouple   x_b from y_b (unless kept), and the gradients of x_b and of params = (raw, shift)
#pragma once

#include <cstdint>

#include "../common/walk.h"

namespace mflow {

struct Scale {
    int function = -1;  // its place in ScaleFunctions (scale.h)
    double offset = 0, eps = 0, clamp = 1;
    bool shift_first = true;
};

struct Coupling {
    bool is_double = false;
    Scale scale;
    bool inverse = false;  // of the coupling as it ran; `couple` runs it so
    bool kept = false;     // uncouple: x_b is given, y_b is not
    Shape shape;           // of the half that is scaled
    Walk raw, shift;

    // couple: x to y. uncouple: y to x, or where `kept` x to y, which may be absent.
    Walk x, y;
    void* ledger = nullptr;  // couple: one sum a sample

    // uncouple: one dlogdet a sample, dy to dx, draw, dshift.
    const void* dlogdet = nullptr;
    int64_t dlogdet_stride = 0;
    Walk dy, dx, draw, dshift;

    // The half that stays, of the state and of its gradient, is copied on the way where there is
    // somewhere to copy it to.
    int64_t stays = 0;  // its channels, no more than those of the other
    Walk from[2], to[2];
};

void couple_cpu(const Coupling& problem, int threads);
void uncouple_cpu(const Coupling& problem, int threads);

}  // namespace mflow
