// Binds the 1x1 convolutions to Python. The checks here keep the loops from reading or writing
// wrong memory. The caller (mflow_kernels/ops/cpu.py) has checked devices.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../coupling/describe.h"
#include "conv1x1.h"

namespace mflow {
namespace {

using Half = std::pair<py::object, py::object>;

// Reads weights (..., C, C) and biases (..., C). Axes before these are ignored. The tensors live as long as
// this object.
class Weights {
public:
    Weights(const py::object& dtype, int64_t channels) : dtype_(dtype), channels_(channels) {}
    Matrix matrix(const py::object& tensor) { return last_axes(tensor, 2); }
    Matrix column(const py::object& tensor) { return last_axes(tensor, 1); }

private:
    Matrix last_axes(const py::object& tensor, size_t count) {
        if (tensor.is_none()) return {};
        if (!py::object(tensor.attr("dtype")).is(dtype_)) fail("expected weights of the state's dtype");
        const Tensor& t = tensors_.emplace_back(tensor, dtype_, Use::read);
        if (t.axes() < count) fail("expected (..., C, C) and (..., C)");
        const size_t first = t.axes() - count;
        for (size_t i = first; i < t.axes(); ++i) {
            if (t.length(i) != channels_) fail("expected weights of the state's channels");
        }
        return {t.data(), t.stride(first), count == 2 ? t.stride(first + 1) : 0};
    }

