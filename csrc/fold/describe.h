// Reads the factors of a step, and the tensors for their gradients, from Python's tuples.
#pragma once

#include "../common/tensors.h"
#include "fold.h"

namespace mflow {

// P, the signs of s, L, U, log |s|, and log_scale and bias of the actnorm or None.
inline Factors read_factors(Arguments& arguments, const py::handle& of_step, int64_t c) {
    const auto factors = py::cast<py::tuple>(of_step);
    if (factors.size() != 7) fail("expected seven factors a step");
    const auto vector = [&](size_t i) { return arguments.dense(factors[i], Use::read, {c}); };
    const auto matrix = [&](size_t i) { return arguments.dense(factors[i], Use::read, {c, c}); };
    return {matrix(0), vector(1), matrix(2), matrix(3), vector(4), vector(5), vector(6)};
}

// The last five of these seven.
inline FactorGradients factor_gradients(Arguments& arguments, const py::handle& of_step, int64_t c) {
    const auto gradients = py::cast<py::tuple>(of_step);
    if (gradients.size() != 5) fail("expected five gradients a step");
    const auto vector = [&](size_t i) { return arguments.dense(gradients[i], Use::write, {c}); };
    const auto matrix = [&](size_t i) { return arguments.dense(gradients[i], Use::write, {c, c}); };
    return {matrix(0), matrix(1), vector(2), vector(3), vector(4)};
}

}  // namespace mflow
