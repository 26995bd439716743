// Builds the description of a coupling from Python's arguments.
#pragma once

#include <string>

#include "../common/tensors.h"
#include "coupling.h"
#include "scale.h"

namespace mflow {

// Reads `ScaleFunction.args`: (kind, offset, eps, clamp, order).
inline Scale parse_scale(const py::tuple& args, bool is_double) {
    Scale s;
    const std::string kind = py::cast<std::string>(args[0]), order = py::cast<std::string>(args[4]);
    s.offset = py::cast<double>(args[1]);
    s.eps = py::cast<double>(args[2]);
    s.clamp = py::cast<double>(args[3]);
    if (order != "shift-scale" && order != "scale-shift") fail("unknown order " + order);
    s.shift_first = order == "shift-scale";
    // An eps that rounds to 0 has no effect.
    const bool floored = is_double ? s.eps > 0 : static_cast<float>(s.eps) > 0;
    const bool with_floor = kind == Sigmoid::name && floored;
    s.function = ScaleFunctions::find(with_floor ? FlooredSigmoid::name : kind);
    if (s.function < 0) fail("unknown scale function " + kind);
    return s;
}

// Describes the coupling of a half of this shape with these params.
inline Coupling describe_coupling(bool is_double, const Shape& half, const State& params,
                                  const py::tuple& scale, bool inverse) {
    const Shape& given = params.shape();
    if (given.samples != half.samples || given.channels != 2 * half.channels ||
        given.pixels != half.pixels) {
        fail("expected params of twice the half's channels");
    }
    Coupling p;
    p.is_double = is_double;
    p.shape = half;
    p.scale = parse_scale(scale, is_double);
    p.inverse = inverse;
    p.raw = params.view();
    p.shift = from_channel(p.raw, half.channels, is_double);
    return p;
}

}  // namespace mflow
