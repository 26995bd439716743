// Where the elements of a state lie in memory.
#pragma once

#include <cstdint>

namespace mflow {

// Where elements (sample, channel, pixel) lie. Strides count elements. Null: absent.
struct Walk {
    void* data = nullptr;
    int64_t sample = 0, channel = 0, pixel = 0;
};

struct Shape {
    int64_t samples = 0, channels = 0, pixels = 0;
    int64_t size() const { return samples * channels * pixels; }
};

}  // namespace mflow
