// Describes a change of one half of a state from Python's arguments, and binds its loops. The checks here
// keep the loops from reading or writing wrong memory. The caller (mflow_kernels/ops/cpu.py) has checked
// devices.
#pragma once

#include "half.h"
#include "tensors.h"

namespace mflow {

// The half after the channels that pass through.
inline void set_half(HalfProblem& p, const Arguments& arguments, Shape state, int64_t identity_channels) {
    p.is_double = arguments.is_double;
    p.shape = state;
    p.shape.channels -= identity_channels;
    if (identity_channels < 0 || identity_channels > p.shape.channels) {
        fail("expected the half that passes through to be no larger than the other");
    }
    p.identity_channels = identity_channels;
}

// Each kind of problem has set_options(problem, options), set_params(problem, arguments, params, dparams),
// where a forward problem has no dparams, and run(problem, threads).
template <class Problem>
void change_half(int threads, int64_t identity_channels, const py::object& x, const py::object& params,
                 const py::object& y, const py::object& ledger, const py::tuple& options, bool inverse) {
    Arguments arguments(x);
    Problem p;
    Shape shape;
    p.inverse = inverse;
    p.from = arguments.state(x, Use::read, shape);
    p.to = arguments.state_like(y, Use::write, shape);
    set_half(p, arguments, shape, identity_channels);
    set_options(p, options);
    set_params(p, arguments, params, nullptr);
    p.x = arguments.from_channel(p.from, identity_channels);
    p.y = arguments.from_channel(p.to, identity_channels);
    p.ledger = arguments.samples(ledger, Use::write, shape.samples);
    py::gil_scoped_release release;
    run(p, threads);
}

// If `rebuilt` is None, `given` is the input of the change. Otherwise `given` is its output, `rebuilt`
// receives the input, and all states and gradients are halves (identity_channels = 0).
template <class Problem>
void change_half_backward(int threads, int64_t identity_channels, const py::object& given,
                          const py::object& params, const py::object& dy, const py::object& dlogdet,
                          const py::object& rebuilt, const py::object& dx, const py::object& dparams,
                          const py::tuple& options, bool inverse) {
    Arguments arguments(given);
    Problem p;
    Shape shape;
    p.inverse = inverse;
    const StateView state = arguments.state(given, Use::read, shape);
    p.from = arguments.state_like(dy, Use::read, shape);
    p.to = arguments.state_like(dx, Use::write, shape);
    set_half(p, arguments, shape, identity_channels);
    set_options(p, options);
    set_params(p, arguments, params, &dparams);
    if (rebuilt.is_none()) {
        p.x = arguments.from_channel(state, identity_channels);
    } else {
        if (identity_channels > 0 || !Problem::can_rebuild) fail("expected halves of a coupling to rebuild");
        p.y = state;
        p.x = arguments.state_like(rebuilt, Use::write, shape);
    }
    p.dy = arguments.from_channel(p.from, identity_channels);
    p.dx = arguments.from_channel(p.to, identity_channels);
    p.dlogdet = arguments.samples(dlogdet, Use::read, shape.samples);
    py::gil_scoped_release release;
    run(p, threads);
}

}  // namespace mflow
