// Masked autoregressive maps on the CPU. A block of samples fills the lanes of vectors: each unit is a row of
// lanes. The loop over degrees is outermost, so each weight is used once for a block, also by the inverse.
// Backward runs through the same units in the opposite order.

#include "autoregressive.h"

#include <limits>
#include <memory>

#include "../coupling/tile_arithmetic.h"
#include "../spline/spline_arithmetic.h"
#include "activations.h"
#include "products.h"

namespace mflow {
namespace {

template <class A>
struct MaskedMapBuffers {
    std::vector<A> rows, gradient_rows;  // those of all values, and their gradients
    std::vector<A*> values, gradients;   // where those of each value begin
    std::vector<A> dresult, by_lane;
    CouplingBuffers<A> coupling;
    SplineBuffers<A> spline;
    A lanes[kBlock], logdet[kBlock], dlogdet[kBlock], dgiven[kBlock];
    HalfGrid grid;  // the lanes, as the pixels of one channel

    explicit MaskedMapBuffers(const MaskedMap& p) : grid({1, 1, kBlock}, {nullptr, 0, kBlock, 1}, kLanes) {
        int64_t count = p.features;
        for (const MaskedOperation& o : p.operations) count += o.units;
        rows.resize(count * kBlock);
        begin(p, rows, values);
        if (!p.dnumbers) return;
        gradient_rows.resize(count * kBlock);
        begin(p, gradient_rows, gradients);
        dresult.resize(p.features * kBlock);
    }

private:
    static void begin(const MaskedMap& p, std::vector<A>& rows, std::vector<A*>& values) {
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
MFLOW_INLINE void compute(const MaskedMap& p, const MaskedOperation& o, int64_t degree, int64_t first, int count,
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
                for (int i = count; i < kBlock; ++i) out[i] = out[count - 1];
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

// The spline of one variable, whose numbers begin at `params`: the lanes are the pixels of one channel.
template <class A>
MFLOW_INLINE Spline spline_of(const MaskedMap& p, A* params, A* dparams) {
    Spline s;
    s.options = p.spline.options;
    s.inverse = p.inverse;
    s.params = {params, 0, kBlock, 1};
    s.dparams = {dparams, 0, kBlock, 1};
    return s;
}

// Maps one variable of all lanes by its params, and adds to the logdet.
template <class A>
MFLOW_INLINE void map_variable(const MaskedMap& p, A* params, const A* given, A* result, MaskedMapBuffers<A>& b) {
    if (!p.is_spline) {
        A* const log_s = b.coupling.log_s;
        const A sign = p.inverse ? A(-1) : A(1);
        log_scales<false, A>(p.coupling.scale, kBlock, params, log_s, b.coupling.slope);
        scale_half<A>(p.coupling, kBlock, given, log_s, params + kBlock, result);
        for (int i = 0; i < kBlock; ++i) b.logdet[i] += sign * log_s[i];
        return;
    }
    const Spline s = spline_of<A>(p, params, nullptr);
    const SplineConstants<A> k(s.options);
    const bool bounded = s.options.tails == SplineOptions::Tails::none;
    const A outside = bounded ? std::numeric_limits<A>::quiet_NaN() : A(0);
    locate<A>(s, b.grid, b.grid.tiling.tile(0), k, given, b.spline);
    p.inverse ? transform<true, A>(kBlock, given, k, outside, b.spline, result)
              : transform<false, A>(kBlock, given, k, outside, b.spline, result);
    for (int i = 0; i < kBlock; ++i) b.logdet[i] += b.spline.log_slope[i];
}

// The gradients of one variable and of its params.
template <class A>
MFLOW_INLINE void map_variable_backward(const MaskedMap& p, A* params, const A* given, const A* dresult, A* dgiven,
                                        A* dparams, MaskedMapBuffers<A>& b) {
    if (!p.is_spline) {
        CouplingBuffers<A>& c = b.coupling;
        log_scales<true, A>(p.coupling.scale, kBlock, params, c.log_s, c.slope);
        unscale_half<true, A>(p.coupling, kBlock, given, c.log_s, c.slope, params + kBlock, dresult, b.dlogdet, c.y,
                              dgiven, dparams, dparams + kBlock);
        return;
    }
    const Spline s = spline_of<A>(p, params, dparams);
    const SplineConstants<A> k(s.options);
    const Tile t = b.grid.tiling.tile(0);
    SplineBuffers<A>& n = b.spline;
    locate<A>(s, b.grid, t, k, given, n);
    std::copy_n(b.dlogdet, kBlock, n.dlogdet);
    p.inverse ? differentiate<true, A>(kBlock, dresult, n, dgiven)
              : differentiate<false, A>(kBlock, dresult, n, dgiven);
    write_axis<A>(s, b.grid, t, k, 0, k.min_width, n.widths, n.dstart, n.dsize, n);
    write_axis<A>(s, b.grid, t, k, s.options.bins, k.min_height, n.heights, n.dstart_y, n.dsize_y, n);
    write_slopes<A>(s, b.grid, t, k, n);
}

// The channel of a state for the samples of a block, to lanes and back. Other lanes repeat the last sample, so
// that they are as finite as it is.
template <class A>
MFLOW_INLINE void read_lanes(const StateView& view, int64_t first, int count, int64_t channel, A* lanes) {
    const A* const from = static_cast<const A*>(view.data) + first * view.sample + channel * view.channel;
    for (int i = 0; i < count; ++i) lanes[i] = from[i * view.sample];
    for (int i = count; i < kBlock; ++i) lanes[i] = lanes[count - 1];
}
template <class A>
MFLOW_INLINE void write_lanes(const A* lanes, const StateView& view, int64_t first, int count, int64_t channel) {
    A* const to = static_cast<A*>(view.data) + first * view.sample + channel * view.channel;
    for (int i = 0; i < count; ++i) to[i * view.sample] = lanes[i];
}

// Adds the gradients of an operation's rows of one degree to those of the values that it reads, and to those of
// its own numbers. Those of a linear operation are pulled instead, and summed after all degrees.
template <class A>
MFLOW_INLINE void push(const MaskedMap& p, const MaskedOperation& o, int64_t degree, int64_t first, int count,
                       A* const* values, A* const* gradients, const A* own, A* dnumbers) {
    using Kind = MaskedOperation::Kind;
    const A* const numbers = static_cast<const A*>(p.numbers);
    if (o.kind == Kind::linear) return;
    for (int64_t r = o.starts[degree]; r < o.starts[degree + 1]; ++r) {
        const A* const in = values[o.source] + o.rows[r] * kBlock;
        const A* const g = own + r * kBlock;
        A* const to = gradients[o.source] + o.rows[r] * kBlock;
        switch (o.kind) {
            case Kind::activation: {
                const A constant = numbers[o.constant];
                Activations::visit(o.activation, [&](auto function) __attribute__((always_inline)) {
#pragma omp simd
                    for (int i = 0; i < kBlock; ++i) to[i] += g[i] * function.slope(in[i], constant);
                });
                break;
            }
            case Kind::add: {
                A* const other = gradients[o.other] + o.other_rows[r] * kBlock;
                for (int i = 0; i < kBlock; ++i) to[i] += g[i];
                for (int i = 0; i < kBlock; ++i) other[i] += g[i];
                break;
            }
            case Kind::affine: {
                const A weight = numbers[o.weight + r];
                A products = 0, total = 0;
                for (int i = 0; i < count; ++i) products += g[i] * in[i];
                for (int i = 0; i < count; ++i) total += g[i];
                for (int i = 0; i < kBlock; ++i) to[i] += weight * g[i];
                dnumbers[o.weight + r] += products;
                dnumbers[o.bias + r] += total;
                break;
            }
            case Kind::add_context:
            case Kind::gate: {
                const StateView &c = p.contexts[o.other], &dc = p.dcontexts[o.other];
                const A* const given = static_cast<const A*>(c.data) + first * c.sample + o.other_rows[r] * c.channel;
                A* const dgiven = static_cast<A*>(dc.data) + first * dc.sample + o.other_rows[r] * dc.channel;
                for (int i = 0; i < count; ++i) {
                    const A s = o.kind == Kind::gate ? sigmoid_of(given[i * c.sample]) : A(1);
                    dgiven[i * dc.sample] += o.kind == Kind::gate ? g[i] * in[i] * s * (A(1) - s) : g[i];
                    to[i] += g[i] * s;
                }
                break;
            }
            default:
                for (int i = 0; i < kBlock; ++i) to[i] += g[i];
        }
    }
}

// Linear readers of value `i`: adds what their rows of `degree` and above say about its rows from begin to end.
template <class A>
MFLOW_INLINE void pull_all(const MaskedMap& p, int64_t i, int64_t degree, int64_t begin, int64_t end,
                           MaskedMapBuffers<A>& b) {
    if (begin == end || degree == p.degrees) return;
    const A* const numbers = static_cast<const A*>(p.numbers);
    for (size_t j = i; j < p.operations.size(); ++j) {
        const MaskedOperation& o = p.operations[j];
        if (o.kind != MaskedOperation::Kind::linear || o.source != i) continue;
        pull<A>(o, degree, numbers + o.weight, b.gradients[j + 1], begin, end, b.gradients[i]);
    }
}

// The gradients of a linear operation's weights and biases.
template <class A>
MFLOW_INLINE void sum_products(const MaskedMap& p, const MaskedOperation& o, const A* in, const A* gradient, A* dnumbers,
                               std::vector<A>& by_lane) {
    constexpr int lanes = Vector<A>::lanes;
    const int64_t stride = (o.inputs + lanes - 1) / lanes * lanes;
    by_lane.resize(std::max<size_t>(by_lane.size(), stride * kBlock));
    transpose<false, A>(static_cast<int>(o.inputs), kBlock, const_cast<A*>(in), kBlock, by_lane.data(), stride);
    int64_t degree = 0;
    for (int64_t r = 0; r < o.units; r += 4) {
        const int64_t rows = std::min<int64_t>(4, o.units - r);
        while (o.starts[degree + 1] < r + rows) ++degree;  // that of the last of these rows
        const A* const g = gradient + r * kBlock;
        add_outer<A>(rows, o.known[degree], g, by_lane.data(), stride, dnumbers + o.weight + r * o.inputs, o.inputs);
        for (int64_t i = 0; i < rows; ++i) dnumbers[o.bias + r + i] += sum(kBlock, g + i * kBlock);
    }
}

// Function clones cannot be templates. The functions above are inlined into these.
#define MFLOW_CLONED(A)                                                                                          \
    MFLOW_CLONES void compute_degree(const MaskedMap& p, int64_t degree, int64_t first, int count,              \
                                     MaskedMapBuffers<A>& b) {                                                  \
        for (size_t i = 0; i < p.operations.size(); ++i) {                                                      \
            compute<A>(p, p.operations[i], degree, first, count, b.values.data(), b.values[i + 1]);             \
        }                                                                                                       \
    }                                                                                                           \
    MFLOW_CLONES void map_lanes(const MaskedMap& p, A* params, const A* given, A* result,                       \
                                MaskedMapBuffers<A>& b) {                                                       \
        map_variable<A>(p, params, given, result, b);                                                           \
    }                                                                                                           \
    MFLOW_CLONES void map_lanes_backward(const MaskedMap& p, A* params, const A* given, const A* dresult,       \
                                         A* dgiven, A* dparams, MaskedMapBuffers<A>& b) {                       \
        map_variable_backward<A>(p, params, given, dresult, dgiven, dparams, b);                                \
    }                                                                                                           \
    MFLOW_CLONES void pull_rows(const MaskedMap& p, int64_t value, int64_t degree, int64_t begin, int64_t end,  \
                                MaskedMapBuffers<A>& b) {                                                       \
        pull_all<A>(p, value, degree, begin, end, b);                                                           \
    }                                                                                                           \
    MFLOW_CLONES void push_rows(const MaskedMap& p, int64_t i, int64_t degree, int64_t first, int count,        \
                                A* dnumbers, MaskedMapBuffers<A>& b) {                                          \
        push<A>(p, p.operations[i], degree, first, count, b.values.data(), b.gradients.data(),                  \
                b.gradients[i + 1], dnumbers);                                                                  \
    }                                                                                                           \
    MFLOW_CLONES void sum_linear(const MaskedMap& p, int64_t i, A* dnumbers, MaskedMapBuffers<A>& b) {          \
        const MaskedOperation& o = p.operations[i];                                                             \
        sum_products<A>(p, o, b.values[o.source], b.gradients[i + 1], dnumbers, b.by_lane);                     \
    }
MFLOW_CLONED(float)
MFLOW_CLONED(double)

template <class A>
void run_block(const MaskedMap& p, int64_t first, MaskedMapBuffers<A>& b) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, p.samples - first));
    std::fill_n(b.logdet, kBlock, A(0));
    if (!p.inverse) {
        for (int64_t v = 0; v < p.features; ++v) {
            read_lanes<A>(p.given, first, count, p.order[v], b.values[0] + v * kBlock);
        }
    }
    for (int64_t degree = 0; degree < p.degrees; ++degree) {
        compute_degree(p, degree, first, count, b);
        for (int64_t v = p.starts[degree]; v < p.starts[degree + 1]; ++v) {
            A* const x = b.values[0] + v * kBlock;
            A* const params = b.values.back() + v * p.params() * kBlock;
            if (p.inverse) read_lanes<A>(p.given, first, count, p.order[v], b.lanes);
            map_lanes(p, params, p.inverse ? b.lanes : x, p.inverse ? x : b.lanes, b);
            write_lanes<A>(p.inverse ? x : b.lanes, p.result, first, count, p.order[v]);
        }
    }
    for (int i = 0; i < count; ++i) p.logdet.at<A>(first + i) = b.logdet[i];
}

template <class A>
void backward_block(const MaskedMap& p, int64_t first, A* dnumbers, MaskedMapBuffers<A>& b) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, p.samples - first));
    const int64_t operations = static_cast<int64_t>(p.operations.size());
    const StateView& x = p.inverse ? p.result : p.given;
    for (int64_t v = 0; v < p.features; ++v) {
        read_lanes<A>(x, first, count, p.order[v], b.values[0] + v * kBlock);
        A* const dresult = b.dresult.data() + v * kBlock;
        read_lanes<A>(p.dresult, first, count, p.order[v], dresult);
        std::fill(dresult + count, dresult + kBlock, A(0));
    }
    for (int i = 0; i < kBlock; ++i) b.dlogdet[i] = i < count ? p.dlogdet.at<A>(first + i) : A(0);
    for (int64_t degree = 0; degree < p.degrees; ++degree) compute_degree(p, degree, first, count, b);
    std::fill(b.gradient_rows.begin(), b.gradient_rows.end(), A(0));
    for (int64_t degree = p.degrees; degree-- > 0;) {
        const int64_t begin = p.starts[degree], end = p.starts[degree + 1];
        pull_rows(p, 0, degree + 1, begin, end, b);
        for (int64_t v = begin; v < end; ++v) {
            A* const params = b.values.back() + v * p.params() * kBlock;
            A* const dparams = b.gradients.back() + v * p.params() * kBlock;
            A* const dx = b.gradients[0] + v * kBlock;
            const A* const dresult = b.dresult.data() + v * kBlock;
            if (p.inverse) {
                read_lanes<A>(p.given, first, count, p.order[v], b.lanes);
                for (int i = 0; i < kBlock; ++i) dx[i] += dresult[i];
                map_lanes_backward(p, params, b.lanes, dx, b.dgiven, dparams, b);
            } else {
                const A* const own = b.values[0] + v * kBlock;
                map_lanes_backward(p, params, own, dresult, b.dgiven, dparams, b);
                for (int i = 0; i < kBlock; ++i) b.dgiven[i] += dx[i];
            }
            write_lanes<A>(b.dgiven, p.dgiven, first, count, p.order[v]);
        }
        for (int64_t i = operations; i-- > 0;) {
            const MaskedOperation& o = p.operations[i];
            pull_rows(p, i + 1, degree, o.starts[degree], o.starts[degree + 1], b);
            push_rows(p, i, degree, first, count, dnumbers, b);
        }
    }
    for (int64_t i = 0; i < operations; ++i) {
        if (p.operations[i].kind == MaskedOperation::Kind::linear) sum_linear(p, i, dnumbers, b);
    }
}

