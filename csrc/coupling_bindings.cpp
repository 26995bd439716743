// The couplings' part of the Python module: takes tensors as they are, and checks what would make the
// loops read wrong memory. The caller (mflow_kernels/ops/_native.py) has checked devices.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings.h"
#include "coupling.h"

namespace py = pybind11;

namespace mflow {
namespace {

enum class Use { read, write };

// A state (N, C, *spatial) as the loops walk it. The tensor is asked in C++ by its Python methods:
// cheaper than Python code that asks, and the extension stays free of torch. A tensor whose pixels no
// single stride walks, or of another dtype than the state's, is read from a copy.
class State {
public:
    State(py::object tensor, const py::object& dtype, Use use) : tensor_(std::move(tensor)) {
        static PyObject* const name = PyUnicode_InternFromString("dtype");
        if (!py::getattr(tensor_, name).is(dtype)) {
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
        // Made once: they are looked up for every tensor.
        static PyObject* const shape_name = PyUnicode_InternFromString("shape");
        static PyObject* const stride_name = PyUnicode_InternFromString("stride");
        static PyObject* const pointer_name = PyUnicode_InternFromString("data_ptr");
        const py::tuple lengths = py::getattr(tensor_, shape_name), strides = call(stride_name);
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
        walk_ = {PyLong_AsVoidPtr(call(pointer_name).ptr()), at(strides, 0), at(strides, 1), step};
        return true;
    }

    py::object call(PyObject* name) const {
        PyObject* const result = PyObject_CallMethodNoArgs(tensor_.ptr(), name);
        if (!result) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
    }

    py::object tensor_;
    Shape shape_;
    Walk walk_;
};

bool computes_in_double(const py::object& dtype) {
    const int size = py::cast<int>(dtype.attr("itemsize"));
    if (size != 4 && size != 8) fail("expected states of float32 or float64");
    return size == 8;
}

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

void couple(int threads, int64_t stays, const py::object& x, const py::object& params,
            const py::object& y, Pointer ledger, const std::string& kind, double offset, double eps,
            double clamp, const std::string& order, bool inverse) {
    const py::object dtype = x.attr("dtype");
    const bool is_double = computes_in_double(dtype);
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
void uncouple(int threads, int64_t stays, bool kept, const py::object& given,
              const py::object& params, const py::object& dy,
              std::pair<Pointer, int64_t> dlogdet, const py::object& other, const py::object& dx,
              const py::object& dparams, const std::string& kind, double offset, double eps,
              double clamp, const std::string& order, bool inverse) {
    const py::object dtype = given.attr("dtype");
    const bool is_double = computes_in_double(dtype);
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
void add_gradients(int threads, const py::object& out, const py::object& a,
                   const py::object& b, const py::object& of_a) {
    const py::object dtype = out.attr("dtype");
    const bool is_double = computes_in_double(dtype);
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
void subtract_bias(int threads, const py::object& out, const py::object& a,
                   const py::object& b, std::pair<Pointer, int64_t> bias) {
    const py::object dtype = out.attr("dtype");
    const bool is_double = computes_in_double(dtype);
    const State whole(out, dtype, Use::write), first(a, dtype, Use::read), second(b, dtype, Use::read);
    Assembly p = describe_assembly(is_double, whole, first, &second);
    p.sign = -1;
    p.other[0] = {reinterpret_cast<void*>(bias.first), 0, bias.second, 0};
    p.other[1] = from_channel(p.other[0], p.first, is_double);
    py::gil_scoped_release release;
    assemble_cpu(p, threads);
}

// out = the first channels of x.
void cut(int threads, const py::object& out, const py::object& x) {
    const py::object dtype = out.attr("dtype");
    const bool is_double = computes_in_double(dtype);
    const State whole(x, dtype, Use::read), first(out, dtype, Use::write);
    Assembly p = describe_assembly(is_double, first, whole, nullptr);
    py::gil_scoped_release release;
    assemble_cpu(p, threads);
}

}  // namespace

void bind_couplings(py::module_& m) {
    // Called many times a step, so without names, which would cost as much as the arguments.
    m.def("couple", &couple);
    m.def("uncouple", &uncouple);
    m.def("add_gradients", &add_gradients);
    m.def("subtract_bias", &subtract_bias);
    m.def("cut", &cut);
}

}  // namespace mflow
