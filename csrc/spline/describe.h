// Reads the options of splines from Python's arguments.
#pragma once

#include <string>

#include "../common/tensors.h"
#include "spline.h"

namespace mflow {

// Reads `Spline.args`: (bins, tails, kind, (low, high, min_width, min_height, min_slope, temperature)).
inline void set_options(Spline& p, const py::tuple& args) {
    SplineOptions& o = p.options;
    o.bins = py::cast<int>(args[0]);
    const std::string tails = py::cast<std::string>(args[1]), kind = py::cast<std::string>(args[2]);
    const py::sequence numbers = py::cast<py::sequence>(args[3]);
    if (kind != "softplus" && kind != "exp") fail("unknown kind of spline " + kind);
    if (o.bins < 2 || o.bins > kMaxBins) fail("expected 2 to 64 bins");
    if (numbers.size() != 6) fail("expected six numbers of a spline");
    if (tails != "linear" && tails != "circular" && tails != "none") fail("unknown tails " + tails);
    using Tails = SplineOptions::Tails;
    o.tails = tails == "linear" ? Tails::linear : tails == "circular" ? Tails::circular : Tails::none;
    o.exponential = kind == "exp";
    o.low = py::cast<double>(numbers[0]);
    o.high = py::cast<double>(numbers[1]);
    o.min_width = py::cast<double>(numbers[2]);
    o.min_height = py::cast<double>(numbers[3]);
    o.min_slope = py::cast<double>(numbers[4]);
    o.temperature = py::cast<double>(numbers[5]);
}

}  // namespace mflow
