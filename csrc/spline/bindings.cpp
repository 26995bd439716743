// Binds the splines to Python.

#include "../common/half_bindings.h"
#include "describe.h"

namespace mflow {

inline void set_params(Spline& p, Arguments& arguments, const py::object& params,
                       const py::object* dparams) {
    const int64_t channels = p.shape.channels * p.options.numbers();
    p.params = arguments.state_like(params, Use::read, p.shape, channels);
    if (dparams) p.dparams = arguments.state_like(*dparams, Use::write, p.shape, channels);
}

void bind_spline(py::module_& m) {
    m.def("spline", &change_half<Spline>);
    m.def("spline_backward", &change_half_backward<Spline>);
}

}  // namespace mflow
