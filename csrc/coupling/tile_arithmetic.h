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

// y = s (x + t) if ADD_FIRST, otherwise y = s x + t. An inverse coupling has `sign` -1, which negates
// log s and t.
template <bool ADD_FIRST, class A>
MFLOW_INLINE void scale_values(int count, A sign, const A* x, const A* log_s, const A* shift, A* y) {
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        const A s = exp_of(sign * log_s[i]), t = sign * shift[i];
        y[i] = ADD_FIRST ? s * (x[i] + t) : s * x[i] + t;
    }
}

// The gradients dx, draw and dshift from dy and dlogdet. If X_GIVEN, `given` is x and `other` becomes y;
// otherwise `given` is y and `other` becomes x. u is the value that the scale multiplies.
template <bool ADD_FIRST, bool X_GIVEN, class A>
MFLOW_INLINE void unscale_values(int count, A sign, const A* given, const A* log_s, const A* slope,
                                 const A* shift, const A* dy, const A* dlogdet, A* other, A* dx, A* draw,
                                 A* dshift) {
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        const A s = exp_of(sign * log_s[i]), t = sign * shift[i];
        A u;
        if (X_GIVEN) {
            u = ADD_FIRST ? given[i] + t : given[i];
            other[i] = ADD_FIRST ? s * u : s * u + t;
        } else {
            u = ADD_FIRST ? given[i] / s : (given[i] - t) / s;
            other[i] = ADD_FIRST ? u - t : u;
        }
        const A g = s * dy[i];
        dx[i] = g;
        dshift[i] = sign * (ADD_FIRST ? g : dy[i]);
        draw[i] = sign * slope[i] * (g * u + dlogdet[i]);
    }
}

// `scale_values` and `unscale_values`, in the order in which this coupling scales and shifts.
template <class A>
MFLOW_INLINE void scale_half(const Coupling& p, int count, const A* x, const A* log_s, const A* shift,
                             A* y) {
    const A sign = p.inverse ? A(-1) : A(1);
    if (p.scale.shift_first != p.inverse) {
        scale_values<true, A>(count, sign, x, log_s, shift, y);
    } else {
        scale_values<false, A>(count, sign, x, log_s, shift, y);
    }
}
template <bool X_GIVEN, class A>
MFLOW_INLINE void unscale_half(const Coupling& p, int count, const A* given, const A* log_s,
                               const A* slope, const A* shift, const A* dy, const A* dlogdet, A* other,
                               A* dx, A* draw, A* dshift) {
    const A sign = p.inverse ? A(-1) : A(1);
    if (p.scale.shift_first != p.inverse) {
        unscale_values<true, X_GIVEN, A>(count, sign, given, log_s, slope, shift, dy, dlogdet, other, dx,
                                      draw, dshift);
    } else {
        unscale_values<false, X_GIVEN, A>(count, sign, given, log_s, slope, shift, dy, dlogdet, other, dx,
                                       draw, dshift);
    }
}

}  // namespace mflow
