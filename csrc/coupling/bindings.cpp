// Binds the couplings to Python.

#include "../common/half_bindings.h"
#include "describe.h"

namespace mflow {

void bind_coupling(py::module_& m) {
    m.def("coupling", &change_half<Coupling>);
    m.def("coupling_backward", &change_half_backward<Coupling>);
}

}  // namespace mflow
