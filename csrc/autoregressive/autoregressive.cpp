// The inverse of masked autoregressive maps on the CPU. A block of samples fills the lanes of vectors: each
// unit is a row of lanes. The loop over degrees is outermost, so each weight is used once for a block.

#include "autoregressive.h"

#include <limits>
#include <memory>

#include "../coupling/tile_arithmetic.h"
#include "../spline/spline_arithmetic.h"
#include "activations.h"

namespace mflow {
namespace {

constexpr int kBlock = 64;  // samples of a block

// A vector of 64 bytes: one register of AVX-512, two of AVX2.
template <class A>
struct Vector {
    typedef A type __attribute__((vector_size(64), aligned(sizeof(A)), may_alias));
    static constexpr int lanes = 64 / sizeof(A);
};

// ROWS rows and VECTORS vectors of `product`, summed in registers.
template <int ROWS, int VECTORS, class A>
MFLOW_INLINE void product_tile(int64_t depth, const A* weight, int64_t stride, const A* bias, const A* in, A* out) {
    using V = typename Vector<A>::type;
    constexpr int lanes = Vector<A>::lanes;
    V sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = V{} + bias[r];
    }
    for (int64_t k = 0; k < depth; ++k, in += kBlock) {
        for (int v = 0; v < VECTORS; ++v) {
            const V right = *reinterpret_cast<const V*>(in + v * lanes);
            for (int r = 0; r < ROWS; ++r) sums[r][v] += weight[r * stride + k] * right;
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<V*>(out + r * kBlock + v * lanes) = sums[r][v];
    }
}

// out[r][lane] = bias[r] + sum over k < depth of weight[r * stride + k] in[k][lane].
template <class A>
MFLOW_INLINE void product(int64_t rows, int64_t depth, const A* weight, int64_t stride, const A* bias, const A* in,
                          A* out) {
    constexpr int lanes = Vector<A>::lanes;
    const auto tiles = [&](auto count, auto vectors) __attribute__((always_inline)) {
        for (int i = 0; i < kBlock; i += lanes * vectors.value) {
            product_tile<count.value, vectors.value, A>(depth, weight, stride, bias, in + i, out + i);
        }
        rows -= count.value;
        weight += count.value * stride;
        bias += count.value;
        out += count.value * kBlock;
    };
    while (rows >= 4) tiles(std::integral_constant<int, 4>{}, std::integral_constant<int, 2>{});
    while (rows >= 2) tiles(std::integral_constant<int, 2>{}, std::integral_constant<int, 4>{});
    if (rows) tiles(std::integral_constant<int, 1>{}, std::integral_constant<int, 4>{});
}

template <class A>
struct MaskedInverseBuffers {
    std::vector<A> rows;           // those of all values
    std::vector<A*> values;        // where each value begins
    CouplingBuffers<A> coupling;
    SplineBuffers<A> spline;
    A z[kBlock], logdet[kBlock];

