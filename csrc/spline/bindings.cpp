// Binds the splines to Python.

#include <string>

#include "../common/half_bindings.h"
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

inline void set_params(Spline& p, Arguments& arguments, const py::object& params,
                       const py::object* dparams) {
    const int64_t channels = p.shape.channels * p.options.numbers();
    p.params = arguments.state_like(params, Use::read, p.shape, channels);
    if (dparams) p.dparams = arguments.state_like(*dparams, Use::write, p.shape, channels);
}

void bind_spline(py::module_& m) {
    m.def("spline", &change_half<Spline>);
    m.def("spline_backward", &change_half_backward<Spline>);
}

}  // namespace mflow
