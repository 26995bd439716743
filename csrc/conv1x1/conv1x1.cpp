// 1x1 convolutions on the CPU. A tile of the state is copied into a panel (panels.h). The coupling and the
// matrix products run there, and the result is written once.

#include "conv1x1.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "panels.h"

namespace mflow {
namespace {

constexpr int64_t kMostParts = 64;  // the largest number of partial outer sums

template <bool PIXEL_ROWS, class A>
struct Conv1x1Loop {
    const Conv1x1& p;
    Grid<PIXEL_ROWS, A> grid;
    PackedMatrix<PIXEL_ROWS, A> weight;
    std::vector<A> bias;
    std::vector<double> sums;  // of log s: one for each tile or, if `vectors`, for each sample

    explicit Conv1x1Loop(const Conv1x1& p)
        : p(p), grid(p), weight(p.weight, grid.channels), bias(whole_vectors<A>(grid.channels)) {
        for (int c = 0; c < grid.channels && p.bias.data; ++c) bias[c] = at<A>(p.bias, c, 0);
        if (p.coupling) sums.resize(grid.vectors ? p.shape.samples : grid.tiling.tiles());
    }

    MFLOW_INLINE void run(int64_t index, Panels<A>& b) {
        using V = typename Vector<A>::type;
        const Tile t = grid.tile(index);
        const int first = grid.first, second = grid.channels - first;
        grid.move(t, first, grid.in_memory(p.x[0], t, 0), grid.in_panel(b.z, 0));
        if (p.coupling) {
            couple(t, index, *p.coupling, b);
        } else {
            grid.move(t, second, grid.in_memory(p.x[1], t, 0), grid.in_panel(b.z, first));
        }
        weight(grid, t, b.z, b.y, [&](int row, int column, V& sum) __attribute__((always_inline)) {
            sum = PIXEL_ROWS ? *reinterpret_cast<const V*>(bias.data() + column) : V{} + bias[row];
        });
        grid.move(t, grid.channels, grid.in_panel(b.y, 0), grid.in_memory(p.y, t, 0));
        if (p.net.data) grid.move(t, first, grid.in_panel(b.y, 0), grid.in_memory(p.net, t, 0));
    }

    MFLOW_INLINE void couple(const Tile& t, int64_t index, const Coupling& c, Panels<A>& b) {
        const int second = grid.channels - grid.first, size = second * grid.pixels(t);
        CouplingBuffers<A>& h = b.half;
        grid.move(t, second, grid.in_memory(p.x[1], t, 0), grid.dense(t, second, h.x));
        grid.move(t, second, grid.in_memory(c.raw, t, 0), grid.dense(t, second, h.raw));
        grid.move(t, second, grid.in_memory(c.shift, t, 0), grid.dense(t, second, h.shift));
        const A sign = c.inverse ? A(-1) : A(1);
        log_scales<false, A>(c.scale, size, h.raw, h.log_s, h.slope);
        scale_half<A>(c, size, h.x, h.log_s, h.shift, h.y);
        grid.move(t, second, grid.dense(t, second, h.y), grid.in_panel(b.z, grid.first));
        if (!grid.vectors) {
            sums[index] = sign * sum(size, h.log_s);
        } else {
            for (int r = 0; r < grid.pixels(t); ++r) {
                sums[grid.first_pixel(t) + r] = sign * sum(second, h.log_s + r * second);
            }
        }
    }
};

template <bool PIXEL_ROWS, class A>
struct Conv1x1BackwardLoop {
    const Conv1x1Backward& p;
    Grid<PIXEL_ROWS, A> grid;
    PackedMatrix<PIXEL_ROWS, A> transposed, inverse;
    int64_t parts, outer_row;
    std::vector<A> outer_sums, dbiases;  // one for each part

    // The number of parts depends on the shape alone, not on the number of threads, so the order of the
    // sums is fixed.
    explicit Conv1x1BackwardLoop(const Conv1x1Backward& p)
        : p(p),
          grid(p),
          transposed(p.weight.transposed(), grid.channels),
          inverse(p.weight_inverse, grid.channels),
          parts(std::min({std::max<int64_t>(1, p.shape.size() / kElementsPerThread), grid.tiling.tiles(),
                          kMostParts})),
          outer_row(whole_vectors<A>(grid.channels)),
          outer_sums(parts * grid.channels * outer_row),
          dbiases(parts * outer_row) {}

