// Couplings on the CPU. A dense tile is used in place; any other tile is copied into small dense
// buffers. One vectorized loop thus serves every layout.

#include "coupling.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "../common/grid.h"
#include "../common/loops.h"
#include "tile_arithmetic.h"

namespace mflow {
namespace {

HalfGrid grid_of(const Coupling& p) { return {p.shape, p.x_given || !p.dy.data ? p.x : p.y, kTile}; }

// Copies the tile's share of the identity half: the channels with the tile's indices.
template <class A>
MFLOW_INLINE void copy_identity_half(const Coupling& p, const HalfGrid& g, const Tile& t) {
    const int64_t first = g.pixels_inside ? t.outer : t.inner;
    const int64_t left = p.identity_channels - first;
    const int rows = static_cast<int>(g.pixels_inside ? std::min<int64_t>(t.rows, left) : t.rows);
    const int width = static_cast<int>(g.pixels_inside ? t.width : std::min<int64_t>(t.width, left));
    if (left <= 0) return;
    copy<A>(rows, width, part<A>(g, t, p.from), part<A>(g, t, p.to));
}

template <class A>
MFLOW_INLINE void couple_tile(const Coupling& p, const HalfGrid& g, int64_t index, Buffers<A>& b,
                              double* sums) {
    const Tile t = g.tiling.tile(index);
    const A sign = p.inverse ? A(-1) : A(1);
    const A* x = read<A>(g, t, p.x, b.x);
    const A* raw = read<A>(g, t, p.raw, b.raw);
    const A* shift = read<A>(g, t, p.shift, b.shift);
    A* y = room<A>(g, t, p.y, b.y);
    log_scales<false, A>(p.scale, t.size(), raw, b.log_s, b.slope);
    scale_half<A>(p, t.size(), x, b.log_s, shift, y);
    copy_identity_half<A>(p, g, t);
    write<A>(g, t, p.y, y);
    if (!g.vectors) {
        sums[index] = sign * sum(t.size(), b.log_s);
    } else {
        for (int r = 0; r < t.rows; ++r) {
            sums[(t.outer + r) * g.tiling.along() + index % g.tiling.along()] =
                sign * sum(t.width, b.log_s + r * t.width);
        }
    }
}

template <class A>
MFLOW_INLINE void backward_tile(const Coupling& p, const HalfGrid& g, int64_t index, Buffers<A>& b) {
    const Tile t = g.tiling.tile(index);
    const A* given = read<A>(g, t, p.x_given ? p.x : p.y, b.x);
    const A* raw = read<A>(g, t, p.raw, b.raw);
    const A* shift = read<A>(g, t, p.shift, b.shift);
    const A* dy = read<A>(g, t, p.dy, b.dy);
    const A* dlogdet = static_cast<const A*>(p.dlogdet);
    for (int r = 0; r < t.rows; ++r) {
        const int64_t n = g.vectors ? t.outer + r : t.sample;
        std::fill_n(b.dlogdet + r * t.width, t.width, dlogdet[n * p.dlogdet_stride]);
    }
    A* other = p.x_given ? b.y : room<A>(g, t, p.x, b.y);  // y is not needed
    A* dx = room<A>(g, t, p.dx, b.dx);
    A* draw = room<A>(g, t, p.draw, b.draw);
    A* dshift = room<A>(g, t, p.dshift, b.dshift);
    log_scales<true, A>(p.scale, t.size(), raw, b.log_s, b.slope);
    const auto run = [&](auto x_given) __attribute__((always_inline)) {
        unscale_half<x_given.value, A>(p, t.size(), given, b.log_s, b.slope, shift, dy, b.dlogdet, other, dx,
                                    draw, dshift);
    };
    p.x_given ? run(std::true_type{}) : run(std::false_type{});
    copy_identity_half<A>(p, g, t);
    if (!p.x_given) write<A>(g, t, p.x, other);
    write<A>(g, t, p.dx, dx);
    write<A>(g, t, p.draw, draw);
    write<A>(g, t, p.dshift, dshift);
}

// Function clones cannot be templates.
#define MFLOW_RUN_TILES(name, A)                                                                   \
    MFLOW_CLONES void name(const Coupling& p, const HalfGrid& g, int64_t first, int64_t last,          \
                           double* sums, Buffers<A>& buffers) {                                    \
        for (int64_t i = first; i < last; ++i) {                                                   \
            if (sums) {                                                                            \
                couple_tile<A>(p, g, i, buffers, sums);                                            \
            } else {                                                                               \
                backward_tile<A>(p, g, i, buffers);                                                \
            }                                                                                      \
        }                                                                                          \
    }
MFLOW_RUN_TILES(run_tiles, float)
MFLOW_RUN_TILES(run_tiles, double)
#undef MFLOW_RUN_TILES

template <class A>
void run(const Coupling& p, const HalfGrid& g, int threads, double* sums) {
    share_out(g.tiling.tiles(), p.shape.size(), threads, [&](int64_t first, int64_t last) {
        // On the heap: 44 to 88 KB may be too much for the caller's stack.
        const std::unique_ptr<Buffers<A>> buffers(new Buffers<A>);
        run_tiles(p, g, first, last, sums, *buffers);
    });
}

template <class A>
void couple(const Coupling& p, int threads) {
    if (p.shape.size() == 0) {
        std::fill_n(static_cast<A*>(p.ledger), p.shape.samples, A(0));
        return;
    }
    const HalfGrid g = grid_of(p);
    std::vector<double> sums(p.shape.samples * g.sums());
    run<A>(p, g, threads, sums.data());
    const double* next = sums.data();
    for (int64_t n = 0; n < p.shape.samples; ++n) {
        double total = 0;
        for (int64_t i = 0; i < g.sums(); ++i) total += *next++;
        static_cast<A*>(p.ledger)[n] = static_cast<A>(total);
    }
}

}  // namespace

void couple_cpu(const Coupling& p, int threads) {
    p.is_double ? couple<double>(p, threads) : couple<float>(p, threads);
}

void coupling_backward_cpu(const Coupling& p, int threads) {
    if (p.shape.size() == 0) return;
    const HalfGrid g = grid_of(p);
    p.is_double ? run<double>(p, g, threads, nullptr) : run<float>(p, g, threads, nullptr);
}

}  // namespace mflow
