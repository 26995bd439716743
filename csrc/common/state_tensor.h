// Tensors as the loops walk them, and what their bindings share. The tensor is asked in C++ by its
// Python methods: cheaper than Python code that asks, and the extension stays free of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "bindings.h"
#include "../coupling/coupling.h"
#include "../coupling/scale.h"

namespace mflow {

namespace py = pybind11;

enum class Use { read, write };

// A state (N, C, *spatial) as the loops walk it. A tensor whose pixels no single stride walks, or of
// another dtype than the state's, is read from a copy.
class State {
public:
    State(py::object tensor, const py::object& dtype, Use use) : tensor_(std::move(tensor)) {
        static PyObject* const name = PyUnicode_InternFromString("dtype");
        static PyObject* const negated = PyUnicode_InternFromString("is_neg");
        if (!py::getattr(tensor_, name).is(dtype)) {
            if (use == Use::write) fail("expected results of the state's dtype");
            tensor_ = tensor_.attr("to")(dtype);
        }
        // torch negates lazily: memory then holds the opposite of the tensor's values.
        if (use == Use::read && call(negated).ptr() == Py_True) {
            tensor_ = tensor_.attr("resolve_neg")();
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
        const auto at = [](const py::tuple& t, size_t i) {
            return PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), i));
        };
        if (lengths.size() < 2) fail("expected (N, C, *spatial)");
        int64_t pixels = 1, step = 1;
        bool one_stride = true;
        for (size_t axis = lengths.size(); axis-- > 2;) {
            const int64_t length = at(lengths, axis), stride = at(strides, axis);
            if (length == 1) continue;
            if (pixels == 1) step = stride;
            one_stride = one_stride && stride == step * pixels;
            pixels *= length;
        }
        shape_ = {at(lengths, 0), at(lengths, 1), pixels};
        // The strides of an empty tensor lead nowhere, and its contiguous copy would keep them.
        if (!one_stride && shape_.size() > 0) return false;
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

inline bool computes_in_double(const py::object& dtype) {
    const int size = py::cast<int>(dtype.attr("itemsize"));
    if (size != 4 && size != 8) fail("expected states of float32 or float64");
    return size == 8;
}

// From a channel on.
inline Walk from_channel(Walk w, int64_t channel, bool is_double) {
    w.data = static_cast<char*>(w.data) + channel * w.channel * (is_double ? 8 : 4);
    return w;
}

// From (kind, offset, eps, clamp, order).
inline Scale parse_scale(const py::tuple& args, bool is_double) {
    Scale s;
    const std::string kind = py::cast<std::string>(args[0]), order = py::cast<std::string>(args[4]);
    s.offset = py::cast<double>(args[1]);
    s.eps = py::cast<double>(args[2]);
    s.clamp = py::cast<double>(args[3]);
    if (order != "shift-scale" && order != "scale-shift") fail("unknown order " + order);
    s.shift_first = order == "shift-scale";
    // An eps that rounds to 0 is none.
    const bool floored = is_double ? s.eps > 0 : static_cast<float>(s.eps) > 0;
    const bool with_floor = kind == Sigmoid::name && floored;
    s.function = ScaleFunctions::find(with_floor ? FlooredSigmoid::name : kind);
    if (s.function < 0) fail("unknown scale function " + kind);
    return s;
}

// A coupling with these params of a half of this shape.
inline Coupling describe_coupling(bool is_double, const Shape& half, const State& params,
                                  const py::tuple& scale, bool inverse) {
    const Shape& given = params.shape();
    if (given.samples != half.samples || given.channels != 2 * half.channels ||
        given.pixels != half.pixels) {
        fail("expected params of twice the half's channels");
    }
    Coupling p;
    p.is_double = is_double;
    p.shape = half;
    p.scale = parse_scale(scale, is_double);
    p.inverse = inverse;
    p.raw = params.walk();
    p.shift = from_channel(p.raw, half.channels, is_double);
    return p;
}

inline void expect_shape(const State& state, const Shape& shape, int64_t channels) {
    const Shape& own = state.shape();
    if (own.samples != shape.samples || own.channels != channels || own.pixels != shape.pixels) {
        fail("expected states of one shape, and halves of it");
    }
}
inline void expect_like(const State& state, const State& other) {
    expect_shape(other, state.shape(), state.shape().channels);
}

}  // namespace mflow