    MFLOW_INLINE void run_part(int64_t part, Panels<A>& b) {
        A* outer_sum = outer_sums.data() + part * grid.channels * outer_row;
        A* dbias = dbiases.data() + part * outer_row;
        for (int64_t i = grid.tiling.tiles() * part / parts; i < grid.tiling.tiles() * (part + 1) / parts; ++i) {
            run(grid.tile(i), b);
            add_to_sums(grid.tile(i), b, outer_sum, dbias);
        }
    }

    // Also fills the panels g and z with dy and z, which `add_to_sums` reads.
    MFLOW_INLINE void run(const Tile& t, Panels<A>& b) {
        using V = typename Vector<A>::type;
        const int first = grid.first, second = grid.channels - first;
        const auto zero = [](int, int, V& sum) __attribute__((always_inline)) { sum = V{}; };
        const Part<A> dy = grid.in_memory(p.dy[0], t, 0);
        if (p.dnet.data) {
            add<A>(grid.rows(t, first), grid.columns(t, first), dy, grid.in_memory(p.dnet, t, 0),
                   grid.in_panel(b.g, 0));
        } else {
            grid.move(t, first, dy, grid.in_panel(b.g, 0));
        }
        grid.move(t, second, grid.in_memory(p.dy[1], t, 0), grid.in_panel(b.g, first));
        if (p.dstate.data) transposed(grid, t, b.g, b.y, zero);
        grid.move(t, first, grid.in_memory(p.state[0], t, 0), grid.in_panel(b.z, 0));
        if (p.coupling) {
            grid.move(t, first, grid.in_panel(b.y, 0), grid.in_memory(p.dstate, t, 0));
            coupling_backward(t, *p.coupling, b);
            return;
        }
        if (p.dstate.data) grid.move(t, grid.channels, grid.in_panel(b.y, 0), grid.in_memory(p.dstate, t, 0));
        grid.move(t, second, grid.in_memory(p.state[1], t, 0), grid.in_panel(b.z, first));
        if (p.bias.data) subtract_bias(t, b);
        if (!inverse) return;
        inverse(grid, t, b.z, b.y, zero);
        grid.move(t, grid.channels, grid.in_panel(b.y, 0), grid.in_memory(p.rebuilt, t, 0));
        if (p.net.data) grid.move(t, first, grid.in_panel(b.y, 0), grid.in_memory(p.net, t, 0));
    }

    MFLOW_INLINE void subtract_bias(const Tile& t, Panels<A>& b) {
        for (int r = 0; r < grid.rows(t, grid.channels); ++r) {
            A* z = b.z + r * grid.stride;
            for (int i = 0; i < grid.columns(t, grid.channels); ++i) {
                z[i] -= at<A>(p.bias, PIXEL_ROWS ? i : r, 0);
            }
        }
    }

    MFLOW_INLINE void coupling_backward(const Tile& t, const Coupling& c, Panels<A>& b) {
        const int first = grid.first, second = grid.channels - first, size = second * grid.pixels(t);
        CouplingBuffers<A>& h = b.half;
        const auto dense = [&](A* data) { return grid.dense(t, second, data); };
        grid.move(t, second, grid.in_memory(p.state[1], t, 0), dense(h.x));
        grid.move(t, second, grid.in_memory(c.raw, t, 0), dense(h.raw));
        grid.move(t, second, grid.in_memory(c.shift, t, 0), dense(h.shift));
        grid.move(t, second, grid.in_panel(b.y, first), dense(h.dy));
        if (grid.vectors) {
            for (int r = 0; r < grid.pixels(t); ++r) {
                std::fill_n(h.dlogdet + r * second, second, c.dlogdet.at<A>(grid.first_pixel(t) + r));
            }
        } else {
            std::fill_n(h.dlogdet, size, c.dlogdet.at<A>(t.sample));
        }
        log_scales<true, A>(c.scale, size, h.raw, h.log_s, h.slope);
        unscale_half<true, A>(c, size, h.x, h.log_s, h.slope, h.shift, h.dy, h.dlogdet, h.y, h.dx, h.draw,
                              h.dshift);
        grid.move(t, second, dense(h.y), grid.in_panel(b.z, first));
        grid.move(t, second, dense(h.dx), grid.in_memory(p.dstate, t, first));
        grid.move(t, second, dense(h.draw), grid.in_memory(c.draw, t, 0));
        grid.move(t, second, dense(h.dshift), grid.in_memory(c.dshift, t, 0));
    }

