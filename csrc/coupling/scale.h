// The scale functions on the CPU: log s and its slope d log s / d raw, elementwise. float64 uses libm;
// float32 uses the functions of common/functions.h and, for atan, the polynomial of Cephes (atanf).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "coupling.h"
#include "../common/functions.h"
#include "../common/table.h"

namespace mflow {

// log(1 + x) / x for 0 <= x <= 1.
template <class A>
MFLOW_INLINE A log1p_ratio_of(A x) {
    const A tiny = std::numeric_limits<A>::min();
    return x < tiny ? A(1) : log1p_of(x) / x;
}

// e^x, and e^x - 1 without cancellation near 0.
template <class A>
struct ExpAndMinus1 {
    A exp, minus1;
};
MFLOW_INLINE ExpAndMinus1<float> exp_and_minus1(float x) {
    const ExpParts e = exp_parts(x);
    const float two = e.two * e.two2;
    return {(1.0f + e.less) * e.two * e.two2, two * e.less + (two - 1.0f)};
}
MFLOW_INLINE ExpAndMinus1<double> exp_and_minus1(double x) { return {std::exp(x), std::expm1(x)}; }

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
    const ExpAndMinus1<float> e = exp_and_minus1(-2.0f * x);
    const float over = 1.0f / (2.0f + e.minus1);  // one division for both
    return {-e.minus1 * over, 4.0f * e.exp * over * over};
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
        const ExpAndMinus1<A> e = exp_and_minus1(raw < A(0) ? raw : -raw);
        *log_s = (raw > A(0) ? A(0) : raw) - log1p_of(e.minus1 / A(2));
        *slope = (raw < A(0) ? A(1) : e.exp) / (A(1) + e.exp);
    }
};

struct Softplus {
    static constexpr const char* name = "softplus";
    template <class A>
    static MFLOW_INLINE void log_scale(A raw, const Constants<A>& k, A* log_s, A* slope) {
        const A e = exp_of(raw < A(0) ? raw : -raw);
        // softplus(raw) = e^raw * rest below 0, where e^raw may underflow.
        const bool factored = raw < A(0) && k.eps == A(0);
        const A softplus = (raw < A(0) ? A(0) : raw) + log1p_of(e);
        const A rest = factored ? log1p_ratio_of(e) : softplus + k.eps;
        const A value = (factored ? raw : A(0)) + log_of(rest);
        *log_s = value > k.clamp ? k.clamp : value;
        *slope = value > k.clamp ? A(0) : (raw < A(0) && !factored ? e : A(1)) / ((A(1) + e) * rest);
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

struct Softsign {
    static constexpr const char* name = "softsign";
    template <class A>
    static MFLOW_INLINE void log_scale(A raw, const Constants<A>& k, A* log_s, A* slope) {
        const A over = A(1) / (A(1) + (raw < A(0) ? -raw : raw) / k.clamp);
        *log_s = raw * over;
        *slope = over * over;
    }
};

using ScaleFunctions =
    Table<Sigmoid, FlooredSigmoid, DoubleSigmoid, Softplus, Exp, ClampedTanh, ClampedAtan, Softsign>;

}  // namespace mflow
