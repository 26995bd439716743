// Invertible 1x1 convolutions on the CPU, actnorm folded in: the problem that a loop is given. The
// formulas are those of mflow_kernels/ops/coupling_conv1x1.py and unmix.py.
//
//   mix      y = W z + bias, where z is x, or what x is coupled to
//   unmix    gradients: dz = W^T dy, gram = sum dy z^T, dbias = sum dy. z is y - bias, and x = M z
//            may be asked for; or it is what x is coupled to, and the coupling's gradients are too
#pragma once

#include "../coupling/coupling.h"

namespace mflow {

// Element (row, column) of a matrix or (row, 0) of a vector; null: absent, a vector is zero.
struct Matrix {
    const void* data = nullptr;
    int64_t row = 0, column = 0;
    Matrix transposed() const { return {data, column, row}; }
};

constexpr int64_t kMixedChannels = 128;  // that the loops take; past that BLAS is as fast

struct Mix {
    bool is_double = false;
    Shape shape;        // of the state
    int64_t first = 0;  // channels of its first half
    Matrix weight, bias;
    Walk x[2], y;
    Walk net;                           // where the first half of y goes once more, or absent
    const Coupling* coupling = nullptr;  // of it: scale, inverse, raw, shift, ledger
};

struct Unmix {
    bool is_double = false;
    Shape shape;
    int64_t first = 0;
    Matrix weight, bias;
    Walk dy[2], dnet;     // dnet is added to the first half's gradient
    Walk state[2];        // y; or, with a coupling, x
    Walk dstate;          // of z; or, with a coupling, of x
    void *gram, *dbias;   // (C, C) and (C), dense
    Matrix other;         // M
    Walk rebuilt, net;    // M z, and its first half once more
    const Coupling* coupling = nullptr;  // of it: scale, inverse, raw, shift, dlogdet, draw, dshift
};

void mix_cpu(const Mix& problem, int threads);
void unmix_cpu(const Unmix& problem, int threads);

}  // namespace mflow
