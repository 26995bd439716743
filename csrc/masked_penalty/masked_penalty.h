// The masked per-pixel penalty: its formulas, which host and device share, and the struct that describes
// a problem to the CPU loops and the CUDA kernels.
//
//   penalty[n]  = sum_i m w rho(e)                          e = input - target
//   gaussian[n] = sum_i (1 - m) (-e^2/2 - log(2 pi)/2)
//   de          = g_penalty[n] m w rho'(e) - g_gaussian[n] (1 - m) e
//
// This file uses pointers, sizes, strides and a stream; it does not depend on torch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/inline.h"
#include "../common/state_view.h"
#include "../common/table.h"
#include "../common/tiling.h"

namespace mflow {

enum class Dtype : int { float32, float64, float16, bfloat16 };

// The type in which values of type T are summed.
template <class T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};

// The penalty functions rho and their derivatives. A new one is a struct here and its name in `Rhos`.
struct L2 {
    static constexpr const char* name = "l2";
    template <class A>
    static MFLOW_INLINE A value(A e, A) { return A(0.5) * e * e; }
    template <class A>
    static MFLOW_INLINE A slope(A e, A) { return e; }
};

struct L1 {
    static constexpr const char* name = "l1";
    template <class A>
    static MFLOW_INLINE A value(A e, A) { return e < A(0) ? -e : e; }
    template <class A>
    static MFLOW_INLINE A slope(A e, A) { return A(e > A(0)) - A(e < A(0)); }
};

struct Huber {
    static constexpr const char* name = "huber";
    template <class A>
    static MFLOW_INLINE A value(A e, A delta) {
        const A a = e < A(0) ? -e : e;
        const A inside = a < delta ? a : delta;
        return inside * (a - A(0.5) * inside);
    }
    template <class A>
    static MFLOW_INLINE A slope(A e, A delta) {
        const A below = e > delta ? delta : e;
        return below < -delta ? -delta : below;
    }
};

using Rhos = Table<L2, L1, Huber>;

inline void check_rho(int rho) {
    if (!Rhos::has(rho)) throw std::invalid_argument("masked_penalty: unknown rho");
}

template <class A>
MFLOW_INLINE A normal_log_density(A e) {
    return A(-0.5) * e * e - A(0.91893853320467274178);  // log(2 pi) / 2
}

// The terms of one element, with w = scale * weight. If SELECT, m is 0 or 1 and selects one of the two
// sums, so that NaN and infinity stay out of the other one; otherwise m multiplies.
template <class R, bool SELECT, class A>
MFLOW_INLINE A penalty_of(A e, A m, A w, A delta) {
    if (SELECT) return w * R::value(m != A(0) ? e : A(0), delta);
    return m * w * R::value(e, delta);
}
template <bool SELECT, class A>
MFLOW_INLINE A gaussian_of(A e, A m) {
    if (SELECT) return m != A(0) ? A(0) : normal_log_density(e);
    return (A(1) - m) * normal_log_density(e);
}

// d loss / d e, where g and h are the gradients of the sample's two sums. If SELECT, a sum whose
// gradient is 0 adds exactly 0, even for NaN and infinity.
template <class R, bool SELECT, class A>
MFLOW_INLINE A gradient_of(A e, A m, A w, A delta, A g, A h) {
    if (SELECT) {
        const bool use_g = g != A(0), use_h = h != A(0);
        const A penalized = ((m != A(0)) & use_g) ? e : A(0);
        const A rest = ((m == A(0)) & use_h) ? e : A(0);
        return g * w * R::slope(penalized, delta) - h * rest;
    }
    return g * m * w * R::slope(e, delta) - h * (A(1) - m) * e;
}

// A sample is summed in tiles of kTile elements, and the tiles' sums are added in order. This order
// depends on the shape alone, not on the number of threads or the size of the GPU.

constexpr int kMaxAxes = 4;  // inner axes after merging

// How one tensor is laid out over the samples and the merged inner axes, innermost first. Strides
// count elements; a broadcast axis has stride 0.
struct View {
    void* data = nullptr;  // null: absent
    int64_t sample_stride = 0;
    int64_t stride[kMaxAxes] = {};
    bool dense = false;    // element k of a sample lies at offset k
    bool aligned = false;  // each row can be read as whole vectors of 16 bytes of input
};

struct Problem {
    Dtype dtype = Dtype::float32;  // of input, target and their gradients
    int rho = -1;                  // its index in Rhos
    double delta = 1;
    double scale = 1;  // multiplies weight, or is the weight itself if that is absent
    bool mask_is_bool = false;
    MFLOW_INLINE bool selects() const { return mask_is_bool || !mask.data; }

    int64_t samples = 0;
    int64_t tiles = 0;  // of one sample
    uint32_t size = 0;  // elements of one sample
    int axes = 1;
    uint32_t extent[kMaxAxes] = {1, 1, 1, 1};
    bool indexed = false;  // some view is not dense

    View input, target, mask, weight;  // mask (unless bool) and weight have the accumulator's type

    // Forward. `partial` holds 2 * samples * tiles values and is needed only if tiles > 1.
    void* penalty = nullptr;
    void* gaussian = nullptr;
    void* partial = nullptr;

    // Backward.
    SampleValues grad_penalty, grad_gaussian;
    View dinput, dtarget;  // absent if not needed
};

void forward_cpu(const Problem& problem, int threads);
void backward_cpu(const Problem& problem, int threads);

// Both launch on `stream` of the current device and return at once. They throw std::runtime_error if
// the launch fails.
void forward_cuda(const Problem& problem, void* stream);
void backward_cuda(const Problem& problem, void* stream);
// The reason why the current device cannot run the kernels; empty if it can. For example, the driver may
// be older than this build's CUDA, or the build may lack the device's architecture.
std::string cuda_problem();
int cuda_runtime_version();

}  // namespace mflow
