// Binds the 1x1 convolutions to Python. The checks here keep the loops from reading or writing
// wrong memory. The caller (mflow_kernels/ops/cpu.py) has checked devices.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "../coupling/describe.h"
#include "conv1x1.h"

namespace mflow {
namespace {

using Half = std::pair<py::object, py::object>;

template <class Problem>
void set_shape(Problem& p, const Arguments& arguments, const Shape& shape) {
    if (shape.channels < 1 || shape.channels > kMaxChannels) {
        fail("expected 1 to " + std::to_string(kMaxChannels) + " channels");
    }
    p.is_double = arguments.is_double;
    p.shape = shape;
    p.first = shape.channels / 2;
}

// The coupling of the second half of a problem's state.
template <class Problem>
Coupling second_half(const Problem& p, Arguments& arguments, const py::object& params,
                     const py::object* dparams, const py::tuple& scale, bool inverse) {
    Coupling c;
    c.is_double = p.is_double;
    c.inverse = inverse;
    c.shape = p.shape;
    c.shape.channels -= p.first;
    set_options(c, scale);
    set_params(c, arguments, params, dparams);
    return c;
}

// Computes y = W z + bias, where z is x or, with params, couple(x); net receives y's first half.
void conv1x1(int threads, const py::object& x, const py::object& params, const py::object& weight,
             const py::object& bias, const py::object& y, const py::object& net,
             const py::object& ledger, const py::tuple& scale, bool inverse) {
    Arguments arguments(x);
    Conv1x1 p;
    Shape shape;
    p.x[0] = arguments.state(x, Use::read, shape);
    set_shape(p, arguments, shape);
    p.x[1] = arguments.from_channel(p.x[0], p.first);
    p.y = arguments.state_like(y, Use::write, shape);
    p.net = arguments.optional(net, Use::write, shape, p.first);
    p.weight = arguments.matrix(weight, shape.channels);
    p.bias = arguments.matrix(bias, shape.channels, 1);
    Coupling coupling;
    if (!params.is_none()) {
        coupling = second_half(p, arguments, params, nullptr, scale, inverse);
        coupling.ledger = arguments.samples(ledger, Use::write, shape.samples);
        p.coupling = &coupling;
    }
    py::gil_scoped_release release;
    conv1x1_cpu(p, threads);
}

// Computes the gradients of y = W z + bias from the halves of the state and of dy. Without params the state
// is y, or x = z if bias is None. If W^-1 is given, also computes x = W^-1 (y - bias) and net, a copy of x's
// first half. With params, z is couple(x), the state is x, and dparams is filled too.
void conv1x1_backward(int threads, const Half& state, const Half& dy, const py::object& dnet,
                      const py::object& weight, const py::object& bias,
                      const py::object& weight_inverse, const py::object& x, const py::object& net,
                      const py::object& dx, const py::object& outer_sum, const py::object& dbias,
                      const py::object& params, const py::object& dparams, const py::object& dlogdet,
                      const py::tuple& scale, bool inverse) {
    Arguments arguments(dx);
    Conv1x1Backward p;
    Shape shape;
    p.dstate = arguments.state(dx, Use::write, shape);
    set_shape(p, arguments, shape);
    const int64_t channels = shape.channels, second = channels - p.first;
    p.state[0] = arguments.state_like(state.first, Use::read, shape, p.first);
    p.state[1] = arguments.state_like(state.second, Use::read, shape, second);
    p.dy[0] = arguments.state_like(dy.first, Use::read, shape, p.first);
    p.dy[1] = arguments.state_like(dy.second, Use::read, shape, second);
    p.dnet = arguments.optional(dnet, Use::read, shape, p.first);
    p.weight = arguments.matrix(weight, channels);
    p.bias = arguments.matrix(bias, channels, 1);
    p.weight_inverse = arguments.matrix(weight_inverse, channels);
    if (weight_inverse.is_none() != x.is_none()) {
        fail("expected both x and the matrix that rebuilds it, or neither");
    }
    p.rebuilt = arguments.optional(x, Use::write, shape, channels);
    p.net = arguments.optional(net, Use::write, shape, p.first);
    p.outer_sum = arguments.dense(outer_sum, Use::write, {1, channels, channels});
    p.dbias = arguments.dense(dbias, Use::write, {1, channels});
    Coupling coupling;
    if (!params.is_none()) {
        coupling = second_half(p, arguments, params, &dparams, scale, inverse);
        coupling.dlogdet = arguments.samples(dlogdet, Use::read, shape.samples);
        p.coupling = &coupling;
    }
    py::gil_scoped_release release;
    conv1x1_backward_cpu(p, threads);
}

}  // namespace

void bind_conv1x1(py::module_& m) {
    m.attr("conv1x1_max_channels") = kMaxChannels;
    m.def("conv1x1", &conv1x1);
    m.def("conv1x1_backward", &conv1x1_backward);
}

}  // namespace mflow
