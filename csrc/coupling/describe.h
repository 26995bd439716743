// Sets the options and params of a coupling from Python's arguments.
#pragma once

#include <string>

#include "../common/tensors.h"
#include "coupling.h"
#include "scale.h"

namespace mflow {

// Reads `ScaleFunction.args`: (kind, offset, eps, clamp, order).
inline void set_options(Coupling& p, const py::tuple& args) {
    Scale& s = p.scale;
    const std::string kind = py::cast<std::string>(args[0]), order = py::cast<std::string>(args[4]);
    s.offset = py::cast<double>(args[1]);
    s.eps = py::cast<double>(args[2]);
    s.clamp = py::cast<double>(args[3]);
    if (order != "shift-scale" && order != "scale-shift") fail("unknown order " + order);
    s.shift_first = order == "shift-scale";
    // An eps that rounds to 0 has no effect.
    const bool floored = p.is_double ? s.eps > 0 : static_cast<float>(s.eps) > 0;
    const bool with_floor = kind == Sigmoid::name && floored;
    s.function = ScaleFunctions::find(with_floor ? FlooredSigmoid::name : kind);
    if (s.function < 0) fail("unknown scale function " + kind);
}

inline void set_params(Coupling& p, Arguments& arguments, const py::object& params,
                       const py::object* dparams) {
    const int64_t channels = p.shape.channels;
    p.raw = arguments.state_like(params, Use::read, p.shape, 2 * channels);
    p.shift = arguments.from_channel(p.raw, channels);
    if (!dparams) return;
    p.draw = arguments.state_like(*dparams, Use::write, p.shape, 2 * channels);
    p.dshift = arguments.from_channel(p.draw, channels);
}

}  // namespace mflow
