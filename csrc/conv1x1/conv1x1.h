// Invertible 1x1 convolutions on the CPU: the structs that describe a problem. Actnorm is folded in. The
// formulas are those of mflow_kernels/ops/conv1x1.py, coupling_conv1x1.py and rebuild_conv1x1.py.
//
//   conv1x1             y = W z + bias, where z is x or, with a coupling, couple(x).
//   conv1x1_backward    dz = W^T dy, outer_sum = sum dy z^T and dbias = sum dy. With a coupling, z is
//                       couple(x), and the gradients of x and params are computed too. Without a
//                       coupling, z is the given state minus bias. If the state is x and bias is
//                       absent, outer_sum is dW. If the state is y and W^-1 is given, x = W^-1 z is
//                       rebuilt.
#pragma once

#include "../coupling/coupling.h"

namespace mflow {

constexpr int64_t kMaxChannels = 128;  // with more channels BLAS is as fast

struct Conv1x1 {
    bool is_double = false;
    Shape shape;        // of the state
    int64_t first = 0;  // channels of its first half
    Matrix weight, bias;
    StateView x[2], y;
    StateView net;  // the network input, a copy of y's first half; or absent
    const Coupling* coupling = nullptr;  // its scale, inverse, raw, shift and ledger are used
};

struct Conv1x1Backward {
    bool is_double = false;
    Shape shape;
    int64_t first = 0;
    Matrix weight, bias;
    StateView dy[2], dnet;     // dnet is added to the first half's gradient
    StateView state[2];        // the halves of y; with a coupling, of x
    StateView dstate;          // the gradient of z; with a coupling, of x; without one it may be absent
    void *outer_sum, *dbias;   // (C, C) and (C), dense
    Matrix weight_inverse;
    StateView rebuilt, net;    // W^-1 z, and the network input, a copy of its first half
    const Coupling* coupling = nullptr;  // its dlogdet, draw and dshift are used too
};

void conv1x1_cpu(const Conv1x1& problem, int threads);
void conv1x1_backward_cpu(const Conv1x1Backward& problem, int threads);

}  // namespace mflow
