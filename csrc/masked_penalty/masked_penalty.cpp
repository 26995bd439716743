// The masked penalty on the CPU. A dense tile is used in place; any other tile is copied into small
// dense buffers. One vectorized loop thus serves every layout.

#include "masked_penalty.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../common/loops.h"

namespace mflow {
namespace {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class A>
MFLOW_INLINE A widen(float v) { return v; }
template <class A>
MFLOW_INLINE A widen(double v) { return static_cast<A>(v); }
template <class A>
MFLOW_INLINE A widen(uint8_t v) { return static_cast<A>(static_cast<int>(v)); }
template <class A>
MFLOW_INLINE A widen(BFloat16 v) {
    return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}
// All cases of a conversion are computed and one is selected, so that loops vectorize.
template <class A>
MFLOW_INLINE A widen(Half v) {
    const int32_t half = static_cast<int16_t>(v.bits);
    const uint32_t exponent = half & 0x7c00;
    // Move sign and mantissa to their places in a float. The exponent's bias is 15 in a half and 127 in
    // a float. The largest exponent, that of infinity and NaN, is 31 in a half and 255 in a float.
    const uint32_t placed = static_cast<uint32_t>(half) << 13 & 0x8fffe000u;
    const uint32_t raise = exponent == 0x7c00u ? 255u - 31u : 127u - 15u;
    // A subnormal half counts units of 2^-24, the last place of a float from 0.5 to 1.
    const float units = bit_cast<float>((half & 0x3ff) | 0x3f000000) - 0.5f;
    const uint32_t subnormal = bit_cast<uint32_t>(units) | (placed & 0x80000000u);
    return bit_cast<float>(exponent == 0 ? subnormal : placed + (raise << 23));
}

template <class T>
struct Narrow {
    template <class A>
    static MFLOW_INLINE T from(A v) { return static_cast<T>(v); }
};
template <>
struct Narrow<BFloat16> {
    static MFLOW_INLINE BFloat16 from(float v) {
        const uint32_t bits = bit_cast<uint32_t>(v);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
    }
};
// Rounds to nearest even.
template <>
struct Narrow<Half> {
    static MFLOW_INLINE Half from(float v) {
        const uint32_t bits = bit_cast<uint32_t>(v);
        const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
        // Magnitudes from 2^16 on become infinity in a half. Drop 13 bits of the mantissa, and lower
        // the exponent's bias from 127 to 15.
        const int32_t finite = std::min(magnitude, 0x47800000);
        const int32_t odd = finite >> 13 & 1;
        const int32_t normal = (finite + (0xfff - ((127 - 15) << 23)) + odd) >> 13;
        // Below 2^-14 a half counts units of 2^-24, the last place of a float from 0.5 to 1.
        const int32_t subnormal = bit_cast<int32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
        const int32_t half = magnitude < 0x38800000 ? subnormal : normal;
        const int32_t nan = magnitude > 0x7f800000 ? 0x7e00 : 0;
        return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | half | nan)};
    }
};

// Walks the elements of a sample in a view, from `begin` on, row by row along the innermost axis.
class Rows {
public:
    MFLOW_INLINE Rows(const Problem& p, const View& view, uint32_t begin) : p_(p), view_(view) {
        for (int a = 0; a < p.axes; ++a) {
            at_[a] = begin % p.extent[a];
            begin /= p.extent[a];
            offset_ += at_[a] * view.stride[a];
        }
    }
    MFLOW_INLINE int64_t offset() const { return offset_; }
    MFLOW_INLINE int left() const { return static_cast<int>(p_.extent[0] - at_[0]); }
    // Number of whole rows that follow at intervals of stride[1]; 0 within a row.
    MFLOW_INLINE int whole() const {
        return p_.axes > 1 && at_[0] == 0 ? static_cast<int>(p_.extent[1] - at_[1]) : 0;
    }
    // Advances along `axis` by `count`, which must not go past the end of the axis.
    MFLOW_INLINE void advance(int axis, int count) {
        at_[axis] += count;
        offset_ += count * view_.stride[axis];
        for (int a = axis; a + 1 < p_.axes && at_[a] == p_.extent[a]; ++a) {
            offset_ += view_.stride[a + 1] - at_[a] * view_.stride[a];
            at_[a] = 0;
            ++at_[a + 1];
        }
    }

private:
    const Problem& p_;
    const View& view_;
    uint32_t at_[kMaxAxes] = {};
    int64_t offset_ = 0;
};

constexpr int kShortRow = 64;  // rows up to this length are read column by column, many rows at a time
constexpr int kSlack = 8;      // number of values that may be written past the end of a tile's buffer

// Copies the next `count` values of `rows`, in any layout, to `buffer`.
template <class S, class A>
void gather(const Problem& p, const View& view, const S* base, Rows rows, int count, A* buffer) {
    const int64_t stride = view.stride[0], across = view.stride[1];
    const int width = static_cast<int>(p.extent[0]);
    for (int done = 0; done < count;) {
        const S* row = base + rows.offset();
        A* out = buffer + done;
        if (const int many = std::min(rows.whole(), (count - done) / width);
            width <= kShortRow && many > 0) {
            if (stride == 0) {  // write whole vectors; the next row overwrites the excess
                for (int r = 0; r < many; ++r) {
                    const A value = widen<A>(row[r * across]);
                    for (int c = 0; c < width; c += kSlack) {
                        for (int i = 0; i < kSlack; ++i) out[r * width + c + i] = value;
                    }
                }
            } else {
                for (int c = 0; c < width; ++c) {
                    for (int r = 0; r < many; ++r) {
                        out[r * width + c] = widen<A>(row[c * stride + r * across]);
                    }
                }
            }
            rows.advance(1, many);
            done += many * width;
            continue;
        }
        const int length = std::min(count - done, rows.left());
        if (stride == 0) {
            std::fill_n(out, length, widen<A>(*row));
        } else if (stride == 1) {
            for (int i = 0; i < length; ++i) out[i] = widen<A>(row[i]);
        } else {
            for (int i = 0; i < length; ++i) out[i] = widen<A>(row[i * stride]);
        }
        rows.advance(0, length);
        done += length;
    }
}