template <class A>
void run_all(const MaskedMap& p, int threads) {
    int64_t work = 0;  // of a sample; a multiplication costs about an eighth of an element of a coupling
    for (const MaskedOperation& o : p.operations) work += o.units * (1 + o.inputs / 8);
    if (p.is_spline) work += p.features * p.spline.options.bins * 8;
    work *= p.samples;
    const int64_t blocks = (p.samples + kBlock - 1) / kBlock;
    if (!p.dnumbers) {
        share_out(blocks, work, threads, [&](int64_t first, int64_t last) {
            const std::unique_ptr<MaskedMapBuffers<A>> buffers(new MaskedMapBuffers<A>(p));
            for (int64_t i = first; i < last; ++i) run_block<A>(p, i * kBlock, *buffers);
        });
        return;
    }
    // Each chunk has sums of its own, so the bits do not depend on the number of threads.
    share_out(p.chunks, 3 * work, threads, [&](int64_t first, int64_t last) {
        const std::unique_ptr<MaskedMapBuffers<A>> buffers(new MaskedMapBuffers<A>(p));
        for (int64_t i = first; i < last; ++i) {
            A* const sums = static_cast<A*>(p.dnumbers) + i * p.count;
            for (int64_t j = blocks * i / p.chunks; j < blocks * (i + 1) / p.chunks; ++j) {
                backward_block<A>(p, j * kBlock, sums, *buffers);
            }
        }
    });
}

}  // namespace

void run(const MaskedMap& p, int threads) {
    if (p.samples == 0) return;
    p.is_double ? run_all<double>(p, threads) : run_all<float>(p, threads);
}

}  // namespace mflow
