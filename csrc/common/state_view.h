// How the CPU loops find the elements of a state in memory.
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

}  // namespace mflow
