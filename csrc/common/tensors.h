// Torch tensors as the loops read and write them. They are read through their Python methods, so the
// extension does not depend on torch. Calling these methods from C++ is faster than from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

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

// A state (N, C, *spatial) with one stride for all its pixels. Other layouts are read from a copy.
class State {
public:
    State(py::object tensor, const py::object& dtype, Use use)
        : tensor_(std::move(tensor), dtype, use) {
        if (tensor_.axes() < 2) fail("expected (N, C, *spatial)");
        if (find_strides()) return;
        if (use == Use::write) fail("expected results with one stride for all pixels");
        tensor_.make_contiguous();
        if (!find_strides()) fail("expected a contiguous copy");
    }

    const Shape& shape() const { return shape_; }
    const StateView& view() const { return view_; }

private:
    // False if the pixels have no common stride.
    bool find_strides() {
        int64_t pixels = 1, step = 1;
        bool one_stride = true;
        for (size_t axis = tensor_.axes(); axis-- > 2;) {
            const int64_t length = tensor_.length(axis);
            if (length == 1) continue;
            if (pixels == 1) step = tensor_.stride(axis);
            one_stride = one_stride && tensor_.stride(axis) == step * pixels;
            pixels *= length;
        }
        shape_ = {tensor_.length(0), tensor_.length(1), pixels};
        // The strides of an empty tensor do not matter, and a contiguous copy would keep them.
        if (!one_stride && shape_.size() > 0) return false;
        view_ = {tensor_.data(), tensor_.stride(0), tensor_.stride(1), step};
        return true;
    }

    Tensor tensor_;
    Shape shape_;
    StateView view_;
};

// One value for each sample: a log-determinant or its gradient, (N,) or (N, 1).
class SampleValues {
public:
    SampleValues(py::object tensor, const py::object& dtype, Use use, int64_t samples)
        : tensor_(std::move(tensor), dtype, use) {
        const bool column = tensor_.axes() == 2 && tensor_.length(1) == 1;
        if (!(tensor_.axes() == 1 || column) || tensor_.length(0) != samples) {
            fail("expected one value a sample");
        }
    }
    void* data() const { return tensor_.data(); }
    int64_t stride() const { return tensor_.stride(0); }

private:
    Tensor tensor_;
};

inline bool computes_in_double(const py::object& dtype) {
    const int size = py::cast<int>(dtype.attr("itemsize"));
    if (size != 4 && size != 8) fail("expected states of float32 or float64");
    return size == 8;
}

// The same state, beginning with a later channel.
inline StateView from_channel(StateView view, int64_t channel, bool is_double) {
    view.data = static_cast<char*>(view.data) + channel * view.channel * (is_double ? 8 : 4);
    return view;
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
