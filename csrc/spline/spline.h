// Monotone rational-quadratic splines on the CPU: the struct that describes a problem. The formulas are
// those of mflow_kernels/ops/spline.py. This file does not depend on torch.
//
//   spline            y, and the sum of log |dy/dx| of each sample
//   spline_backward   the gradients of x and params
#pragma once

#include <cstdint>

#include "../common/state_view.h"

namespace mflow {

constexpr int kMaxBins = 64;

struct SplineOptions {
    int bins = 0;
    double low = 0, high = 0;  // the spline's interval, of x and of y
    double min_width = 0, min_height = 0, min_slope = 0, temperature = 1;
    bool tails = true;        // linear tails outside the interval; otherwise results there are NaN
    bool exponential = false;  // slopes are exponentials of limited numbers, as in zuko

    int slopes() const { return tails ? bins - 1 : bins + 1; }
    int numbers() const { return 2 * bins + slopes(); }  // of an element
};

struct Spline {
    bool is_double = false;
    SplineOptions options;
    bool inverse = false;
    Shape shape;       // of the part that is transformed
    StateView params;  // its channel stride leads from number to number of an element
    StateView x;

    StateView y;             // spline writes y
    void* ledger = nullptr;  // and one sum for each sample.

    // spline_backward reads dy and one dlogdet for each sample, and writes dx and dparams.
    const void* dlogdet = nullptr;
    int64_t dlogdet_stride = 0;
    StateView dy, dx, dparams;

    // The channels that pass through are copied from `from` to `to`. spline copies those of the state,
    // spline_backward those of the gradient.
    int64_t identity_channels = 0;
    StateView from, to;
};

void spline_cpu(const Spline& problem, int threads);
void spline_backward_cpu(const Spline& problem, int threads);

}  // namespace mflow
