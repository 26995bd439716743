// Binds the masked penalty to Python, and describes the problem by addresses and strides. The checks
// here keep the loops from reading or writing wrong memory. The caller
// (mflow_kernels/ops/masked_penalty.py) has checked devices.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/tensors.h"
#include "masked_penalty.h"

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

// A tensor that broadcasts to `shape`, or none: its address, and a stride for each axis of `shape`.
struct Strided {
    std::optional<Tensor> tensor;
    Sizes strides;
    int64_t item_size = 0;

    Strided(const py::object& object, const py::object& dtype, Use use, const Sizes& shape) {
        if (object.is_none()) return;
        tensor.emplace(object, dtype, use);
        item_size = py::cast<int64_t>(dtype.attr("itemsize"));
        const size_t axes = tensor->axes();
        if (axes > shape.size()) fail("expected no more axes than the input's");
        strides.resize(shape.size());
        for (size_t i = 0; i < axes; ++i) {
            const size_t axis = shape.size() - axes + i;
            const int64_t length = tensor->length(i);
            if (length == shape[axis]) {
                strides[axis] = tensor->stride(i);
            } else if (length != 1 || use == Use::write) {
                fail("expected a shape that broadcasts to the input's");
            }
        }
    }
    explicit operator bool() const { return tensor.has_value(); }
};

struct Source {
    View* view;
    const Strided* from;
};

// Sorts the inner axes into the input's memory order, innermost first, and merges neighbouring axes
// that act as one axis in every tensor.
void lay_out(Problem& p, const Sizes& shape, const std::vector<Source>& sources) {
    const size_t dims = shape.size();
    if (dims < 2) fail("expected at least two axes");
    const Sizes& order = sources[0].from->strides;  // the input's strides
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
            merges = s.from->strides[a] == s.view->stride[last] * int64_t(p.extent[last]);
        }
        if (merges) {
            p.extent[last] *= static_cast<uint32_t>(shape[a]);
            continue;
        }
        if (p.axes == kMaxAxes) fail("more than 4 inner axes after merging");
        p.extent[p.axes] = static_cast<uint32_t>(shape[a]);
        for (const Source& s : sources) {
            if (*s.from) s.view->stride[p.axes] = s.from->strides[a];
        }
        ++p.axes;
    }
    p.axes = std::max(p.axes, 1);

    const int64_t vector = 16 / sources[0].from->item_size;
    for (const Source& s : sources) {
        if (!*s.from) continue;
        View& view = *s.view;
        view.data = s.from->tensor->data();
        view.sample_stride = s.from->strides[0];
        view.dense = true;
        int64_t packed = 1;
        for (int a = 0; a < p.axes; ++a) {
            view.dense = view.dense && (p.extent[a] == 1 || view.stride[a] == packed);
            packed *= p.extent[a];
        }
        // Vectors start at the multiples of their length in a row. The length of a row matters only if
        // another row follows.
        const int64_t alignment = std::min<int64_t>(16, vector * s.from->item_size);
        const auto keeps = [&](int64_t stride) { return stride * s.from->item_size % alignment == 0; };
        view.aligned = reinterpret_cast<uintptr_t>(view.data) % alignment == 0 && p.size > 1 && view.stride[0] == 1 &&
                       (p.samples == 1 || keeps(view.sample_stride)) &&
                       (p.axes == 1 || p.extent[0] % vector == 0);
        for (int a = 1; a < p.axes; ++a) view.aligned = view.aligned && keeps(view.stride[a]);
        p.indexed = p.indexed || !view.dense;
    }
}

Dtype parse_dtype(const py::object& dtype) {
    const std::string name = py::cast<std::string>(py::str(dtype));
    if (name == "torch.float32") return Dtype::float32;
    if (name == "torch.float64") return Dtype::float64;
    if (name == "torch.float16") return Dtype::float16;
    if (name == "torch.bfloat16") return Dtype::bfloat16;
    fail("unknown dtype " + name);
}

// The description of a problem, and the tensors that it points to.
struct Described {
    py::object dtype, accumulate;  // of the input; of sums, weights and masks that are not bool
    Sizes shape;
    Strided input, target, mask, weight;
    Problem problem;