    explicit MaskedInverseBuffers(const MaskedInverse& p) {
        int64_t count = p.features;
        for (const MaskedOperation& o : p.operations) count += o.units;
        rows.resize(count * kBlock);
        values.push_back(rows.data());
        int64_t units = p.features;
        for (const MaskedOperation& o : p.operations) {
            values.push_back(values.back() + units * kBlock);
            units = o.units;
        }
    }
};

// The rows of one degree of an operation's result, for the samples from `first` on.
template <class A>
MFLOW_INLINE void compute(const MaskedInverse& p, const MaskedOperation& o, int64_t degree, int64_t first, int count,
                          A* const* values, A* result) {
    using Kind = MaskedOperation::Kind;
    const A* const numbers = static_cast<const A*>(p.numbers);
    const int64_t begin = o.starts[degree], end = o.starts[degree + 1];
    const A* const source = values[o.source];
    if (begin == end) return;
    // unit(r, in, out) for each row, with the source's row.
    const auto each = [&](const auto& unit) __attribute__((always_inline)) {
        for (int64_t r = begin; r < end; ++r) unit(r, source + o.rows[r] * kBlock, result + r * kBlock);
    };
    switch (o.kind) {
        case Kind::linear:
            product<A>(end - begin, o.known[degree], numbers + o.weight + begin * o.inputs, o.inputs,
                       numbers + o.bias + begin, source, result + begin * kBlock);
            break;
        case Kind::activation: {
            const A constant = numbers[o.constant];
            Activations::visit(o.activation, [&](auto function) __attribute__((always_inline)) {
                each([&](int64_t, const A* in, A* out) __attribute__((always_inline)) {
#pragma omp simd
                    for (int i = 0; i < kBlock; ++i) out[i] = function.of(in[i], constant);
                });
            });
            break;
        }
        case Kind::add:
            each([&](int64_t r, const A* in, A* out) __attribute__((always_inline)) {
                const A* const other = values[o.other] + o.other_rows[r] * kBlock;
#pragma omp simd
                for (int i = 0; i < kBlock; ++i) out[i] = in[i] + other[i];
            });
            break;
        case Kind::affine:
            each([&](int64_t r, const A* in, A* out) __attribute__((always_inline)) {
                const A weight = numbers[o.weight + r], bias = numbers[o.bias + r];
#pragma omp simd
                for (int i = 0; i < kBlock; ++i) out[i] = weight * in[i] + bias;
            });
            break;
        case Kind::add_context:
        case Kind::gate: {
            const StateView& c = p.contexts[o.other];
            each([&](int64_t r, const A* in, A* out) __attribute__((always_inline)) {
                const A* const given =
                    static_cast<const A*>(c.data) + first * c.sample + o.other_rows[r] * c.channel;
                for (int i = 0; i < count; ++i) out[i] = given[i * c.sample];
                for (int i = count; i < kBlock; ++i) out[i] = A(0);
                if (o.kind == Kind::gate) {
#pragma omp simd
                    for (int i = 0; i < kBlock; ++i) out[i] = in[i] * sigmoid_of(out[i]);
                } else {
#pragma omp simd
                    for (int i = 0; i < kBlock; ++i) out[i] += in[i];
                }
            });
            break;
        }
        case Kind::pick:
            each([&](int64_t, const A* in, A* out) __attribute__((always_inline)) { std::copy_n(in, kBlock, out); });
            break;
    }
}

// Solves one variable of all lanes from its params, and adds to the logdet.
template <class A>
MFLOW_INLINE void solve(const MaskedInverse& p, A* params, const A* z, A* x, MaskedInverseBuffers<A>& b) {
    if (!p.is_spline) {
        A* const log_s = b.coupling.log_s;
        log_scales<false, A>(p.coupling.scale, kBlock, params, log_s, b.coupling.slope);
        scale_half<A>(p.coupling, kBlock, z, log_s, params + kBlock, x);
        for (int i = 0; i < kBlock; ++i) b.logdet[i] -= log_s[i];
        return;
    }
    // The lanes are the pixels of one channel.
    Spline s;
    s.options = p.spline.options;
    s.inverse = true;
    s.params = {params, 0, kBlock, 1};
    const HalfGrid grid({1, 1, kBlock}, {x, 0, kBlock, 1}, kLanes);
    const SplineConstants<A> k(s.options);
    locate<A>(s, grid, grid.tiling.tile(0), k, z, b.spline);
    const bool bounded = s.options.tails == SplineOptions::Tails::none;
    const A outside = bounded ? std::numeric_limits<A>::quiet_NaN() : A(0);
    transform<true, A>(kBlock, z, k, outside, b.spline, x);
    for (int i = 0; i < kBlock; ++i) b.logdet[i] += b.spline.log_slope[i];
}

template <class A>
MFLOW_INLINE void run_block(const MaskedInverse& p, int64_t first, MaskedInverseBuffers<A>& b) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, p.samples - first));
    const A* const z = static_cast<const A*>(p.z.data) + first * p.z.sample;
    A* const x = static_cast<A*>(p.x.data) + first * p.x.sample;
    std::fill_n(b.logdet, kBlock, A(0));
    std::fill_n(b.z, kBlock, A(0));
    for (int64_t degree = 0; degree < p.degrees; ++degree) {
        for (size_t i = 0; i < p.operations.size(); ++i) {
            compute<A>(p, p.operations[i], degree, first, count, b.values.data(), b.values[i + 1]);
        }
        for (int64_t v = p.starts[degree]; v < p.starts[degree + 1]; ++v) {
            const int64_t channel = p.order[v];
            A* const row = b.values[0] + v * kBlock;
            for (int i = 0; i < count; ++i) b.z[i] = z[i * p.z.sample + channel * p.z.channel];
            solve<A>(p, b.values.back() + v * p.params() * kBlock, b.z, row, b);
            for (int i = 0; i < count; ++i) x[i * p.x.sample + channel * p.x.channel] = row[i];
        }
    }
    for (int i = 0; i < count; ++i) p.logdet.at<A>(first + i) = b.logdet[i];
}

// Function clones cannot be templates.
#define MFLOW_RUN_BLOCKS(A)                                                                                  \
    MFLOW_CLONES void run_blocks(const MaskedInverse& p, int64_t first, int64_t last,                       \
                                 MaskedInverseBuffers<A>& b) {                                              \
        for (int64_t i = first; i < last; ++i) run_block<A>(p, i * kBlock, b);                              \
    }
MFLOW_RUN_BLOCKS(float)
MFLOW_RUN_BLOCKS(double)

template <class A>
void run_all(const MaskedInverse& p, int threads) {
    int64_t work = 0;  // of a sample; a multiplication costs about an eighth of an element of a coupling
    for (const MaskedOperation& o : p.operations) work += o.units * (1 + o.inputs / 8);
    if (p.is_spline) work += p.features * p.spline.options.bins * 8;
    share_out((p.samples + kBlock - 1) / kBlock, p.samples * work, threads, [&](int64_t first, int64_t last) {
        const std::unique_ptr<MaskedInverseBuffers<A>> buffers(new MaskedInverseBuffers<A>(p));
        run_blocks(p, first, last, *buffers);
    });
}

}  // namespace

void run(const MaskedInverse& p, int threads) {
    if (p.samples == 0) return;
    p.is_double ? run_all<double>(p, threads) : run_all<float>(p, threads);
}

}  // namespace mflow
