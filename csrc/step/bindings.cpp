// Binds a step of flow to Python: a coupling or none, then a linear map or none, whose matrix is folded from
// its factors in the same call. The checks here keep the loops from reading or writing wrong memory.

#include <pybind11/pybind11.h>

#include <vector>

#include "../conv1x1/conv1x1.h"
#include "../coupling/describe.h"
#include "../fold/describe.h"

namespace mflow {
namespace {

// Numbers of the state's type.
struct Buffer {
    std::vector<double> values;
    Buffer(int64_t count, bool is_double) : values(is_double ? count : (count + 1) / 2) {}
    void* data() { return values.data(); }
};

// A step on one state: the arguments that its forward and backward problems share.
struct Step {
    Arguments arguments;
    Shape shape;
    StateView x;
    int64_t first, channels;
    bool has_linear;
    Factors factors{};
    Buffer weight, bias;
    double log_det = 0;

    Step(const py::object& state, const py::object& steps_factors)
        : arguments(state),
          x(arguments.state(state, Use::read, shape)),
          first(shape.channels / 2),
          channels(shape.channels),
          has_linear(!steps_factors.is_none()),
          weight(has_linear ? channels * channels : 0, arguments.is_double),
          bias(has_linear ? channels : 0, arguments.is_double) {
        if (!has_linear) return;
        if (channels > kMostFolded) fail("expected few channels");
        factors = read_factors(arguments, steps_factors, channels);
    }

    Invertible fold(bool inverse) {
        return fold_cpu(factors, channels, arguments.is_double, inverse, weight.data(), bias.data(), log_det);
    }

    // The coupling of the second half, whose options and params are set.
    Coupling coupling(const py::object& params, const py::object* dparams, const py::tuple& scale, bool inverse) {
        Coupling c;
        c.is_double = arguments.is_double;
        c.inverse = inverse;
        c.shape = shape;
        c.shape.channels -= first;
        set_options(c, scale);
        set_params(c, arguments, params, dparams);
        return c;
    }

