// Binds the splines to Python. The checks here keep the loops from reading or writing wrong memory. The
// caller (mflow_kernels/ops/cpu.py) has checked devices.

#include <pybind11/pybind11.h>

#include "../common/tensors.h"
#include "spline.h"

namespace mflow {
namespace {

// Reads `Spline.args`: (bins, tails, kind, (low, high, min_width, min_height, min_slope, temperature)).
SplineOptions parse_spline(const py::tuple& args) {
    SplineOptions o;
    o.bins = py::cast<int>(args[0]);
    o.tails = py::cast<bool>(args[1]);
    const std::string kind = py::cast<std::string>(args[2]);
    const py::sequence numbers = py::cast<py::sequence>(args[3]);
    if (kind != "softplus" && kind != "exp") fail("unknown kind of spline " + kind);
    if (o.bins < 2 || o.bins > kMaxBins) fail("expected 2 to 64 bins");
    if (numbers.size() != 6) fail("expected six numbers of a spline");
    o.exponential = kind == "exp";
    o.low = py::cast<double>(numbers[0]);
    o.high = py::cast<double>(numbers[1]);
    o.min_width = py::cast<double>(numbers[2]);
    o.min_height = py::cast<double>(numbers[3]);
    o.min_slope = py::cast<double>(numbers[4]);
    o.temperature = py::cast<double>(numbers[5]);
    return o;
}

Spline describe(bool is_double, int64_t identity_channels, const State& state, const State& params,
                const py::tuple& options, bool inverse) {
    Spline p;
    p.is_double = is_double;
    p.options = parse_spline(options);
    p.inverse = inverse;
    p.shape = state.shape();
    if (identity_channels < 0 || identity_channels >= p.shape.channels) {
        fail("expected at least one channel to transform");
    }
    p.identity_channels = identity_channels;
    p.shape.channels -= identity_channels;
    expect_shape(params, p.shape, p.shape.channels * p.options.numbers());
    p.params = params.view();
    p.x = from_channel(state.view(), identity_channels, is_double);
    return p;
}

void spline(int threads, int64_t identity_channels, const py::object& x, const py::object& params,
            const py::object& y, const py::object& ledger, const py::tuple& options, bool inverse) {
    const py::object dtype = x.attr("dtype");
    const bool is_double = computes_in_double(dtype);
    const State from(x, dtype, Use::read), raw(params, dtype, Use::read), to(y, dtype, Use::write);
    expect_like(from, to);
    const SampleValues sums(ledger, dtype, Use::write, from.shape().samples);
    Spline p = describe(is_double, identity_channels, from, raw, options, inverse);
    p.from = from.view();
    p.to = to.view();
    p.y = from_channel(to.view(), identity_channels, is_double);
    p.ledger = sums.data();
    py::gil_scoped_release release;
    spline_cpu(p, threads);
}

void spline_backward(int threads, int64_t identity_channels, const py::object& dy, const py::object& dlogdet,
                     const py::object& x, const py::object& params, const py::object& dx,
                     const py::object& dparams, const py::tuple& options, bool inverse) {
    const py::object dtype = x.attr("dtype");
    const bool is_double = computes_in_double(dtype);
    const State state(x, dtype, Use::read), raw(params, dtype, Use::read), gradient(dy, dtype, Use::read);
    const State result(dx, dtype, Use::write), draw(dparams, dtype, Use::write);
    expect_like(state, gradient);
    expect_like(state, result);
    expect_like(raw, draw);
    const SampleValues values(dlogdet, dtype, Use::read, state.shape().samples);
    Spline p = describe(is_double, identity_channels, state, raw, options, inverse);
    p.from = gradient.view();
    p.to = result.view();
    p.dy = from_channel(gradient.view(), identity_channels, is_double);
    p.dx = from_channel(result.view(), identity_channels, is_double);
    p.dparams = draw.view();
    p.dlogdet = values.data();
    p.dlogdet_stride = values.stride();
    py::gil_scoped_release release;
    spline_backward_cpu(p, threads);
}

}  // namespace

void bind_spline(py::module_& m) {
    m.def("spline", &spline);
    m.def("spline_backward", &spline_backward);
}

}  // namespace mflow
