// The masked penalty on the CPU. A dense tile is used in place; any other tile is copied into small
// dense buffers. One vectorized loop thus serves every layout.

#include "masked_penalty.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "../common/loops.h"
#include "strided_tiles.h"

namespace mflow {
namespace {

template <class A>
struct Buffers {
    A input[kTile + kSlack], target[kTile + kSlack], mask[kTile + kSlack], weight[kTile + kSlack];
    A error[kTile];
};

// e, m and w of one tile, as dense arrays.
template <class A>
struct Terms {
    const A *error, *mask, *weight;
};

template <class T, class A>
MFLOW_INLINE Terms<A> read_terms(const Problem& p, int64_t sample, uint32_t begin, int count,
                                 Buffers<A>& buffers) {
    Terms<A> terms;
    terms.error = read<T, A>(p, p.input, sample, begin, count, buffers.input);
    if (p.target.data) {
        const A* input = terms.error;
        const A* target = read<T, A>(p, p.target, sample, begin, count, buffers.target);
#pragma omp simd
        for (int i = 0; i < count; ++i) buffers.error[i] = input[i] - target[i];
        terms.error = buffers.error;
    }
    // The buffers of absent operands were filled with ones by `run_range`.
    terms.mask = buffers.mask;
    if (p.mask.data) {
        terms.mask = p.mask_is_bool
                        ? read<uint8_t, A>(p, p.mask, sample, begin, count, buffers.mask)
                        : read<A, A>(p, p.mask, sample, begin, count, buffers.mask);
    }
    terms.weight = buffers.weight;
    if (p.weight.data) {
        terms.weight = read<A, A>(p, p.weight, sample, begin, count, buffers.weight);
    }
    return terms;
}

template <class R, bool SELECT, class A>
MFLOW_INLINE void sum_tile(const Terms<A>& terms, int count, A scale, A delta, A* penalty,
                           A* gaussian) {
    A sum = 0, log_density = 0;
#pragma omp simd reduction(+ : sum, log_density)
    for (int i = 0; i < count; ++i) {
        const A e = terms.error[i], m = terms.mask[i];
        sum += penalty_of<R, SELECT>(e, m, scale * terms.weight[i], delta);
        log_density += gaussian_of<SELECT>(e, m);
    }
    *penalty = sum;
    *gaussian = log_density;
}

template <class R, bool SELECT, class A>
MFLOW_INLINE void slope_tile(const Terms<A>& terms, int count, A scale, A delta, A grad_penalty,
                             A grad_gaussian, A* out) {
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        out[i] = gradient_of<R, SELECT>(terms.error[i], terms.mask[i], scale * terms.weight[i],
                                        delta, grad_penalty, grad_gaussian);
    }
}

template <class T, class A>
MFLOW_INLINE void run_tile(const Problem& p, const Tile& tile, int64_t index, bool backward,
                           Buffers<A>& buffers) {
    const int64_t sample = tile.sample;
    const uint32_t begin = static_cast<uint32_t>(tile.inner);
    const int count = tile.width;
    const Terms<A> terms = read_terms<T, A>(p, sample, begin, count, buffers);
    const A scale = static_cast<A>(p.scale), delta = static_cast<A>(p.delta);
    // Only the loops of arithmetic are compiled for each penalty function and kind of mask.
    const auto with_formula = [&](const auto& use) __attribute__((always_inline)) {
        Rhos::visit(p.rho, [&](auto rho) __attribute__((always_inline)) {
            p.selects() ? use(rho, std::true_type{}) : use(rho, std::false_type{});
        });
    };
    if (backward) {
        const A g = p.grad_penalty.at<A>(sample), h = p.grad_gaussian.at<A>(sample);
        A* out = buffers.error;  // each element is read before it is written
        with_formula([&](auto rho, auto select) __attribute__((always_inline)) {
            slope_tile<decltype(rho), select.value, A>(terms, count, scale, delta, g, h, out);
        });
        if (p.dinput.data) write<T, A>(p, p.dinput, sample, begin, count, out, A(1));
        if (p.dtarget.data) write<T, A>(p, p.dtarget, sample, begin, count, out, A(-1));
    } else {
        A* penalty = static_cast<A*>(p.tiles > 1 ? p.partial : p.penalty) + index;
        A* gaussian = p.tiles > 1 ? penalty + p.samples * p.tiles
                                  : static_cast<A*>(p.gaussian) + index;
        with_formula([&](auto rho, auto select) __attribute__((always_inline)) {
            sum_tile<decltype(rho), select.value, A>(terms, count, scale, delta, penalty, gaussian);
        });
    }
}

// Function clones cannot be templates.
using RunTiles = void (*)(const Problem&, int64_t, int64_t, bool, void*);
#define MFLOW_RUN_TILES(name, T)                                                         \
    MFLOW_CLONES void name(const Problem& p, int64_t first, int64_t last, bool backward, \
                           void* scratch) {                                              \
        using A = Accumulator<T>::type;                                                  \
        Buffers<A>& buffers = *static_cast<Buffers<A>*>(scratch);                        \
        const Tiling tiling(p.samples, 1, p.size, 1, kTile);                             \
        for (int64_t i = first; i < last; ++i) {                                         \
            run_tile<T>(p, tiling.tile(i), i, backward, buffers);                        \
        }                                                                                \
    }
MFLOW_RUN_TILES(run_float32, float)
MFLOW_RUN_TILES(run_float64, double)
MFLOW_RUN_TILES(run_bfloat16, BFloat16)
#undef MFLOW_RUN_TILES

template <class A>
void run_range(const Problem& p, RunTiles run, bool backward, int64_t first, int64_t last) {
    std::vector<Buffers<A>> buffers(1);  // on the heap: 20 to 40 KB may be too much for the stack
    std::fill_n(buffers[0].mask, kTile, A(1));
    std::fill_n(buffers[0].weight, kTile, A(1));
    run(p, first, last, backward, buffers.data());
}

template <class A>
void run_all(const Problem& p, RunTiles run, bool backward, int threads) {
    share_out(p.samples * p.tiles, p.samples * static_cast<int64_t>(p.size), threads,
              [&](int64_t first, int64_t last) { run_range<A>(p, run, backward, first, last); });
}

template <class A>
void sum_partials(const Problem& p) {
    if (p.tiles == 1) return;
    const A* partial = static_cast<const A*>(p.partial);
    for (void* out : {p.penalty, p.gaussian}) {
        for (int64_t n = 0; n < p.samples; ++n) {
            double sum = 0;
            for (int64_t t = 0; t < p.tiles; ++t) sum += *partial++;
            static_cast<A*>(out)[n] = static_cast<A>(sum);
        }
    }
}

void run(const Problem& p, bool backward, int threads) {
    check_rho(p.rho);
    switch (p.dtype) {
        case Dtype::float32: return run_all<float>(p, run_float32, backward, threads);
        case Dtype::float64: return run_all<double>(p, run_float64, backward, threads);
        case Dtype::bfloat16: return run_all<float>(p, run_bfloat16, backward, threads);
        case Dtype::float16:
            throw std::invalid_argument("masked_penalty: expected float16 as float32 on a CPU");
    }
}

}  // namespace

void forward_cpu(const Problem& p, int threads) {
    run(p, false, threads);
    p.dtype == Dtype::float64 ? sum_partials<double>(p) : sum_partials<float>(p);
}

void backward_cpu(const Problem& p, int threads) { run(p, true, threads); }

}  // namespace mflow
