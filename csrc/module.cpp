// The Python module mflow_kernels._C: turns addresses, shapes and strides into a Problem. The
// callers (mflow_kernels/ops/masked_penalty.py and _native.py) own every tensor and have checked
// dtypes, devices and shapes; here only what would make the loops read wrong memory is checked again.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "coupling.h"
#include "masked_penalty.h"

// Space-separated architectures inside, and a reason where there are none; setup.py sets both.
#ifndef MFLOW_CUDA_ARCHS
#define MFLOW_CUDA_ARCHS ""
#endif
#ifndef MFLOW_CUDA_NOTE
#define MFLOW_CUDA_NOTE ""
#endif

namespace py = pybind11;

namespace mflow {
namespace {

using Sizes = std::vector<int64_t>;
using Pointer = std::uintptr_t;
// Address and one stride for each axis, the sample axis first; absent where the tensor is.
using Strided = std::optional<std::pair<Pointer, Sizes>>;

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("mflow_kernels._C: " + what); }

Dtype parse_dtype(const std::string& name) {
    if (name == "float32") return Dtype::float32;
    if (name == "float64") return Dtype::float64;
    if (name == "float16") return Dtype::float16;
    if (name == "bfloat16") return Dtype::bfloat16;
    fail("unknown dtype " + name);
}

Rho parse_rho(const std::string& name) {
    if (name == "l2") return Rho::l2;
    if (name == "l1") return Rho::l1;
    if (name == "huber") return Rho::huber;
    fail("unknown rho " + name);
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

#ifndef MFLOW_WITH_CUDA
void no_cuda(const Problem&, void*) { throw std::runtime_error("built without CUDA kernels"); }
#define forward_cuda no_cuda
#define backward_cuda no_cuda
#endif

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

// Names looked up for every tensor: made once.
PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

// A state (N, C, *spatial) as the loops walk it. It is asked of the tensor in Python, which costs less
// than Python code that asks, and leaves the extension free of torch. A tensor whose pixels no single
// stride walks, or of another dtype than the state's, is read from a copy.
enum class Use { read, write };

class State {
public:
    State(py::object tensor, const py::object& dtype, Use use) : tensor_(std::move(tensor)) {
        static PyObject* const dtype_name = name("dtype");
        if (!py::getattr(tensor_, dtype_name).is(dtype)) {
            if (use == Use::write) fail("expected results of the state's dtype");
            tensor_ = tensor_.attr("to")(dtype);
        }
        if (walks()) return;
        if (use == Use::write) fail("expected results whose pixels one stride walks");
        tensor_ = tensor_.attr("contiguous")();
        if (!walks()) fail("expected a contiguous copy");
    }

    const Shape& shape() const { return shape_; }
    const Walk& walk() const { return walk_; }

private:
    bool walks() {
        static PyObject* const shape_name = name("shape");
        static PyObject* const stride_name = name("stride");
        static PyObject* const pointer_name = name("data_ptr");
        const py::tuple lengths = py::getattr(tensor_, shape_name);
        const py::tuple strides = py::reinterpret_steal<py::object>(
            PyObject_CallMethodNoArgs(tensor_.ptr(), stride_name));
        const auto at = [](const py::tuple& t, size_t i) { return PyLong_AsLongLong(t[i].ptr()); };
        if (lengths.size() < 2) fail("expected (N, C, *spatial)");
        int64_t pixels = 1, step = 1;
        for (size_t axis = lengths.size(); axis-- > 2;) {
            const int64_t length = at(lengths, axis), stride = at(strides, axis);
            if (length == 1) continue;
            if (pixels == 1) step = stride;
            if (stride != step * pixels) return false;
            pixels *= length;
        }
        shape_ = {at(lengths, 0), at(lengths, 1), pixels};
        const py::object pointer = py::reinterpret_steal<py::object>(
            PyObject_CallMethodNoArgs(tensor_.ptr(), pointer_name));
        walk_ = {PyLong_AsVoidPtr(pointer.ptr()), at(strides, 0), at(strides, 1), step};
        return true;
    }

    py::object tensor_;
    Shape shape_;
    Walk walk_;
};

// From a channel on.
Walk from_channel(Walk w, int64_t channel, bool is_double) {
    w.data = static_cast<char*>(w.data) + channel * w.channel * (is_double ? 8 : 4);
    return w;
}

Scale parse_scale(const std::string& kind, double offset, double eps, double clamp,
                  const std::string& order, bool is_double) {
    Scale s;
    s.offset = offset;
    s.eps = eps;
    s.clamp = clamp;
    if (order != "shift-scale" && order != "scale-shift") fail("unknown order " + order);
    s.shift_first = order == "shift-scale";
    if (kind == "sigmoid") {
        // An eps that rounds to 0 is none.
        const bool floored = is_double ? eps > 0 : static_cast<float>(eps) > 0;
        s.kind = floored ? Kind::floored_sigmoid : Kind::sigmoid;
    } else if (kind == "exp") {
        s.kind = Kind::exp;
    } else if (kind == "tanh") {
        s.kind = Kind::tanh;
    } else if (kind == "atan") {
        s.kind = Kind::atan;
    } else {
        fail("unknown kind " + kind);
    }
    return s;
}

Coupling describe_coupling(bool is_double, const Shape& half, const State& params,
                           const std::string& kind, double offset, double eps, double clamp,
                           const std::string& order, bool inverse) {
    const Shape& given = params.shape();
    if (given.samples != half.samples || given.channels != 2 * half.channels ||
        given.pixels != half.pixels) {
        fail("expected params of twice the half's channels");
    }
    Coupling p;
    p.is_double = is_double;
    p.shape = half;
    p.scale = parse_scale(kind, offset, eps, clamp, order, is_double);
    p.inverse = inverse;
    p.raw = params.walk();
    p.shift = from_channel(p.raw, half.channels, is_double);
    return p;
}

// The half of a state that is scaled; `stays` channels are not.
Shape scaled_half(const State& state, int64_t stays) {
    Shape half = state.shape();
    half.channels -= stays;
    if (stays > half.channels) fail("expected the half that stays to be no larger than the other");
    return half;
}

void expect_like(const State& state, const State& other) {
    const Shape &a = state.shape(), &b = other.shape();
    if (a.samples != b.samples || a.channels != b.channels || a.pixels != b.pixels) {
        fail("expected states of one shape");
    }
}

void couple(bool is_double, int threads, int64_t stays, const py::object& x, const py::object& params,
            const py::object& y, Pointer ledger, const std::string& kind, double offset, double eps,
            double clamp, const std::string& order, bool inverse) {
    const py::object dtype = x.attr("dtype");
    const State from(x, dtype, Use::read), raw(params, dtype, Use::read), to(y, dtype, Use::write);
    expect_like(from, to);
    Coupling p = describe_coupling(is_double, scaled_half(from, stays), raw, kind, offset, eps, clamp,
                                   order, inverse);
    p.stays = stays;
    p.from[0] = from.walk();
    p.to[0] = to.walk();
    p.x = from_channel(from.walk(), stays, is_double);
    p.y = from_channel(to.walk(), stays, is_double);
    p.ledger = reinterpret_cast<void*>(ledger);
    py::gil_scoped_release release;
    couple_cpu(p, threads);
}

// `given` and `dy` are halves (stays = 0) or whole states, and the results like them; `other`, the
// coupling's output where its input is given and the other way round, may be None where `kept`.
void uncouple(bool is_double, int threads, int64_t stays, bool kept, const py::object& given,
              const py::object& params, const py::object& dy,
              std::pair<Pointer, int64_t> dlogdet, const py::object& other, const py::object& dx,
              const py::object& dparams, const std::string& kind, double offset, double eps,
              double clamp, const std::string& order, bool inverse) {
    const py::object dtype = given.attr("dtype");
    const State state(given, dtype, Use::read), raw(params, dtype, Use::read), gradient(dy, dtype, Use::read);
    const State result(dx, dtype, Use::write), draw(dparams, dtype, Use::write);
    expect_like(state, gradient);
    expect_like(state, result);
    expect_like(raw, draw);
    std::optional<State> filled;
    if (!other.is_none()) filled.emplace(other, dtype, Use::write);
    if (filled) expect_like(state, *filled);
    if (!kept && !filled) fail("other is absent");
    Coupling p = describe_coupling(is_double, scaled_half(state, stays), raw, kind, offset, eps, clamp,
                                   order, inverse);
    p.kept = kept;
    (kept ? p.x : p.y) = from_channel(state.walk(), stays, is_double);
    if (filled) (kept ? p.y : p.x) = from_channel(filled->walk(), stays, is_double);
    p.dy = from_channel(gradient.walk(), stays, is_double);
    p.dx = from_channel(result.walk(), stays, is_double);
    p.stays = stays;
    if (stays > 0) {
        p.from[0] = state.walk();
        if (filled) p.to[0] = filled->walk();
        p.from[1] = gradient.walk();
        p.to[1] = result.walk();
    }
    p.draw = draw.walk();
    p.dshift = from_channel(p.draw, p.shape.channels, is_double);
    p.dlogdet = reinterpret_cast<const void*>(dlogdet.first);
    p.dlogdet_stride = dlogdet.second;
    py::gil_scoped_release release;
    uncouple_cpu(p, threads);
}

Assembly describe_assembly(bool is_double, const State& out, const State& first,
                           const State* second) {
    const Shape &whole = out.shape(), &a = first.shape();
    const int64_t channels = second ? a.channels + second->shape().channels : whole.channels;
    if (a.samples != whole.samples || a.pixels != whole.pixels || channels != whole.channels ||
        (second && (second->shape().samples != a.samples || second->shape().pixels != a.pixels)) ||
        a.channels < (second ? 0 : whole.channels)) {
        fail("expected two halves of a state");
    }
    Assembly p;
    p.is_double = is_double;
    p.shape = whole;
    p.first = second ? a.channels : whole.channels;
    p.half[0] = first.walk();
    if (second) p.half[1] = second->walk();
    p.out = out.walk();
    return p;
}

// out = (a + of_a, b) where `of_a` is a tensor or None.
void add_gradients(bool is_double, int threads, const py::object& out, const py::object& a,
                   const py::object& b, const py::object& of_a) {
    const py::object dtype = out.attr("dtype");
    const State whole(out, dtype, Use::write), first(a, dtype, Use::read), second(b, dtype, Use::read);
    std::optional<State> added;
    if (!of_a.is_none()) added.emplace(of_a, dtype, Use::read);
    if (added) expect_like(first, *added);
    Assembly p = describe_assembly(is_double, whole, first, &second);
    if (added) p.other[0] = added->walk();
    py::gil_scoped_release release;
    assemble_cpu(p, threads);
}

// out = (a, b) - bias, one value a channel: address and stride.
void subtract_bias(bool is_double, int threads, const py::object& out, const py::object& a,
                   const py::object& b, std::pair<Pointer, int64_t> bias) {
    const py::object dtype = out.attr("dtype");
    const State whole(out, dtype, Use::write), first(a, dtype, Use::read), second(b, dtype, Use::read);
    Assembly p = describe_assembly(is_double, whole, first, &second);
    p.sign = -1;
    p.other[0] = {reinterpret_cast<void*>(bias.first), 0, bias.second, 0};
    p.other[1] = from_channel(p.other[0], p.first, is_double);
    py::gil_scoped_release release;
    assemble_cpu(p, threads);
}

// out = the first channels of x.
void cut(bool is_double, int threads, const py::object& out, const py::object& x) {
    const py::object dtype = out.attr("dtype");
    const State whole(x, dtype, Use::read), first(out, dtype, Use::write);
    Assembly p = describe_assembly(is_double, first, whole, nullptr);
    py::gil_scoped_release release;
    assemble_cpu(p, threads);
}

}  // namespace
}  // namespace mflow

PYBIND11_MODULE(_C, m) {
    m.doc() = "CPU loops and CUDA kernels of the masked penalty, CPU loops of couplings, by address. "
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
    // Called many times a step, so without names, which would cost as much as the arguments.
    m.def("couple", &mflow::couple);
    m.def("uncouple", &mflow::uncouple);
    m.def("add_gradients", &mflow::add_gradients);
    m.def("subtract_bias", &mflow::subtract_bias);
    m.def("cut", &mflow::cut);
    m.attr("tile") = mflow::kTile;
    m.attr("max_axes") = mflow::kMaxAxes;
    m.attr("cuda_archs") = py::str(MFLOW_CUDA_ARCHS).attr("split")();
    m.attr("cuda_note") = MFLOW_CUDA_NOTE;
#ifdef MFLOW_WITH_CUDA
    m.attr("cuda_runtime") = mflow::cuda_runtime_version();
#else
    m.attr("cuda_runtime") = 0;
#endif
}