    Described(const py::object& input, const py::object& target, const py::object& mask,
              const py::object& weight, double scale, const std::string& rho, double delta,
              const py::object& sums_dtype)
        : dtype(input.attr("dtype")),
          accumulate(sums_dtype),
          shape(py::cast<Sizes>(input.attr("shape"))),
          input(input, dtype, Use::read, shape),
          target(target, dtype, Use::read, shape),
          mask(mask, mask_dtype(mask), Use::read, shape),
          weight(weight, accumulate, Use::read, shape) {
        Problem& p = problem;
        p.dtype = parse_dtype(dtype);
        p.rho = Rhos::find(rho);
        if (p.rho < 0) fail("unknown rho " + rho);
        p.delta = delta;
        p.scale = scale;
        p.mask_is_bool = this->mask && this->mask.item_size == 1;
    }

    void lay_out(const Strided& dinput, const Strided& dtarget) {
        Problem& p = problem;
        mflow::lay_out(p, shape,
                       {{&p.input, &input},
                        {&p.target, &target},
                        {&p.mask, &mask},
                        {&p.weight, &weight},
                        {&p.dinput, &dinput},
                        {&p.dtarget, &dtarget}});
    }

private:
    py::object mask_dtype(const py::object& mask) const {
        if (mask.is_none()) return accumulate;
        const py::object own = mask.attr("dtype");
        return py::cast<int>(own.attr("itemsize")) == 1 ? own : accumulate;
    }
};

// `queue` is the number of threads on a CPU, and the stream on a GPU.
template <class Cpu, class Cuda>
void dispatch(const Problem& p, bool cuda, uintptr_t queue, Cpu on_cpu, Cuda on_cuda) {
    py::gil_scoped_release release;
    if (p.samples == 0) return;
    if (cuda) {
        on_cuda(p, reinterpret_cast<void*>(queue));
    } else {
        on_cpu(p, static_cast<int>(queue));
    }
}

// Fills penalty (N,), gaussian (N,) and, if a sample has several tiles, partial (2, N, tiles).
void forward(bool cuda, uintptr_t queue, const py::object& input, const py::object& target,
             const py::object& mask, const py::object& weight, double scale, const std::string& rho,
             double delta, const py::object& penalty, const py::object& gaussian,
             const py::object& partial) {
    const py::object sums = penalty.attr("dtype");
    Described d(input, target, mask, weight, scale, rho, delta, sums);
    d.lay_out(Strided(py::none(), sums, Use::write, d.shape), Strided(py::none(), sums, Use::write, d.shape));
    Problem& p = d.problem;
    const Tensor to_penalty(penalty, sums, Use::write), to_gaussian(gaussian, sums, Use::write);
    const Tensor to_partial(partial, sums, Use::write);
    if (p.tiles > 1 && to_partial.length(0) < 2 * p.samples * p.tiles) fail("partial is too small");
    p.penalty = sample_values(to_penalty, p.samples).data;
    p.gaussian = sample_values(to_gaussian, p.samples).data;
    p.partial = to_partial.data();
    dispatch(p, cuda, queue, forward_cpu, forward_cuda);
}

// Fills the gradients that are not None.
void backward(bool cuda, uintptr_t queue, const py::object& input, const py::object& target,
              const py::object& mask, const py::object& weight, double scale, const std::string& rho,
              double delta, const py::object& grad_penalty, const py::object& grad_gaussian,
              const py::object& dinput, const py::object& dtarget) {
    const py::object sums = grad_penalty.attr("dtype");
    Described d(input, target, mask, weight, scale, rho, delta, sums);
    const Strided to_input(dinput, d.dtype, Use::write, d.shape);
    const Strided to_target(dtarget, d.dtype, Use::write, d.shape);
    d.lay_out(to_input, to_target);
    Problem& p = d.problem;
    const Tensor g(grad_penalty, sums, Use::read), h(grad_gaussian, sums, Use::read);
    p.grad_penalty = sample_values(g, p.samples);
    p.grad_gaussian = sample_values(h, p.samples);
    dispatch(p, cuda, queue, backward_cpu, backward_cuda);
}

}  // namespace

void bind_masked_penalty(py::module_& m) {
    m.attr("tile") = kTile;
    m.def("masked_penalty", &forward);
    m.def("masked_penalty_backward", &backward);
    m.def("cuda_problem", &cuda_problem);
    m.attr("cuda_runtime") = cuda_runtime_version();
}

}  // namespace mflow
