// The masked penalty on the GPU. One warp takes one tile of one sample, so small and large samples both
// fill the machine, without shared memory or barriers. If a sample has several tiles, a second small
// kernel adds their sums in order.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "masked_penalty.h"

namespace mflow {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;   // per block
constexpr int kBlocks = 4;  // per multiprocessor, at least; leaves 64 registers a thread, so none spill
constexpr unsigned kAllLanes = 0xffffffffu;

// The machine word that moves `bytes` bytes: the widest one, but at most 16 bytes.
template <int bytes>
struct Word {
    using type = uint4;
};
template <>
struct Word<8> {
    using type = uint2;
};
template <>
struct Word<4> {
    using type = unsigned;
};
template <>
struct Word<2> {
    using type = unsigned short;
};
template <>
struct Word<1> {
    using type = unsigned char;
};

template <class S, int V>
union Pack {
    using Machine = typename Word<(sizeof(S) * V > 16 ? 16 : int(sizeof(S)) * V)>::type;
    static constexpr int words = sizeof(S) * V / sizeof(Machine);
    Machine word[words];
    S value[V];
    __device__ __forceinline__ Pack() {}
};

// The elements of one lane: [at, at + count) of one sample. They share a row if some view is not dense.
struct Run {
    int64_t sample;
    uint32_t at;
    int count;
    uint32_t coordinate[kMaxAxes];  // of element `at`; set only if some view is not dense
};

__device__ __forceinline__ void locate(const Problem& p, Run& run) {
    uint32_t rest = run.at;
#pragma unroll
    for (int a = 0; a < kMaxAxes; ++a) {
        run.coordinate[a] = 0;
        if (a + 1 < p.axes) {
            run.coordinate[a] = rest % p.extent[a];
            rest /= p.extent[a];
        } else if (a + 1 == p.axes) {
            run.coordinate[a] = rest;
        }
    }
}

template <bool indexed>
__device__ __forceinline__ int64_t offset_of(const View& view, const Run& run) {
    int64_t offset = run.sample * view.sample_stride;
    if (!indexed || view.dense) {
        offset += run.at;
    } else {
#pragma unroll
        for (int a = 0; a < kMaxAxes; ++a) offset += run.coordinate[a] * view.stride[a];
    }
    return offset;
}

template <class S, bool indexed, int V, class A>
__device__ __forceinline__ void load(const View& view, const Run& run, A (&out)[V]) {
    const S* from = static_cast<const S*>(view.data) + offset_of<indexed>(view, run);
    if (view.aligned && run.count == V) {
        using P = Pack<S, V>;
        P pack;
#pragma unroll
        for (int i = 0; i < P::words; ++i) {
            pack.word[i] = __ldg(reinterpret_cast<const typename P::Machine*>(from) + i);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) out[j] = static_cast<A>(pack.value[j]);
    } else {
        const int64_t stride = indexed ? view.stride[0] : 1;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            out[j] = j < run.count ? static_cast<A>(__ldg(from + j * stride)) : A(0);
        }
    }
}

template <class T, bool indexed, int V, class A>
__device__ __forceinline__ void store(const View& view, const Run& run, const A (&values)[V],
                                      A sign) {
    T* to = static_cast<T*>(view.data) + offset_of<indexed>(view, run);
    if (view.aligned && run.count == V) {
        using P = Pack<T, V>;
        P pack;
#pragma unroll
        for (int j = 0; j < V; ++j) pack.value[j] = static_cast<T>(sign * values[j]);
#pragma unroll
        for (int i = 0; i < P::words; ++i) {
            reinterpret_cast<typename P::Machine*>(to)[i] = pack.word[i];
        }
    } else {
        const int64_t stride = indexed ? view.stride[0] : 1;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (j < run.count) to[j * stride] = static_cast<T>(sign * values[j]);
        }
    }
}

// e, m and w of one run.
template <class A, int V>
struct Terms {
    A error[V], mask[V], weight[V];
};