    MFLOW_INLINE void add_to_sums(const Tile& t, Panels<A>& b, A* outer_sum, A* dbias) {
        using V = typename Vector<A>::type;
        const A* z = b.z;
        Operand<A> dy = {b.g, 1, grid.stride};
        int64_t row = grid.stride;
        if (PIXEL_ROWS) {
            for (int c = 0; c < grid.channels; c += kLanes<A>) {
                V& sums = *reinterpret_cast<V*>(dbias + c);
                for (int r = 0; r < grid.pixels(t); ++r) {
                    sums += *reinterpret_cast<const V*>(b.g + r * grid.stride + c);
                }
            }
        } else {
            for (int c = 0; c < grid.channels; ++c) {
                dbias[c] += sum(grid.pixels(t), b.g + c * grid.stride);
                for (int i = 0; i < grid.pixels(t); ++i) {
                    b.turned[i * outer_row + c] = b.z[c * grid.stride + i];
                }
            }
            z = b.turned;
            dy = {b.g, grid.stride, 1};
            row = outer_row;
        }
        product<A>(grid.channels, grid.channels, grid.pixels(t), dy, z, row, outer_sum, outer_row,
                   [&](int o, int c, V& sum) __attribute__((always_inline)) {
                       sum = *reinterpret_cast<const V*>(outer_sum + o * outer_row + c);
                   });
    }

    void write_sums() const {
        const int channels = grid.channels;
        A *outer_sum = static_cast<A*>(p.outer_sum), *dbias = static_cast<A*>(p.dbias);
        for (int o = 0; o < channels; ++o) {
            for (int c = 0; c < channels; ++c) outer_sum[o * channels + c] = 0;
            dbias[o] = 0;
            for (int64_t part = 0; part < parts; ++part) {
                const A* sums = outer_sums.data() + (part * channels + o) * outer_row;
                for (int c = 0; c < channels; ++c) outer_sum[o * channels + c] += sums[c];
                dbias[o] += dbiases[part * outer_row + o];
            }
        }
    }
};

// Function clones cannot be templates.
#define MFLOW_RANGES(PIXEL_ROWS, A)                                                                \
    MFLOW_CLONES void run_range(Conv1x1Loop<PIXEL_ROWS, A>& m, int64_t begin, int64_t end,         \
                                Panels<A>& b) {                                                    \
        for (int64_t i = begin; i < end; ++i) m.run(i, b);                                         \
    }                                                                                              \
    MFLOW_CLONES void run_range(Conv1x1BackwardLoop<PIXEL_ROWS, A>& m, int64_t begin,              \
                                int64_t end, Panels<A>& b) {                                       \
        for (int64_t i = begin; i < end; ++i) m.run_part(i, b);                                    \
    }
MFLOW_RANGES(true, float)
MFLOW_RANGES(false, float)
MFLOW_RANGES(true, double)
MFLOW_RANGES(false, double)
#undef MFLOW_RANGES

template <class A, class Loop>
void run(Loop& m, int64_t tasks, int64_t elements, int threads) {
    share_out(tasks, elements, threads, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<Panels<A>> panels(new Panels<A>);
        run_range(m, begin, end, *panels);
    });
}

template <bool PIXEL_ROWS, class A>
void conv1x1(const Conv1x1& p, int threads) {
    Conv1x1Loop<PIXEL_ROWS, A> m(p);
    run<A>(m, m.grid.tiling.tiles(), p.shape.size(), threads);
    if (p.coupling) write_ledger<A>(p.coupling->ledger, p.shape.samples, m.sums);
}

template <bool PIXEL_ROWS, class A>
void conv1x1_backward(const Conv1x1Backward& p, int threads) {
    Conv1x1BackwardLoop<PIXEL_ROWS, A> m(p);
    run<A>(m, m.parts, p.shape.size(), threads);
    m.write_sums();
}

bool channels_are_neighbours(const Shape& shape, const StateView& view) {
    return shape.pixels == 1 || view.pixel != 1;
}

}  // namespace

void conv1x1_cpu(const Conv1x1& p, int threads) {
    if (p.shape.size() == 0) return;
    if (channels_are_neighbours(p.shape, p.y)) {
        p.is_double ? conv1x1<true, double>(p, threads) : conv1x1<true, float>(p, threads);
    } else {
        p.is_double ? conv1x1<false, double>(p, threads) : conv1x1<false, float>(p, threads);
    }
}

void conv1x1_backward_cpu(const Conv1x1Backward& p, int threads) {
    if (p.shape.size() == 0) return;
    if (channels_are_neighbours(p.shape, p.state[0])) {
        p.is_double ? conv1x1_backward<true, double>(p, threads)
                    : conv1x1_backward<true, float>(p, threads);
    } else {
        p.is_double ? conv1x1_backward<false, double>(p, threads)
                    : conv1x1_backward<false, float>(p, threads);
    }
}

}  // namespace mflow