    // A 1x1 convolution by the folded matrix.
    template <class Problem>
    Problem product() {
        Problem p;
        p.is_double = arguments.is_double;
        p.shape = shape;
        p.first = first;
        p.weight = {weight.data(), channels, 1};
        p.bias = {bias.data(), 1, 0};
        return p;
    }
};

template <class A>
void add(const SampleValues& to, const SampleValues& from, double constant, int64_t samples) {
    for (int64_t n = 0; n < samples; ++n) to.at<A>(n) += A(constant) + (from.data ? from.at<A>(n) : A(0));
}

template <class A>
double total(const SampleValues& values, int64_t samples) {
    double sum = 0;
    for (int64_t n = 0; n < samples; ++n) sum += values.at<A>(n);
    return sum;
}

// Fills y, the network input cut from it, and the log-determinant of each sample, to which that of earlier
// steps is added. Returns nothing, or whether the map whose inverse does not exist is infinite.
py::object step(int threads, const py::object& x, const py::object& params, const py::object& factors,
                const py::object& before, const py::object& y, const py::object& net, const py::object& logdet,
                const py::tuple& scale, bool inverse, bool inverse_linear) {
    Step s(x, factors);
    const int64_t samples = s.shape.samples;
    const StateView to = s.arguments.state_like(y, Use::write, s.shape);
    const StateView cut = s.arguments.optional(net, Use::write, s.shape, s.first);
    const SampleValues ledger = s.arguments.samples(logdet, Use::write, samples);
    const SampleValues earlier = before.is_none() ? SampleValues() : s.arguments.samples(before, Use::read, samples);
    Coupling c;
    if (!params.is_none()) {
        c = s.coupling(params, nullptr, scale, inverse);
        c.ledger = ledger;
    }
    Invertible found = Invertible::yes;
    {
        py::gil_scoped_release release;
        if (s.has_linear) {
            found = s.fold(inverse_linear);
            auto p = s.product<Conv1x1>();
            p.x[0] = s.x;
            p.x[1] = s.arguments.from_channel(s.x, s.first);
            p.y = to;
            p.net = cut;
            p.coupling = params.is_none() ? nullptr : &c;
            conv1x1_cpu(p, threads);
        } else {
            c.from = s.x;
            c.to = to;
            c.identity_channels = s.first;
            c.x = s.arguments.from_channel(s.x, s.first);
            c.y = s.arguments.from_channel(to, s.first);
            run(c, threads);
        }
        const bool fresh = !params.is_none() && s.shape.size() > 0;
        const double constant = double(s.shape.pixels) * s.log_det;
        for (int64_t n = 0; n < samples && !fresh; ++n) {
            s.arguments.is_double ? ledger.at<double>(n) = 0 : ledger.at<float>(n) = 0;
        }
        s.arguments.is_double ? add<double>(ledger, earlier, constant, samples)
                              : add<float>(ledger, earlier, constant, samples);
    }
    if (found == Invertible::yes) return py::none();
    return py::bool_(found == Invertible::infinite);
}

// Fills the gradients of x, which may be None without params, of params, and of the parameters among the
// factors. `dlogdet` is (N, 1).
void step_backward(int threads, const py::object& x, const py::object& params, const py::object& factors,
                   const py::object& dy, const py::object& dnet, const py::object& dlogdet, const py::object& dx,
                   const py::object& dparams, const py::object& dfactors, const py::tuple& scale, bool inverse,
                   bool inverse_linear) {
    Step s(x, factors);
    Arguments& arguments = s.arguments;
    const StateView from = arguments.state_like(dy, Use::read, s.shape);
    const StateView to = arguments.optional(dx, Use::write, s.shape, s.channels);
    if (dx.is_none() && !params.is_none()) fail("expected room for the gradient of a coupling's state");
    const SampleValues dledger = arguments.samples(dlogdet, Use::read, s.shape.samples);
    const StateView dcut = arguments.optional(dnet, Use::read, s.shape, s.first);
    Coupling c;
    if (!params.is_none()) {
        c = s.coupling(params, &dparams, scale, inverse);
        c.dlogdet = dledger;
    }
    FactorGradients gradients{};
    if (s.has_linear) gradients = factor_gradients(arguments, dfactors, s.channels);
    py::gil_scoped_release release;
    if (!s.has_linear) {
        c.from = from;
        c.to = to;
        c.identity_channels = s.first;
        c.x = arguments.from_channel(s.x, s.first);
        c.dy = arguments.from_channel(from, s.first);
        c.dx = arguments.from_channel(to, s.first);
        return run(c, threads);
    }
    const double dlog_det = arguments.is_double ? total<double>(dledger, s.shape.samples)
                                                : total<float>(dledger, s.shape.samples);
    s.fold(inverse_linear);
    auto p = s.product<Conv1x1Backward>();
    p.bias = {};  // the state is x
    p.state[0] = s.x;
    p.state[1] = arguments.from_channel(s.x, s.first);
    p.dy[0] = from;
    p.dy[1] = arguments.from_channel(from, s.first);
    p.dnet = dcut;
    p.dstate = to;
    p.coupling = params.is_none() ? nullptr : &c;
    Buffer dweight(s.channels * s.channels, arguments.is_double), dbias(s.channels, arguments.is_double);
    p.outer_sum = dweight.data();
    p.dbias = dbias.data();
    conv1x1_backward_cpu(p, threads);
    fold_backward_cpu(s.factors, s.channels, arguments.is_double, inverse_linear, dweight.data(), dbias.data(),
                      double(s.shape.pixels) * dlog_det, gradients);
}

}  // namespace

void bind_step(py::module_& m) {
    m.def("step", &step);
    m.def("step_backward", &step_backward);
}

}  // namespace mflow
