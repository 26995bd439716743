// The masked per-pixel penalty: its mathematics, written once for host and device, and the
// description of one problem that the CPU loops and the CUDA kernels share.
//
//   penalty[n]  = sum_i m w rho(e)                          e = input - target
//   gaussian[n] = sum_i (1 - m) (-e^2/2 - log(2 pi)/2)
//   de          = g_penalty[n] m w rho'(e) - g_gaussian[n] (1 - m) e
//
// Nothing here knows of torch: pointers, sizes, strides and a stream.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MFLOW_INLINE __host__ __device__ __forceinline__
#else
#define MFLOW_INLINE inline __attribute__((always_inline))
#endif

namespace mflow {

enum class Rho : int { l2, l1, huber };
enum class Dtype : int { float32, float64, float16, bfloat16 };

template <Rho R, class A>
MFLOW_INLINE A rho_value(A e, A delta) {
    const A a = e < A(0) ? -e : e;
    if (R == Rho::l2) return A(0.5) * e * e;
    if (R == Rho::l1) return a;
    const A inside = a < delta ? a : delta;
    return inside * (a - A(0.5) * inside);
}

template <Rho R, class A>
MFLOW_INLINE A rho_slope(A e, A delta) {
    if (R == Rho::l2) return e;
    if (R == Rho::l1) return A(e > A(0)) - A(e < A(0));
    const A below = e > delta ? delta : e;
    return below < -delta ? -delta : below;
}

template <class A>
MFLOW_INLINE A normal_log_density(A e) {
    return A(-0.5) * e * e - A(0.91893853320467274178);  // log(2 pi) / 2
}

// A sample is summed in tiles of this many elements, and the tiles' sums are added in order: the
// order depends on the shape alone, never on the number of threads or the size of the GPU.
constexpr int kTile = 1024;
constexpr int kMaxAxes = 4;

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
    Rho rho = Rho::huber;
    double delta = 1;
    double scale = 1;  // multiplies weight, or stands alone where weight is absent
    bool mask_is_bool = false;

    int64_t samples = 0;
    int64_t tiles = 0;  // of one sample
    uint32_t size = 0;  // elements of one sample
    int axes = 1;
    uint32_t extent[kMaxAxes] = {1, 1, 1, 1};
    bool indexed = false;  // some view is not dense

    View input, target, mask, weight;  // mask (unless bool) and weight are of the accumulate type

    // Forward. `partial` holds 2 * samples * tiles values and is needed where tiles > 1.
    void* penalty = nullptr;
    void* gaussian = nullptr;
    void* partial = nullptr;

    // Backward.
    View grad_penalty, grad_gaussian;  // one value a sample
    View dinput, dtarget;              // absent where not asked for
};

void forward_cpu(const Problem& problem, int threads);
void backward_cpu(const Problem& problem, int threads);

// Both launch on `stream` of the current device and return at once; std::runtime_error if that
// fails.
void forward_cuda(const Problem& problem, void* stream);
void backward_cuda(const Problem& problem, void* stream);
int cuda_runtime_version();

}  // namespace mflow
