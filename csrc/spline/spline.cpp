// Rational-quadratic splines on the CPU. The numbers of a tile's elements are copied into dense buffers,
// unless they are dense, so that one vectorized loop serves every layout.

#include "spline.h"

#include <limits>

#include "spline_arithmetic.h"

namespace mflow {
namespace {

template <class A>
MFLOW_INLINE void forward_tile(const Spline& p, const HalfGrid& g, int64_t index, SplineBuffers<A>& b,
                               double* sums) {
    const Tile t = g.tiling.tile(index);
    const SplineConstants<A> k(p.options);
    const A* x = read<A>(g, t, p.x, b.x);
    locate<A>(p, g, t, k, x, b);
    A* y = room<A>(g, t, p.y, b.y);
    const A outside = p.options.tails != SplineOptions::Tails::none ? A(0) : std::numeric_limits<A>::quiet_NaN();
    p.inverse ? transform<true, A>(t.size(), x, k, outside, b, y)
              : transform<false, A>(t.size(), x, k, outside, b, y);
    copy_identity<A>(p, g, t);
    write<A>(g, t, p.y, y);
    store_sums<A>(g, t, index, A(1), b.log_slope, sums);
}

template <class A>
MFLOW_INLINE void backward_tile(const Spline& p, const HalfGrid& g, int64_t index, SplineBuffers<A>& b) {
    const Tile t = g.tiling.tile(index);
    const SplineConstants<A> k(p.options);
    locate<A>(p, g, t, k, read<A>(g, t, p.x, b.x), b);
    const A* dy = read<A>(g, t, p.dy, b.dy);
    spread_dlogdet<A>(p, g, t, b.dlogdet);
    A* dx = room<A>(g, t, p.dx, b.dx);
    p.inverse ? differentiate<true, A>(t.size(), dy, b, dx)
              : differentiate<false, A>(t.size(), dy, b, dx);
    copy_identity<A>(p, g, t);
    write<A>(g, t, p.dx, dx);
    write_axis<A>(p, g, t, k, 0, k.min_width, b.widths, b.dstart, b.dsize, b);
    write_axis<A>(p, g, t, k, p.options.bins, k.min_height, b.heights, b.dstart_y, b.dsize_y, b);
    write_slopes<A>(p, g, t, k, b);
}

}  // namespace

MFLOW_RUN_TILES(Spline, float)
MFLOW_RUN_TILES(Spline, double)

void run(const Spline& p, int threads) {
    // A softmax number costs about as much as eight elements of a coupling.
    const int64_t work = p.shape.size() * p.options.bins * 8;
    p.is_double ? run_half<double, SplineBuffers<double>>(p, p.x, kLanes, work, threads)
                : run_half<float, SplineBuffers<float>>(p, p.x, kLanes, work, threads);
}

}  // namespace mflow
