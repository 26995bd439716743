// The Python module mflow_kernels._C, and its masked penalty: turns addresses, shapes and strides into
// a Problem. The caller (mflow_kernels/ops/masked_penalty.py) owns every tensor and has checked dtypes,
// devices and shapes; here only what would make the loops read wrong memory is checked again.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/bindings.h"
#include "masked_penalty/masked_penalty.h"

// Space-separated architectures inside, and a reason where there are none; setup.py sets both.
#ifndef MFLOW_CUDA_ARCHS
#define MFLOW_CUDA_ARCHS ""
#endif
#ifndef MFLOW_CUDA_NOTE
#define MFLOW_CUDA_NOTE ""
#endif

namespace py = pybind11;

namespace mflow {

#ifndef MFLOW_WITH_CUDA
// These stand in for masked_penalty.cu.
void forward_cuda(const Problem&, void*) { throw std::runtime_error("built without CUDA kernels"); }
void backward_cuda(const Problem&, void*) { throw std::runtime_error("built without CUDA kernels"); }
std::string cuda_problem() { return "built without CUDA kernels"; }
int cuda_runtime_version() { return 0; }
#endif

namespace {

using Sizes = std::vector<int64_t>;
// Address and one stride for each axis, the sample axis first; absent where the tensor is.
using Strided = std::optional<std::pair<Pointer, Sizes>>;

Dtype parse_dtype(const std::string& name) {
    if (name == "float32") return Dtype::float32;
    if (name == "float64") return Dtype::float64;
    if (name == "float16") return Dtype::float16;
    if (name == "bfloat16") return Dtype::bfloat16;
    fail("unknown dtype " + name);
}

int parse_rho(const std::string& name) {
    const int rho = Rhos::find(name);
    if (rho < 0) fail("unknown rho " + name);
    return rho;
}

int64_t item_size(Dtype dtype) {
    return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

struct Source {
    View* view;
    const Strided* from;
    int64_t item_size;
};

// Sorts the inner axes into the input's memory order, innermost first, and merges neighbours that
// every tensor walks through as one.
void lay_out(Problem& p, const Sizes& shape, const std::vector<Source>& sources) {
    const size_t dims = shape.size();
    if (dims < 2) fail("expected at least two axes");
    for (const Source& s : sources) {
        if (*s.from && (*s.from)->second.size() != dims) fail("expected one stride an axis");
    }
    const Sizes& order = (*sources[0].from)->second;  // the input's strides
    std::vector<size_t> axes;
    int64_t size = 1;
    for (size_t a = 1; a < dims; ++a) {
        if (shape[a] < 1) fail("expected no empty inner axis");
        if (shape[a] > std::numeric_limits<int32_t>::max() / size) {
            fail("expected fewer than 2^31 elements a sample");
        }
        size *= shape[a];
        if (shape[a] > 1) axes.insert(axes.begin(), a);  // later axes first: innermost of equals
    }
    std::stable_sort(axes.begin(), axes.end(),
                     [&](size_t a, size_t b) { return order[a] < order[b]; });

    p.samples = shape[0];
    p.size = static_cast<uint32_t>(size);
    p.tiles = (size + kTile - 1) / kTile;
    p.axes = 0;
    for (size_t a : axes) {
        const int last = p.axes - 1;
        bool merges = last >= 0;
        for (const Source& s : sources) {
            if (!*s.from || !merges) continue;
            merges = (*s.from)->second[a] == s.view->stride[last] * int64_t(p.extent[last]);
        }
        if (merges) {
            p.extent[last] *= static_cast<uint32_t>(shape[a]);
            continue;
        }
        if (p.axes == kMaxAxes) fail("more than 4 inner axes after merging");
        p.extent[p.axes] = static_cast<uint32_t>(shape[a]);
        for (const Source& s : sources) {
            if (*s.from) s.view->stride[p.axes] = (*s.from)->second[a];
        }
        ++p.axes;
    }
    p.axes = std::max(p.axes, 1);

    const int64_t vector = 16 / item_size(p.dtype);
    for (const Source& s : sources) {
        if (!*s.from) continue;
        View& view = *s.view;
        view.data = reinterpret_cast<void*>((*s.from)->first);
        view.sample_stride = (*s.from)->second[0];
        view.dense = true;
        int64_t packed = 1;
        for (int a = 0; a < p.axes; ++a) {
            view.dense = view.dense && (p.extent[a] == 1 || view.stride[a] == packed);
            packed *= p.extent[a];
        }
        // A vector may start at every multiple of its length in a row: a row's end matters only
        // where another row follows.
        const int64_t alignment = std::min<int64_t>(16, vector * s.item_size);
        const auto keeps = [&](int64_t stride) { return stride * s.item_size % alignment == 0; };
        view.aligned = (*s.from)->first % alignment == 0 && p.size > 1 && view.stride[0] == 1 &&
                       (p.samples == 1 || keeps(view.sample_stride)) &&
                       (p.axes == 1 || p.extent[0] % vector == 0);
        for (int a = 1; a < p.axes; ++a) view.aligned = view.aligned && keeps(view.stride[a]);
        p.indexed = p.indexed || !view.dense;
    }
}

Problem describe(const std::string& dtype, const Sizes& shape, const Strided& input,
                 const Strided& target, const Strided& mask, bool mask_is_bool,
                 const Strided& weight, double scale, const std::string& rho, double delta,
                 const Strided& dinput = {}, const Strided& dtarget = {}) {
    Problem p;
    p.dtype = parse_dtype(dtype);
    p.rho = parse_rho(rho);
    p.delta = delta;
    p.scale = scale;
    p.mask_is_bool = mask_is_bool;
    if (!input) fail("input is absent");
    const int64_t item = item_size(p.dtype), accumulate = p.dtype == Dtype::float64 ? 8 : 4;
    lay_out(p, shape,
            {{&p.input, &input, item},
             {&p.target, &target, item},
             {&p.mask, &mask, mask_is_bool ? 1 : accumulate},
             {&p.weight, &weight, accumulate},
             {&p.dinput, &dinput, item},
             {&p.dtarget, &dtarget, item}});
    return p;
}

template <class Cpu, class Cuda>
void dispatch(const Problem& p, bool cuda, Pointer queue, Cpu on_cpu, Cuda on_cuda) {
    py::gil_scoped_release release;
    if (p.samples == 0) return;
    if (cuda) {
        on_cuda(p, reinterpret_cast<void*>(queue));
    } else {
        on_cpu(p, static_cast<int>(queue));
    }
}

void forward(bool cuda, Pointer queue, const std::string& dtype, const Sizes& shape,
             const Strided& input, const Strided& target, const Strided& mask, bool mask_is_bool,
             const Strided& weight, double scale, const std::string& rho, double delta,
             Pointer penalty, Pointer gaussian, Pointer partial) {
    Problem p = describe(dtype, shape, input, target, mask, mask_is_bool, weight, scale, rho, delta);
    p.penalty = reinterpret_cast<void*>(penalty);
    p.gaussian = reinterpret_cast<void*>(gaussian);
    p.partial = reinterpret_cast<void*>(partial);
    if (p.tiles > 1 && p.samples > 0 && !p.partial) fail("partial is absent");
    dispatch(p, cuda, queue, forward_cpu, forward_cuda);
}

void backward(bool cuda, Pointer queue, const std::string& dtype, const Sizes& shape,
              const Strided& input, const Strided& target, const Strided& mask, bool mask_is_bool,
              const Strided& weight, double scale, const std::string& rho, double delta,
              std::pair<Pointer, int64_t> grad_penalty, std::pair<Pointer, int64_t> grad_gaussian,
              const Strided& dinput, const Strided& dtarget) {
    Problem p = describe(dtype, shape, input, target, mask, mask_is_bool, weight, scale, rho, delta,
                         dinput, dtarget);
    p.grad_penalty.data = reinterpret_cast<void*>(grad_penalty.first);
    p.grad_penalty.sample_stride = grad_penalty.second;
    p.grad_gaussian.data = reinterpret_cast<void*>(grad_gaussian.first);
    p.grad_gaussian.sample_stride = grad_gaussian.second;
    dispatch(p, cuda, queue, backward_cpu, backward_cuda);
}

}  // namespace
}  // namespace mflow

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU loops and CUDA kernels of the masked penalty, by address; CPU loops of couplings. "
              "`queue` is the number of threads on a CPU, the stream on a GPU.";
    // clang-format off
    m.def("forward", &mflow::forward,
          py::arg("cuda"), py::arg("queue"), py::arg("dtype"), py::arg("shape"),
          py::arg("input"), py::arg("target"), py::arg("mask"), py::arg("mask_is_bool"),
          py::arg("weight"), py::arg("scale"), py::arg("rho"), py::arg("delta"),
          py::arg("penalty"), py::arg("gaussian"), py::arg("partial"));
    m.def("backward", &mflow::backward,
          py::arg("cuda"), py::arg("queue"), py::arg("dtype"), py::arg("shape"),
          py::arg("input"), py::arg("target"), py::arg("mask"), py::arg("mask_is_bool"),
          py::arg("weight"), py::arg("scale"), py::arg("rho"), py::arg("delta"),
          py::arg("grad_penalty"), py::arg("grad_gaussian"), py::arg("dinput"), py::arg("dtarget"));
    // clang-format on
    mflow::bind_couplings(m);
    mflow::bind_mixes(m);
    m.attr("tile") = mflow::kTile;
    m.attr("max_axes") = mflow::kMaxAxes;
    m.attr("cuda_archs") = py::str(MFLOW_CUDA_ARCHS).attr("split")();
    m.attr("cuda_note") = MFLOW_CUDA_NOTE;
    m.attr("cuda_runtime") = mflow::cuda_runtime_version();
    m.def("cuda_problem", &mflow::cuda_problem);
}
