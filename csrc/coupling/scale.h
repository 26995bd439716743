// The scale functions on the CPU: log s and its slope d log s / d raw, elementwise. float64 uses libm;
// float32 uses the functions of common/functions.h and, for atan, the polynomial of Cephes (atanf).
#pragma once

#include <cmath>
#include <stdexcept>

#include "coupling.h"
#include "../common/functions.h"
#include "../common/table.h"

namespace mflow {

MFLOW_INLINE float atan_of(float x) {
    const float a = x < 0.0f ? -x : x;
    // The bounds are tan(3 pi / 8) and tan(pi / 8).
    const bool large = a > 2.414213562373095f, middle = a > 0.4142135623730950f;
    const float above = large ? -1.0f : middle ? a - 1.0f : a;
    const float below = large ? a : middle ? a + 1.0f : 1.0f;
    const float base = large ? 1.5707963267948966f : middle ? 0.7853981633974483f : 0.0f;
    const float t = above / below, q = t * t;
    float p = 8.05374449538e-2f;
    p = p * q - 1.38776856032e-1f;
    p = p * q + 1.99777106478e-1f;
    p = p * q - 3.33329491539e-1f;
    const float y = base + (p * q * t + t);
    return x < 0.0f ? -y : y;
}
MFLOW_INLINE double atan_of(double x) { return std::atan(x); }

// tanh of x >= 0, and its derivative. 1 - tanh^2 would round small derivatives to 0.
template <class A>
struct Tanh {
    A value, slope;
};
MFLOW_INLINE Tanh<float> tanh_of(float x) {
    const ExpParts e = exp_parts(-2.0f * x);
    const float two = e.two * e.two2;
    const float exp = (1.0f + e.less) * e.two * e.two2;
    const float expm1 = two * e.less + (two - 1.0f);
    const float over = 1.0f / (2.0f + expm1);  // one division for both
    return {-expm1 * over, 4.0f * exp * over * over};
}
MFLOW_INLINE Tanh<double> tanh_of(double x) {
    const double e = std::exp(-2 * x);
    return {std::tanh(x), 4 * e / ((1 + e) * (1 + e))};
}

// A scale function's constants in the type of the computation.
template <class A>
struct Constants {
    A offset, eps, clamp;
};

constexpr double kAtan = 0.636;  // FrEIA's rounding of 2 / pi

// The scale functions. Each gives log s and its slope d log s / d raw. A new one is a struct here and
// its name in `ScaleFunctions`.
struct Sigmoid {
    static constexpr const char* name = "sigmoid";
    template <class A>
    static MFLOW_INLINE void log_scale(A raw, const Constants<A>& k, A* log_s, A* slope) {
        const A r = raw + k.offset;
        const A e = exp_of(r < A(0) ? r : -r);
        *log_s = (r > A(0) ? A(0) : r) - log1p_of(e);
        *slope = (r < A(0) ? A(1) : e) / (A(1) + e);
    }
};

struct FlooredSigmoid {
    static constexpr const char* name = "sigmoid, eps > 0";
    template <class A>
    static MFLOW_INLINE void log_scale(A raw, const Constants<A>& k, A* log_s, A* slope) {
        const A r = raw + k.offset;
        const A e = exp_of(r < A(0) ? r : -r);
        const A s = (r < A(0) ? e : A(1)) / (A(1) + e) + k.eps;
        *log_s = log_of(s);
        *slope = e / ((A(1) + e) * (A(1) + e)) / s;
    }
};

struct DoubleSigmoid {
    static constexpr const char* name = "double-sigmoid";
    template <class A>
    static MFLOW_INLINE void log_scale(A raw, const Constants<A>&, A* log_s, A* slope) {
        const A e = exp_of(raw < A(0) ? raw : -raw);
        *log_s = (raw > A(0) ? A(0) : raw) - log1p_of(e) + A(0.6931471805599453);  // log 2
        *slope = (raw < A(0) ? A(1) : e) / (A(1) + e);
    }
};

struct Softplus {
    static constexpr const char* name = "softplus";
    template <class A>
    static MFLOW_INLINE void log_scale(A raw, const Constants<A>& k, A* log_s, A* slope) {
        const A e = exp_of(raw < A(0) ? raw : -raw);
        const A sigmoid = (raw < A(0) ? e : A(1)) / (A(1) + e);
        const A s = (raw > A(0) ? raw : A(0)) + log1p_of(e) + k.eps;
        const bool small = k.eps == A(0) && raw < A(-40);  // s = e^raw may underflow
        const A bounded = s > k.clamp ? k.clamp : s;
        *log_s = small ? raw : log_of(small ? A(1) : bounded);
        *slope = s > k.clamp ? A(0) : small ? A(1) : sigmoid / (small ? A(1) : s);
    }
};

struct Exp {
    static constexpr const char* name = "exp";
    template <class A>
    static MFLOW_INLINE void log_scale(A raw, const Constants<A>&, A* log_s, A* slope) {
        *log_s = raw;
        *slope = A(1);
    }
};

struct ClampedTanh {
    static constexpr const char* name = "tanh";
    template <class A>
    static MFLOW_INLINE void log_scale(A raw, const Constants<A>& k, A* log_s, A* slope) {
        const A r = raw / k.clamp;
        const Tanh<A> t = tanh_of(r < A(0) ? -r : r);
        *log_s = k.clamp * (r < A(0) ? -t.value : t.value);
        *slope = t.slope;
    }
};

struct ClampedAtan {
    static constexpr const char* name = "atan";
    template <class A>
    static MFLOW_INLINE void log_scale(A raw, const Constants<A>& k, A* log_s, A* slope) {
        const A r = raw / k.clamp;
        *log_s = k.clamp * A(kAtan) * atan_of(r);
        *slope = A(kAtan) / (A(1) + r * r);
    }
};

using ScaleFunctions = Table<Sigmoid, FlooredSigmoid, DoubleSigmoid, Softplus, Exp, ClampedTanh, ClampedAtan>;

}  // namespace mflow