template <class T, bool indexed, int V, class A>
__device__ __forceinline__ void read(const Problem& p, Run& run, Terms<A, V>& terms) {
    if (indexed) locate(p, run);
    load<T, indexed>(p.input, run, terms.error);
    if (p.target.data) {
        A target[V];
        load<T, indexed>(p.target, run, target);
#pragma unroll
        for (int j = 0; j < V; ++j) terms.error[j] -= target[j];
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
        terms.mask[j] = A(1);
        terms.weight[j] = A(1);
    }
    if (p.mask.data) {
        if (p.mask_is_bool) {
            load<unsigned char, indexed>(p.mask, run, terms.mask);
        } else {
            load<A, indexed>(p.mask, run, terms.mask);
        }
    }
    if (p.weight.data) load<A, indexed>(p.weight, run, terms.weight);
}

template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) value += __shfl_down_sync(kAllLanes, value, lane);
    return value;
}

__device__ __forceinline__ uint32_t lane() { return threadIdx.x % kLanes; }

__device__ __forceinline__ uint32_t warp_index() {
    return blockIdx.x * kWarps + threadIdx.x / kLanes;
}

// Calls body(run, terms) for each run of this lane in a tile.
template <class T, int V, bool indexed, class A, class Body>
__device__ __forceinline__ void for_each_run(const Problem& p, int64_t sample, uint32_t tile,
                                             const Body& body) {
    const uint32_t begin = tile * kTile, end = min(begin + kTile, p.size);
    Run run;
    run.sample = sample;
    for (uint32_t at = begin + lane() * V; at < end; at += kLanes * V) {
        run.at = at;
        run.count = min(static_cast<uint32_t>(V), end - at);
        Terms<A, V> terms;
        read<T, indexed>(p, run, terms);
        body(run, terms);
    }
}

template <class T, int V, bool indexed>
__global__ void __launch_bounds__(kLanes * kWarps, kBlocks)
    forward_kernel(const __grid_constant__ Problem p) {
    using A = typename Accumulator<T>::type;
    const uint32_t index = warp_index(), tiles = static_cast<uint32_t>(p.tiles);
    if (index >= static_cast<uint32_t>(p.samples) * tiles) return;
    const A scale = static_cast<A>(p.scale), delta = static_cast<A>(p.delta);
    A penalty = 0, gaussian = 0;
    const auto add = [&](const Run& run, const Terms<A, V>& terms) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (j < run.count) {
                const A e = terms.error[j], m = terms.mask[j], w = scale * terms.weight[j];
                Rhos::visit(p.rho, [&](auto rho) {
                    using R = decltype(rho);
                    penalty += p.selects() ? penalty_of<R, true>(e, m, w, delta)
                                           : penalty_of<R, false>(e, m, w, delta);
                });
                gaussian += p.selects() ? gaussian_of<true>(e, m) : gaussian_of<false>(e, m);
            }
        }
    };
    for_each_run<T, V, indexed, A>(p, index / tiles, index % tiles, add);
    penalty = warp_sum(penalty);
    gaussian = warp_sum(gaussian);
    if (lane() == 0) {
        const bool whole = tiles == 1;
        A* to = static_cast<A*>(whole ? p.penalty : p.partial) + index;
        *to = penalty;
        *(whole ? static_cast<A*>(p.gaussian) + index : to + p.samples * p.tiles) = gaussian;
    }
}

// Adds the tiles' sums. Each warp computes one output of one sample.
template <class A>
__global__ void __launch_bounds__(kLanes * kWarps) sum_kernel(const A* __restrict__ partial,
                                                              A* __restrict__ penalty,
                                                              A* __restrict__ gaussian,
                                                              uint32_t samples,
                                                              uint32_t tiles) {
    const uint32_t index = warp_index();
    if (index >= 2 * samples) return;
    partial += static_cast<int64_t>(index) * tiles;
    A sum = 0;
    for (uint32_t t = lane(); t < tiles; t += kLanes) sum += partial[t];
    sum = warp_sum(sum);
    if (lane() == 0) *(index < samples ? penalty + index : gaussian + (index - samples)) = sum;
}

