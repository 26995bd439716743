// Binds the couplings to Python. The checks here keep the loops from reading or writing wrong
// memory. The caller (mflow_kernels/ops/cpu.py) has checked devices.

#include <pybind11/pybind11.h>

#include <optional>

#include "describe.h"

namespace mflow {
namespace {

// The half of a state that is scaled. The first channels pass through.
Shape scaled_half(const State& state, int64_t identity_channels) {
    Shape half = state.shape();
    half.channels -= identity_channels;
    if (identity_channels > half.channels) fail("expected the identity half to be no larger than the other");
    return half;
}

void couple(int threads, const py::object& x, const py::object& params, const py::object& y,
            const py::object& ledger, const py::tuple& scale, bool inverse) {
    const py::object dtype = x.attr("dtype");
    const bool is_double = computes_in_double(dtype);
    const State from(x, dtype, Use::read), raw(params, dtype, Use::read), to(y, dtype, Use::write);
    expect_like(from, to);
    const SampleValues sums(ledger, dtype, Use::write, from.shape().samples);
    const int64_t identity_channels = from.shape().channels / 2;
    Coupling p = describe_coupling(is_double, scaled_half(from, identity_channels), raw, scale, inverse);
    p.identity_channels = identity_channels;
    p.from = from.view();
    p.to = to.view();
    p.x = from_channel(from.view(), identity_channels, is_double);
    p.y = from_channel(to.view(), identity_channels, is_double);
    p.ledger = sums.data();
    py::gil_scoped_release release;
    couple_cpu(p, threads);
}

// If `rebuilt` is None, `given` is the coupling's input. Otherwise `given` is its output, `rebuilt` receives
// the input, and all states and gradients are halves (identity_channels = 0).
void coupling_backward(int threads, int64_t identity_channels, const py::object& given,
                       const py::object& params, const py::object& dy, const py::object& dlogdet,
                       const py::object& rebuilt, const py::object& dx, const py::object& dparams,
                       const py::tuple& scale, bool inverse) {
    const py::object dtype = given.attr("dtype");
    const bool is_double = computes_in_double(dtype);
    const State state(given, dtype, Use::read), raw(params, dtype, Use::read), gradient(dy, dtype, Use::read);
    const State result(dx, dtype, Use::write), draw(dparams, dtype, Use::write);
    expect_like(state, gradient);
    expect_like(state, result);
    expect_like(raw, draw);
    const SampleValues values(dlogdet, dtype, Use::read, state.shape().samples);
    Coupling p = describe_coupling(is_double, scaled_half(state, identity_channels), raw, scale, inverse);
    p.x_given = rebuilt.is_none();
    (p.x_given ? p.x : p.y) = from_channel(state.view(), identity_channels, is_double);
    std::optional<State> input;
    if (!p.x_given) {
        if (identity_channels > 0) fail("expected halves where the input is rebuilt");
        input.emplace(rebuilt, dtype, Use::write);
        expect_like(state, *input);
        p.x = input->view();
    }
    p.dy = from_channel(gradient.view(), identity_channels, is_double);
    p.dx = from_channel(result.view(), identity_channels, is_double);
    p.identity_channels = identity_channels;
    p.from = gradient.view();
    p.to = result.view();
    p.draw = draw.view();
    p.dshift = from_channel(p.draw, p.shape.channels, is_double);
    p.dlogdet = values.data();
    p.dlogdet_stride = values.stride();
    py::gil_scoped_release release;
    coupling_backward_cpu(p, threads);
}

}  // namespace

void bind_coupling(py::module_& m) {
    m.def("couple", &couple);
    m.def("coupling_backward", &coupling_backward);
}

}  // namespace mflow
