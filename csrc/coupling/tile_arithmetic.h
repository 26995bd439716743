// Adds tiles, and computes couplings on a tile in dense buffers.
#pragma once

#include <algorithm>
#include <cstring>

#include "coupling.h"
#include "scale.h"

namespace mflow {

// to = a + b. `to` must not overlap a or b, since blocks overlap each other.
template <class A>
MFLOW_INLINE void add(int rows, int width, Part<A> a, Part<A> b, Part<A> to) {
    const bool blocks = a.step == 1 && b.step == 1 && to.step == 1 && width >= 4;
    for (int r = 0; r < rows; ++r, a.data += a.row, b.data += b.row, to.data += to.row) {
        if (!blocks) {
            for (int i = 0; i < width; ++i) {
                to.data[i * to.step] = a.data[i * a.step] + b.data[i * b.step];
            }
            continue;
        }
        in_blocks(width, [&](auto length, int64_t i) {
            A sums[length.value];
            for (int j = 0; j < length.value; ++j) sums[j] = a.data[i + j] + b.data[i + j];
            std::memcpy(to.data + i, sums, sizeof(sums));
        });
    }
}

template <class A>
struct CouplingBuffers {
    A x[kTile], raw[kTile], shift[kTile], log_s[kTile], slope[kTile], dlogdet[kTile];
    A y[kTile], dx[kTile], dy[kTile], draw[kTile], dshift[kTile];
};

// log s of `count` values and, if SLOPE, its slope d log s / d raw.
template <bool SLOPE, class A>
MFLOW_INLINE void log_scales(const Scale& s, int count, const A* raw, A* log_s, A* slope) {
    const Constants<A> k = {A(s.offset), A(s.eps), A(s.clamp)};
    const bool known = ScaleFunctions::visit(s.function, [&](auto function) __attribute__((always_inline)) {
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            A value, derivative;
            function.log_scale(raw[i], k, &value, &derivative);
            log_s[i] = value;
            if (SLOPE) slope[i] = derivative;
        }
    });
    if (!known) throw std::invalid_argument("unknown scale function");
}

// A coupling is y = s (x + before) + after, where one of both is the shift. An inverse coupling has `sign` -1,
// which negates log s and the shift.
template <class A>
struct Order {
    bool shift_first;
    A sign;
    explicit Order(const Coupling& p)
        : shift_first(p.scale.shift_first != p.inverse), sign(p.inverse ? A(-1) : A(1)) {}
    MFLOW_INLINE A before(A shift) const { return shift_first ? sign * shift : A(0); }
    MFLOW_INLINE A after(A shift) const { return shift_first ? A(0) : sign * shift; }
};

template <class A>
MFLOW_INLINE void scale_values(const Coupling& p, int count, const A* x, const A* log_s, const A* shift, A* y) {
    const Order<A> order(p);
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        y[i] = exp_of(order.sign * log_s[i]) * (x[i] + order.before(shift[i])) + order.after(shift[i]);
    }
}

// The gradients dx, draw and dshift from dy and dlogdet. If X_GIVEN, `given` is x and `other` becomes y;
// otherwise `given` is y and `other` becomes x. u is the value that the scale multiplies.
template <bool X_GIVEN, class A>
MFLOW_INLINE void unscale_values(const Coupling& p, int count, const A* given, const A* log_s, const A* slope,
                                 const A* shift, const A* dy, const A* dlogdet, A* other, A* dx, A* draw,
                                 A* dshift) {
    const Order<A> order(p);
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        const A s = exp_of(order.sign * log_s[i]);
        const A before = order.before(shift[i]), after = order.after(shift[i]);
        const A u = X_GIVEN ? given[i] + before : (given[i] - after) / s;
        other[i] = X_GIVEN ? s * u + after : u - before;
        const A g = s * dy[i];
        dx[i] = g;
        dshift[i] = order.sign * (order.shift_first ? g : dy[i]);
        draw[i] = order.sign * slope[i] * (g * u + dlogdet[i]);
    }
}

}  // namespace mflow