// Writes sign * values to `count` elements of a sample from `begin` on, in any layout.
template <class T, class A>
void scatter(const Problem& p, const View& view, T* base, uint32_t begin, int count,
             const A* values, A sign) {
    Rows rows(p, view, begin);
    for (int done = 0; done < count;) {
        const int length = std::min(count - done, rows.left());
        T* row = base + rows.offset();
        for (int i = 0; i < length; ++i) {
            row[i * view.stride[0]] = Narrow<T>::from(sign * values[done + i]);
        }
        rows.advance(0, length);
        done += length;
    }
}

// `count` values of a sample from `begin` on, in the accumulator's type. Returns their own address if
// they are contiguous and have that type; otherwise copies them to `buffer`.
template <class S, class A>
MFLOW_INLINE const A* read(const Problem& p, const View& view, int64_t sample, uint32_t begin,
                           int count, A* buffer) {
    const S* base = static_cast<const S*>(view.data) + sample * view.sample_stride;
    if (view.dense) {
        base += begin;
    } else {
        const Rows rows(p, view, begin);
        if (view.stride[0] != 1 || rows.left() < count) {
            gather<S, A>(p, view, base, rows, count, buffer);
            return buffer;
        }
        base += rows.offset();
    }
    if (std::is_same<S, A>::value) return reinterpret_cast<const A*>(base);
#pragma omp simd
    for (int i = 0; i < count; ++i) buffer[i] = widen<A>(base[i]);
    return buffer;
}

// Writes sign * values through the view.
template <class T, class A>
MFLOW_INLINE void write(const Problem& p, const View& view, int64_t sample, uint32_t begin,
                        int count, const A* values, A sign) {
    T* base = static_cast<T*>(view.data) + sample * view.sample_stride;
    if (!view.dense) return scatter<T, A>(p, view, base, begin, count, values, sign);
    base += begin;
#pragma omp simd
    for (int i = 0; i < count; ++i) base[i] = Narrow<T>::from(sign * values[i]);
}

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

template <class R, bool SELECT, class T, class A>
MFLOW_INLINE void run_tile(const Problem& p, const Tile& tile, int64_t index, bool backward,
                           Buffers<A>& buffers) {
    const int64_t sample = tile.sample;
    const uint32_t begin = static_cast<uint32_t>(tile.inner);
    const int count = tile.width;
    const Terms<A> terms = read_terms<T, A>(p, sample, begin, count, buffers);
    const A scale = static_cast<A>(p.scale), delta = static_cast<A>(p.delta);
    if (backward) {
        const auto grad = [&](const View& view) {
            return static_cast<const A*>(view.data)[sample * view.sample_stride];
        };
        A* out = buffers.error;  // each element is read before it is written
        slope_tile<R, SELECT, A>(terms, count, scale, delta, grad(p.grad_penalty),
                                 grad(p.grad_gaussian), out);
        if (p.dinput.data) write<T, A>(p, p.dinput, sample, begin, count, out, A(1));
        if (p.dtarget.data) write<T, A>(p, p.dtarget, sample, begin, count, out, A(-1));
    } else {
        A* penalty = static_cast<A*>(p.tiles > 1 ? p.partial : p.penalty) + index;
        A* gaussian = p.tiles > 1 ? penalty + p.samples * p.tiles
                                  : static_cast<A*>(p.gaussian) + index;
        sum_tile<R, SELECT, A>(terms, count, scale, delta, penalty, gaussian);
    }
}

// Function clones cannot be templates.
using RunTiles = void (*)(const Problem&, int64_t, int64_t, bool, void*);
#define MFLOW_RUN_TILES(name, T)                                                           \
    MFLOW_CLONES void name(const Problem& p, int64_t first, int64_t last, bool backward,   \
                           void* scratch) {                                                \
        using A = Accumulator<T>::type;                                                           \
        Buffers<A>& buffers = *static_cast<Buffers<A>*>(scratch);                          \
        const Tiling tiling(p.samples, 1, p.size, 1, kTile);                               \
        for (int64_t i = first; i < last; ++i) {                                           \
            const Tile tile = tiling.tile(i);                                              \
            Rhos::visit(p.rho, [&](auto rho) __attribute__((always_inline)) {              \
                if (p.selects()) {                                                         \
                    run_tile<decltype(rho), true, T>(p, tile, i, backward, buffers);       \
                } else {                                                                   \
                    run_tile<decltype(rho), false, T>(p, tile, i, backward, buffers);      \
                }                                                                          \
            });                                                                            \
        }                                                                                  \
    }
MFLOW_RUN_TILES(run_float32, float)
MFLOW_RUN_TILES(run_float64, double)
MFLOW_RUN_TILES(run_float16, Half)
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
        case Dtype::float16: return run_all<float>(p, run_float16, backward, threads);
        case Dtype::bfloat16: return run_all<float>(p, run_bfloat16, backward, threads);
    }
}

}  // namespace

void forward_cpu(const Problem& p, int threads) {
    run(p, false, threads);
    p.dtype == Dtype::float64 ? sum_partials<double>(p) : sum_partials<float>(p);
}

void backward_cpu(const Problem& p, int threads) { run(p, true, threads); }

}  // namespace mflow
