// How the CPU loops find the elements of tensors in memory.
#pragma once

#include <cstdint>

namespace mflow {

// The address of a state and its strides, in elements. A null address means that the state is absent.
struct StateView {
    void* data = nullptr;
    int64_t sample = 0, channel = 0, pixel = 0;
};

struct Shape {
    int64_t samples = 0, channels = 0, pixels = 0;
    int64_t size() const { return samples * channels * pixels; }
};

// One value for each sample.
struct SampleValues {
    void* data = nullptr;
    int64_t stride = 0;
    template <class A>
    A& at(int64_t sample) const {
        return static_cast<A*>(data)[sample * stride];
    }
};

// Element (row, column) of a matrix, or (row, 0) of a vector. Null: absent; an absent bias is zero.
struct Matrix {
    const void* data = nullptr;
    int64_t row = 0, column = 0;
    Matrix transposed() const { return {data, column, row}; }
};

}  // namespace mflow
