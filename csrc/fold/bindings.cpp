// Binds the folding of steps to Python. The checks here keep the loops from reading or writing wrong memory.

#include <pybind11/pybind11.h>

#include "../common/tensors.h"
#include "fold.h"

namespace mflow {
namespace {

// The factors of one step, in the order of `Factors`.
Factors read_factors(Arguments& arguments, const py::handle& step, int64_t c) {
    const auto factors = py::cast<py::tuple>(step);
    if (factors.size() != 7) fail("expected seven factors a step");
    const auto vector = [&](size_t i) { return arguments.dense(factors[i], Use::read, {c}); };
    const auto matrix = [&](size_t i) { return arguments.dense(factors[i], Use::read, {c, c}); };
    return {matrix(0), vector(1), matrix(2), matrix(3), vector(4), vector(5), vector(6)};
}

int64_t checked_channels(const py::object& weight) {
    const auto shape = py::cast<py::tuple>(weight.attr("shape"));
    const int64_t c = shape.size() == 3 ? py::cast<int64_t>(shape[2]) : 0;
    if (c < 1 || c > kMostFolded) fail("expected few channels");
    return c;
}

template <class A>
void write_scalar(void* to, double value) {
    *static_cast<A*>(to) = A(value);
}

// Fills weight (K, C, C), bias (K, C) and log_det (). Returns the number of the first step without a finite
// inverse, if `inverse` asks for one, and whether it is infinite; or None.
py::object fold(const py::list& steps, const py::object& weight, const py::object& bias,
                const py::object& log_det, bool inverse) {
    Arguments arguments(weight);
    const int64_t c = checked_channels(weight), k = int64_t(steps.size());
    const size_t size = arguments.is_double ? 8 : 4;
    char* const w = static_cast<char*>(arguments.dense(weight, Use::write, {k, c, c}));
    char* const b = static_cast<char*>(arguments.dense(bias, Use::write, {k, c}));
    void* const total = arguments.dense(log_det, Use::write, {});
    double sum = 0;
    py::object fault = py::none();
    for (int64_t i = 0; i < k; ++i) {
        const Invertible found = fold_cpu(read_factors(arguments, steps[i], c), c, arguments.is_double, inverse,
                                          w + i * c * c * size, b + i * c * size, sum);
        if (found != Invertible::yes && fault.is_none()) {
            fault = py::make_tuple(i, found == Invertible::infinite);
        }
    }
    arguments.is_double ? write_scalar<double>(total, sum) : write_scalar<float>(total, sum);
    return fault;
}

// Fills the gradients of L, U, log |s|, log_scale and bias, a tuple for each step; None is not filled.
void fold_backward(const py::list& steps, const py::object& dweight, const py::object& dbias,
                   const py::object& dlog_det, bool inverse, const py::list& gradients) {
    Arguments arguments(dweight);
    const int64_t c = checked_channels(dweight), k = int64_t(steps.size());
    const size_t size = arguments.is_double ? 8 : 4;
    if (gradients.size() != steps.size()) fail("expected gradients of each step");
    const auto* dw = static_cast<const char*>(arguments.dense(dweight, Use::read, {k, c, c}));
    const auto* db = static_cast<const char*>(arguments.dense(dbias, Use::read, {k, c}));
    const void* const total = arguments.dense(dlog_det, Use::read, {});
    const double dtotal =
        arguments.is_double ? *static_cast<const double*>(total) : *static_cast<const float*>(total);
    for (int64_t i = 0; i < k; ++i) {
        const auto of = py::cast<py::tuple>(gradients[i]);
        if (of.size() != 5) fail("expected five gradients a step");
        const auto vector = [&](size_t j) { return arguments.dense(of[j], Use::write, {c}); };
        const auto matrix = [&](size_t j) { return arguments.dense(of[j], Use::write, {c, c}); };
        fold_backward_cpu(read_factors(arguments, steps[i], c), c, arguments.is_double, inverse,
                          dw + i * c * c * size, db + i * c * size, dtotal,
                          {matrix(0), matrix(1), vector(2), vector(3), vector(4)});
    }
}

}  // namespace

void bind_fold(py::module_& m) {
    m.attr("fold_max_channels") = kMostFolded;
    m.def("fold", &fold);
    m.def("fold_backward", &fold_backward);
}

}  // namespace mflow