template <class T, int V, bool indexed>
__global__ void __launch_bounds__(kLanes * kWarps, kBlocks)
    backward_kernel(const __grid_constant__ Problem p) {
    using A = typename Accumulator<T>::type;
    const uint32_t index = warp_index(), tiles = static_cast<uint32_t>(p.tiles);
    if (index >= static_cast<uint32_t>(p.samples) * tiles) return;
    const A scale = static_cast<A>(p.scale), delta = static_cast<A>(p.delta);
    const int64_t sample = index / tiles;
    const A g = __ldg(static_cast<const A*>(p.grad_penalty.data) + sample * p.grad_penalty.stride);
    const A h = __ldg(static_cast<const A*>(p.grad_gaussian.data) + sample * p.grad_gaussian.stride);
    const auto differentiate = [&](const Run& run, const Terms<A, V>& terms) {
        A grad[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const A e = terms.error[j], m = terms.mask[j], w = scale * terms.weight[j];
            Rhos::visit(p.rho, [&](auto rho) {
                using R = decltype(rho);
                grad[j] = p.selects() ? gradient_of<R, true>(e, m, w, delta, g, h)
                                      : gradient_of<R, false>(e, m, w, delta, g, h);
            });
        }
        if (p.dinput.data) store<T, indexed>(p.dinput, run, grad, A(1));
        if (p.dtarget.data) store<T, indexed>(p.dtarget, run, grad, A(-1));
    };
    for_each_run<T, V, indexed, A>(p, sample, index % tiles, differentiate);
}

void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string("masked_penalty: ") + what + ": " +
                             cudaGetErrorString(status));
}

unsigned blocks_for(int64_t warps) {
    if (warps > 0x7fffffff) throw std::runtime_error("masked_penalty: more than 2^31 tiles");
    return static_cast<unsigned>((warps + kWarps - 1) / kWarps);
}

using Kernel = void (*)(Problem);

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements in 16 bytes

// Launches `dense` if the views have no gaps. Otherwise launches `rows`, which moves 16 bytes at a time
// within a row, or `elements`, which moves one element, if the rows are not a whole number of vectors.
template <class T>
void launch(const Problem& p, cudaStream_t stream, Kernel dense, Kernel rows, Kernel elements) {
    const Kernel kernel = !p.indexed ? dense : p.extent[0] % kVector<T> == 0 ? rows : elements;
    kernel<<<blocks_for(p.samples * p.tiles), kLanes * kWarps, 0, stream>>>(p);
}

template <class T>
void forward(const Problem& p, cudaStream_t stream) {
    using A = typename Accumulator<T>::type;
    launch<T>(p, stream, forward_kernel<T, kVector<T>, false>, forward_kernel<T, kVector<T>, true>,
              forward_kernel<T, 1, true>);
    if (p.tiles > 1) {
        sum_kernel<A><<<blocks_for(2 * p.samples), kLanes * kWarps, 0, stream>>>(
            static_cast<const A*>(p.partial), static_cast<A*>(p.penalty),
            static_cast<A*>(p.gaussian), static_cast<uint32_t>(p.samples),
            static_cast<uint32_t>(p.tiles));
    }
    check(cudaGetLastError(), "forward launch");
}

template <class T>
void backward(const Problem& p, cudaStream_t stream) {
    launch<T>(p, stream, backward_kernel<T, kVector<T>, false>, backward_kernel<T, kVector<T>, true>,
              backward_kernel<T, 1, true>);
    check(cudaGetLastError(), "backward launch");
}

// Calls use(T(0)) for the input's type T.
template <class Use>
void with_type(const Problem& p, const Use& use) {
    check_rho(p.rho);
    switch (p.dtype) {
        case Dtype::float32: return use(float(0));
        case Dtype::float64: return use(double(0));
        case Dtype::float16: return use(__half(0));
        case Dtype::bfloat16: return use(__nv_bfloat16(0));
    }
}

}  // namespace

void forward_cuda(const Problem& p, void* stream) {
    with_type(p, [&](auto zero) { forward<decltype(zero)>(p, static_cast<cudaStream_t>(stream)); });
}

void backward_cuda(const Problem& p, void* stream) {
    with_type(p, [&](auto zero) { backward<decltype(zero)>(p, static_cast<cudaStream_t>(stream)); });
}

std::string cuda_problem() {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, forward_kernel<float, 4, false>);
    if (status == cudaSuccess) return "";
    cudaGetLastError();  // clears the error, so that no later launch reports it
    return cudaGetErrorString(status);
}

int cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace mflow
