// Torch tensors as the loops read and write them. They are read through their Python methods, so the
// extension does not depend on torch. Calling these methods from C++ is faster than from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <utility>
#include <vector>

#include "bindings.h"
#include "state_view.h"

namespace mflow {

namespace py = pybind11;

enum class Use { read, write };

// A tensor, its shape, strides and address. A tensor that is written must have the dtype `dtype`. A
// tensor of another dtype is read from a converted copy.
class Tensor {
public:
    Tensor(py::object tensor, const py::object& dtype, Use use) : object_(std::move(tensor)) {
        static PyObject* const dtype_name = PyUnicode_InternFromString("dtype");
        static PyObject* const negated_name = PyUnicode_InternFromString("is_neg");
        if (!py::getattr(object_, dtype_name).is(dtype)) {
            if (use == Use::write) fail("expected results of the state's dtype");
            object_ = object_.attr("to")(dtype);
        }
        // torch negates lazily: memory then holds the opposite of the tensor's values.
        if (use == Use::read && call(negated_name).ptr() == Py_True) {
            object_ = object_.attr("resolve_neg")();
        }
        look();
    }

    void make_contiguous() {
        object_ = object_.attr("contiguous")();
        look();
    }

    size_t axes() const { return lengths_.size(); }
    int64_t length(size_t axis) const { return at(lengths_, axis); }
    int64_t stride(size_t axis) const { return at(strides_, axis); }
    void* data() const { return data_; }

private:
    void look() {
        // The names are made once, because every tensor needs them.
        static PyObject* const shape_name = PyUnicode_InternFromString("shape");
        static PyObject* const stride_name = PyUnicode_InternFromString("stride");
        static PyObject* const pointer_name = PyUnicode_InternFromString("data_ptr");
        lengths_ = py::getattr(object_, shape_name);
        strides_ = call(stride_name);
        data_ = PyLong_AsVoidPtr(call(pointer_name).ptr());
    }

    static int64_t at(const py::tuple& numbers, size_t i) {
        return PyLong_AsLongLong(PyTuple_GET_ITEM(numbers.ptr(), i));
    }

    py::object call(PyObject* name) const {
        PyObject* const result = PyObject_CallMethodNoArgs(object_.ptr(), name);
        if (!result) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
    }

    py::object object_;
    py::tuple lengths_, strides_;
    void* data_ = nullptr;
};

// One value for each sample: a log-determinant or its gradient, (N,) or (N, 1).
inline SampleValues sample_values(const Tensor& t, int64_t samples) {
    const bool column = t.axes() == 2 && t.length(1) == 1;
    if (!(t.axes() == 1 || column) || t.length(0) != samples) fail("expected one value a sample");
    return {t.data(), t.stride(0)};
}

// The tensors of a call on states, which all have one dtype. They live as long as this object.
class Arguments {
public:
    explicit Arguments(const py::object& state) : dtype_(state.attr("dtype")) {
        const int size = py::cast<int>(dtype_.attr("itemsize"));
        if (size != 4 && size != 8) fail("expected states of float32 or float64");
        is_double = size == 8;
    }

    bool is_double;

    // A state (N, C, *spatial) with one stride for all its pixels. Other layouts are read from a copy.
    StateView state(const py::object& tensor, Use use, Shape& shape) {
        Tensor& t = keep(tensor, use);
        if (t.axes() < 2) fail("expected (N, C, *spatial)");
        StateView view;
        if (find_strides(t, shape, view)) return view;
        if (use == Use::write) fail("expected results with one stride for all pixels");
        t.make_contiguous();
        if (!find_strides(t, shape, view)) fail("expected a contiguous copy");
        return view;
    }

    // A state that must have this shape, but for its channels.
    StateView state_like(const py::object& tensor, Use use, const Shape& shape, int64_t channels) {
        Shape own;
        const StateView view = state(tensor, use, own);
        if (own.samples != shape.samples || own.channels != channels || own.pixels != shape.pixels) {
            fail("expected states of one shape, and halves and params of it");
        }
        return view;
    }
    StateView state_like(const py::object& tensor, Use use, const Shape& shape) {
        return state_like(tensor, use, shape, shape.channels);
    }
    // The same, or absent if the tensor is None.
    StateView optional(const py::object& tensor, Use use, const Shape& shape, int64_t channels) {
        return tensor.is_none() ? StateView() : state_like(tensor, use, shape, channels);
    }

    SampleValues samples(const py::object& tensor, Use use, int64_t count) {
        return sample_values(keep(tensor, use), count);
    }

    // The last two axes of weights (..., C, C), or with one axis the last of biases (..., C).
    Matrix matrix(const py::object& tensor, int64_t channels, size_t count = 2) {
        if (tensor.is_none()) return {};
        if (!py::object(tensor.attr("dtype")).is(dtype_)) fail("expected weights of the state's dtype");
        const Tensor& t = keep(tensor, Use::read);
        if (t.axes() < count) fail("expected (..., C, C) and (..., C)");
        const size_t first = t.axes() - count;
        for (size_t i = first; i < t.axes(); ++i) {
            if (t.length(i) != channels) fail("expected weights of the state's channels");
        }
        return {t.data(), t.stride(first), count == 2 ? t.stride(first + 1) : 0};
    }

    // The address of a contiguous tensor of this shape, which is read from a copy in another layout; null if
    // the tensor is None.
    void* dense(const py::object& tensor, Use use, std::initializer_list<int64_t> shape) {
        if (tensor.is_none()) return nullptr;
        Tensor& t = keep(tensor, use);
        if (use == Use::read && !is_dense(t, shape)) t.make_contiguous();
        if (!is_dense(t, shape)) fail("expected contiguous tensors of the documented shapes");
        return t.data();
    }

    // The same state, beginning with a later channel.
    StateView from_channel(StateView view, int64_t channel) const {
        view.data = static_cast<char*>(view.data) + channel * view.channel * (is_double ? 8 : 4);
        return view;
    }

private:
    Tensor& keep(const py::object& tensor, Use use) { return tensors_.emplace_back(tensor, dtype_, use); }

    static bool is_dense(const Tensor& t, std::initializer_list<int64_t> shape) {
        if (t.axes() != shape.size()) return false;
        int64_t step = 1;
        for (size_t axis = t.axes(); axis-- > 0;) {
            const int64_t length = shape.begin()[axis];
            if (t.length(axis) != length || (length > 1 && t.stride(axis) != step)) return false;
            step *= length;
        }
        return true;
    }

    // False if the pixels have no common stride.
    static bool find_strides(const Tensor& t, Shape& shape, StateView& view) {
        int64_t pixels = 1, step = 1;
        bool one_stride = true;
        for (size_t axis = t.axes(); axis-- > 2;) {
            const int64_t length = t.length(axis);
            if (length == 1) continue;
            if (pixels == 1) step = t.stride(axis);
            one_stride = one_stride && t.stride(axis) == step * pixels;
            pixels *= length;
        }
        shape = {t.length(0), t.length(1), pixels};
        // The strides of an empty tensor do not matter, and a contiguous copy would keep them.
        if (!one_stride && shape.size() > 0) return false;
        view = {t.data(), t.stride(0), t.stride(1), step};
        return true;
    }

    py::object dtype_;
    std::vector<Tensor> tensors_;
};

}  // namespace mflow
