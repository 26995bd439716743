// Binds actnorm to Python. The checks here keep the loops from reading or writing wrong memory.

#include <pybind11/pybind11.h>

#include "../common/tensors.h"
#include "actnorm.h"

namespace mflow {
namespace {

template <class Problem>
void describe(Problem& p, Arguments& arguments, const py::object& x, const py::object& bias,
              const py::object& log_scale, bool inverse) {
    p.is_double = arguments.is_double;
    p.inverse = inverse;
    p.x = arguments.state(x, Use::read, p.shape);
    p.bias = arguments.dense(bias, Use::read, {p.shape.channels});
    p.log_scale = arguments.dense(log_scale, Use::read, {p.shape.channels});
    if (!p.bias || !p.log_scale) fail("expected a bias and a log_scale");
}

// Fills y and the log-determinant of each sample.
void actnorm(int threads, const py::object& x, const py::object& bias, const py::object& log_scale,
             const py::object& y, const py::object& logdet, bool inverse) {
    Arguments arguments(x);
    ActNorm p;
    describe(p, arguments, x, bias, log_scale, inverse);
    p.y = arguments.state_like(y, Use::write, p.shape);
    p.logdet = arguments.samples(logdet, Use::write, p.shape.samples);
    py::gil_scoped_release release;
    run(p, threads);
}

// Fills the gradients of x, which may be None, of bias and of log_scale.
void actnorm_backward(int threads, const py::object& dy, const py::object& dlogdet, const py::object& x,
                      const py::object& bias, const py::object& log_scale, const py::object& dx,
                      const py::object& dbias, const py::object& dlog_scale, bool inverse) {
    Arguments arguments(x);
    ActNormBackward p;
    describe(p, arguments, x, bias, log_scale, inverse);
    p.dy = arguments.state_like(dy, Use::read, p.shape);
    p.dx = arguments.optional(dx, Use::write, p.shape, p.shape.channels);
    p.dlogdet = arguments.samples(dlogdet, Use::read, p.shape.samples);
    p.dbias = arguments.dense(dbias, Use::write, {p.shape.channels});
    p.dlog_scale = arguments.dense(dlog_scale, Use::write, {p.shape.channels});
    if (!p.dbias || !p.dlog_scale) fail("expected room for the gradients");
    py::gil_scoped_release release;
    run(p, threads);
}

}  // namespace

void bind_actnorm(py::module_& m) {
    m.def("actnorm", &actnorm);
    m.def("actnorm_backward", &actnorm_backward);
}

}  // namespace mflow