    py::object dtype_;
    int64_t channels_;
    std::vector<Tensor> tensors_;
};

// A state or a half of one, or None.
class OptionalState {
public:
    OptionalState(const py::object& tensor, const py::object& dtype, Use use, const Shape& shape,
                  int64_t channels) {
        if (tensor.is_none()) return;
        state_.emplace(tensor, dtype, use);
        expect_shape(*state_, shape, channels);
    }
    StateView view() const { return state_ ? state_->view() : StateView(); }

private:
    std::optional<State> state_;
};

// One partial sum of outer_sum (1, C, C) and of dbias (1, C), dense.
class Sums {
public:
    Sums(const py::object& outer_sum, const py::object& dbias, const py::object& dtype, int64_t channels)
        : outer_sum_(outer_sum, dtype, Use::write), dbias_(dbias, dtype, Use::write) {
        const bool fits = outer_sum_.axes() == 3 && outer_sum_.length(1) == channels &&
                          outer_sum_.length(2) == channels && outer_sum_.stride(1) == channels &&
                          outer_sum_.stride(2) == 1 && dbias_.axes() == 2 &&
                          dbias_.length(1) == channels && dbias_.stride(1) == 1;
        if (!fits) fail("expected dense sums (1, C, C) and (1, C)");
    }
    void* outer_sum() const { return outer_sum_.data(); }
    void* dbias() const { return dbias_.data(); }

private:
    Tensor outer_sum_, dbias_;
};

Shape second_half(Shape shape, int64_t first) {
    shape.channels -= first;
    return shape;
}

void expect_channels(const Shape& shape) {
    if (shape.channels < 1 || shape.channels > kMaxChannels) {
        fail("expected 1 to " + std::to_string(kMaxChannels) + " channels");
    }
}

// Computes y = W z + bias, where z is x or, with params, couple(x); net receives y's first half.
void conv1x1(int threads, const py::object& x, const py::object& params, const py::object& weight,
             const py::object& bias, const py::object& y, const py::object& net,
             const py::object& ledger, const py::tuple& scale, bool inverse) {
    const py::object dtype = x.attr("dtype");
    const bool is_double = computes_in_double(dtype);
    const State from(x, dtype, Use::read), to(y, dtype, Use::write);
    expect_like(from, to);
    Conv1x1 p;
    p.is_double = is_double;
    p.shape = from.shape();
    expect_channels(p.shape);
    p.first = p.shape.channels / 2;
    Weights weights(dtype, p.shape.channels);
    p.weight = weights.matrix(weight);
    p.bias = weights.column(bias);
    p.x[0] = from.view();
    p.x[1] = from_channel(from.view(), p.first, is_double);
    p.y = to.view();
    const OptionalState first_half(net, dtype, Use::write, p.shape, p.first);
    p.net = first_half.view();
    std::optional<State> raw;
    std::optional<SampleValues> sums;
    Coupling coupling;
    if (!params.is_none()) {
        raw.emplace(params, dtype, Use::read);
        coupling = describe_coupling(is_double, second_half(p.shape, p.first), *raw, scale, inverse);
        sums.emplace(ledger, dtype, Use::write, p.shape.samples);
        coupling.ledger = sums->data();
        p.coupling = &coupling;
    }
    py::gil_scoped_release release;
    conv1x1_cpu(p, threads);
}

Conv1x1Backward describe_backward(bool is_double, const State& dstate) {
    Conv1x1Backward p;
    p.is_double = is_double;
    p.shape = dstate.shape();
    expect_channels(p.shape);
    p.first = p.shape.channels / 2;
    p.dstate = dstate.view();
    return p;
}

// Computes the gradients of y = W x + bias from the halves of y and dy. If W^-1 is given, also computes
// x = W^-1 (y - bias) and net, a copy of x's first half.
void conv1x1_backward(int threads, const Half& y, const Half& dy, const py::object& dnet,
                      const py::object& weight, const py::object& bias,
                      const py::object& weight_inverse, const py::object& x, const py::object& net,
                      const py::object& dx, const py::object& outer_sum, const py::object& dbias) {
    const py::object dtype = dx.attr("dtype");
    const bool is_double = computes_in_double(dtype);
    const State y_a(y.first, dtype, Use::read), y_b(y.second, dtype, Use::read);
    const State dy_a(dy.first, dtype, Use::read), dy_b(dy.second, dtype, Use::read);
    const State result(dx, dtype, Use::write);
    Conv1x1Backward p = describe_backward(is_double, result);
    for (const State* half : {&y_a, &dy_a}) expect_shape(*half, p.shape, p.first);
    for (const State* half : {&y_b, &dy_b}) expect_shape(*half, p.shape, p.shape.channels - p.first);
    p.state[0] = y_a.view();
    p.state[1] = y_b.view();
    p.dy[0] = dy_a.view();
    p.dy[1] = dy_b.view();
    const OptionalState added(dnet, dtype, Use::read, p.shape, p.first);
    p.dnet = added.view();
    Weights weights(dtype, p.shape.channels);
    p.weight = weights.matrix(weight);
    p.bias = weights.column(bias);
    p.weight_inverse = weights.matrix(weight_inverse);
    if (weight_inverse.is_none() != x.is_none()) {
        fail("expected both x and the matrix that rebuilds it, or neither");
    }
    const OptionalState rebuilt(x, dtype, Use::write, p.shape, p.shape.channels);
    const OptionalState first_half(net, dtype, Use::write, p.shape, p.first);
    p.rebuilt = rebuilt.view();
    p.net = first_half.view();
    const Sums sums(outer_sum, dbias, dtype, p.shape.channels);
    p.outer_sum = sums.outer_sum();
    p.dbias = sums.dbias();
    py::gil_scoped_release release;
    conv1x1_backward_cpu(p, threads);
}

// Computes the gradients of y = W couple(x) + bias.
void coupling_conv1x1_backward(int threads, const py::object& x, const py::object& params,
                               const py::object& dy, const py::object& dnet, const py::object& dlogdet,
                               const py::object& weight, const py::object& dx,
                               const py::object& dparams, const py::object& outer_sum,
                               const py::object& dbias, const py::tuple& scale, bool inverse) {
    const py::object dtype = x.attr("dtype");
    const bool is_double = computes_in_double(dtype);
    const State state(x, dtype, Use::read), raw(params, dtype, Use::read);
    const State gradient(dy, dtype, Use::read);
    const State result(dx, dtype, Use::write), draw(dparams, dtype, Use::write);
    expect_like(state, gradient);
    expect_like(state, result);
    expect_like(raw, draw);
    Conv1x1Backward p = describe_backward(is_double, result);
    const int64_t first = p.first;
    p.dy[0] = gradient.view();
    p.dy[1] = from_channel(gradient.view(), first, is_double);
    const OptionalState added(dnet, dtype, Use::read, p.shape, first);
    p.dnet = added.view();
    p.state[0] = state.view();
    p.state[1] = from_channel(state.view(), first, is_double);
    Weights weights(dtype, p.shape.channels);
    p.weight = weights.matrix(weight);
    const Sums sums(outer_sum, dbias, dtype, p.shape.channels);
    p.outer_sum = sums.outer_sum();
    p.dbias = sums.dbias();
    const Shape half = second_half(p.shape, first);
    Coupling coupling = describe_coupling(is_double, half, raw, scale, inverse);
    coupling.draw = draw.view();
    coupling.dshift = from_channel(coupling.draw, half.channels, is_double);
    const SampleValues values(dlogdet, dtype, Use::read, p.shape.samples);
    coupling.dlogdet = values.data();
    coupling.dlogdet_stride = values.stride();
    p.coupling = &coupling;
    py::gil_scoped_release release;
    conv1x1_backward_cpu(p, threads);
}

}  // namespace

void bind_conv1x1(py::module_& m) {
    m.attr("conv1x1_max_channels") = kMaxChannels;
    m.def("conv1x1", &conv1x1);
    m.def("conv1x1_backward", &conv1x1_backward);
    m.def("coupling_conv1x1_backward", &coupling_conv1x1_backward);
}

}  // namespace mflow
