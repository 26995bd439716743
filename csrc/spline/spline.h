// Monotone rational-quadratic splines on the CPU: the struct that describes a problem. The formulas are
// those of mflow_kernels/ops/spline.py. This file does not depend on torch.
//
//   forward     y, and the sum of log |dy/dx| of each sample
//   backward    the gradients of x and params
#pragma once

#include "../common/half.h"

namespace mflow {

constexpr int kMaxBins = 64;

struct SplineOptions {
    int bins = 0;
    double low = 0, high = 0;  // the spline's interval, of x and of y
    double min_width = 0, min_height = 0, min_slope = 0, temperature = 1;
    // Outside the interval the spline is the identity, or results are NaN if bounded. The slopes at both ends
    // are 1 with linear tails, one learned number on a circle, and two if bounded.
    enum class Tails { linear, circular, none } tails = Tails::linear;
    bool exponential = false;  // slopes are exponentials of limited numbers, as in zuko

    int slopes() const { return tails == Tails::linear ? bins - 1 : tails == Tails::circular ? bins : bins + 1; }
    // The knot after a bin, or its slope.
    int next(int bin) const { return tails == Tails::circular && bin == bins - 1 ? 0 : bin + 1; }
    int numbers() const { return 2 * bins + slopes(); }  // of an element
};

struct Spline : HalfProblem {
    static constexpr bool can_rebuild = false;
    SplineOptions options;
    StateView params, dparams;  // the channel stride leads from number to number of an element
};

void run(const Spline& problem, int threads);

}  // namespace mflow
