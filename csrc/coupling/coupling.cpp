// Couplings on the CPU. A dense tile is used in place; any other tile is copied into small dense
// buffers. One vectorized loop thus serves every layout.

#include "coupling.h"

#include <type_traits>

#include "tile_arithmetic.h"

namespace mflow {
namespace {

template <class A>
MFLOW_INLINE void forward_tile(const Coupling& p, const HalfGrid& g, int64_t index, CouplingBuffers<A>& b,
                               double* sums) {
    const Tile t = g.tiling.tile(index);
    const A* x = read<A>(g, t, p.x, b.x);
    const A* raw = read<A>(g, t, p.raw, b.raw);
    const A* shift = read<A>(g, t, p.shift, b.shift);
    A* y = room<A>(g, t, p.y, b.y);
    log_scales<false, A>(p.scale, t.size(), raw, b.log_s, b.slope);
    scale_half<A>(p, t.size(), x, b.log_s, shift, y);
    copy_identity<A>(p, g, t);
    write<A>(g, t, p.y, y);
    store_sums<A>(g, t, index, p.inverse ? A(-1) : A(1), b.log_s, sums);
}

template <class A>
MFLOW_INLINE void backward_tile(const Coupling& p, const HalfGrid& g, int64_t index,
                                CouplingBuffers<A>& b) {
    const Tile t = g.tiling.tile(index);
    const A* given = read<A>(g, t, p.rebuilds() ? p.y : p.x, b.x);
    const A* raw = read<A>(g, t, p.raw, b.raw);
    const A* shift = read<A>(g, t, p.shift, b.shift);
    const A* dy = read<A>(g, t, p.dy, b.dy);
    spread_dlogdet<A>(p, g, t, b.dlogdet);
    A* other = p.rebuilds() ? room<A>(g, t, p.x, b.y) : b.y;  // y is not needed
    A* dx = room<A>(g, t, p.dx, b.dx);
    A* draw = room<A>(g, t, p.draw, b.draw);
    A* dshift = room<A>(g, t, p.dshift, b.dshift);
    log_scales<true, A>(p.scale, t.size(), raw, b.log_s, b.slope);
    const auto run = [&](auto x_given) __attribute__((always_inline)) {
        unscale_half<x_given.value, A>(p, t.size(), given, b.log_s, b.slope, shift, dy, b.dlogdet, other, dx,
                                    draw, dshift);
    };
    p.rebuilds() ? run(std::false_type{}) : run(std::true_type{});
    copy_identity<A>(p, g, t);
    if (p.rebuilds()) write<A>(g, t, p.x, other);
    write<A>(g, t, p.dx, dx);
    write<A>(g, t, p.draw, draw);
    write<A>(g, t, p.dshift, dshift);
}

}  // namespace

MFLOW_RUN_TILES(Coupling, float)
MFLOW_RUN_TILES(Coupling, double)

void run(const Coupling& p, int threads) {
    const StateView& like = p.rebuilds() ? p.y : p.x;
    p.is_double ? run_half<double, CouplingBuffers<double>>(p, like, kTile, p.shape.size(), threads)
                : run_half<float, CouplingBuffers<float>>(p, like, kTile, p.shape.size(), threads);
}

}  // namespace mflow
