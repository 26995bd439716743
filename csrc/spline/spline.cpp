// Rational-quadratic splines on the CPU. The numbers of a tile's elements are copied into dense buffers,
// unless they are dense, so that one vectorized loop serves every layout.

#include "spline.h"

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "../common/grid.h"
#include "../common/loops.h"
#include "spline_arithmetic.h"

namespace mflow {
namespace {

template <class A>
MFLOW_INLINE void spline_tile(const Spline& p, const HalfGrid& g, int64_t index, SplineBuffers<A>& b,
                              double* sums) {
    const Tile t = g.tiling.tile(index);
    const SplineConstants<A> k(p.options);
    const A* x = read<A>(g, t, p.x, b.x);
    locate<A>(p, g, t, k, x, b);
    A* y = room<A>(g, t, p.y, b.y);
    const A outside = p.options.tails ? A(0) : std::numeric_limits<A>::quiet_NaN();
    p.inverse ? transform<true, A>(t.size(), x, k, outside, b, y)
              : transform<false, A>(t.size(), x, k, outside, b, y);
    write<A>(g, t, p.y, y);
    const int rows = g.vectors ? t.rows : 1, width = t.size() / rows;
    for (int r = 0; r < rows; ++r) {
        A total = 0;
        for (int i = 0; i < width; ++i) total += b.log_slope[r * width + i];
        sums[g.vectors ? (t.outer + r) * g.tiling.along() + index % g.tiling.along() : index] = total;
    }
}

template <class A>
MFLOW_INLINE void spline_backward_tile(const Spline& p, const HalfGrid& g, int64_t index, SplineBuffers<A>& b) {
    const Tile t = g.tiling.tile(index);
    const SplineConstants<A> k(p.options);
    locate<A>(p, g, t, k, read<A>(g, t, p.x, b.x), b);
    const A* dy = read<A>(g, t, p.dy, b.dy);
    const A* dlogdet = static_cast<const A*>(p.dlogdet);
    for (int r = 0; r < t.rows; ++r) {
        const int64_t n = g.vectors ? t.outer + r : t.sample;
        std::fill_n(b.dlogdet + r * t.width, t.width, dlogdet[n * p.dlogdet_stride]);
    }
    A* dx = room<A>(g, t, p.dx, b.dx);
    p.inverse ? differentiate<true, A>(t.size(), dy, b, dx)
              : differentiate<false, A>(t.size(), dy, b, dx);
    write<A>(g, t, p.dx, dx);
    write_axis<A>(p, g, t, k, 0, k.min_width, b.widths, b.dstart, b.dsize, b);
    write_axis<A>(p, g, t, k, p.options.bins, k.min_height, b.heights, b.dstart_y, b.dsize_y, b);
    write_slopes<A>(p, g, t, k, b);
}

// Function clones cannot be templates.
#define MFLOW_SPLINE_TILES(name, A)                                                                \
    MFLOW_CLONES void name(const Spline& p, const HalfGrid& g, int64_t first, int64_t last,            \
                           double* sums, SplineBuffers<A>& buffers) {                              \
        for (int64_t i = first; i < last; ++i) {                                                   \
            sums ? spline_tile<A>(p, g, i, buffers, sums) : spline_backward_tile<A>(p, g, i, buffers); \
        }                                                                                          \
    }
MFLOW_SPLINE_TILES(run_tiles, float)
MFLOW_SPLINE_TILES(run_tiles, double)
#undef MFLOW_SPLINE_TILES

// Copies the channels that pass through, one row for each sample.
template <class A>
void copy_identity(const Spline& p) {
    if (!p.identity_channels) return;
    const int channels = static_cast<int>(p.identity_channels), pixels = static_cast<int>(p.shape.pixels);
    const bool vectors = pixels == 1, pixels_inside = !vectors && p.from.pixel == 1;
    for (int64_t n = 0; n < (vectors ? 1 : p.shape.samples); ++n) {
        const auto rows = [&](const StateView& view) -> Part<A> {
            A* const data = static_cast<A*>(view.data) + n * view.sample;
            if (vectors) return {data, view.sample, view.channel, false};
            return {data, pixels_inside ? view.channel : view.pixel,
                    pixels_inside ? view.pixel : view.channel, false};
        };
        copy<A>(vectors ? static_cast<int>(p.shape.samples) : pixels_inside ? channels : pixels,
                pixels_inside ? pixels : channels, rows(p.from), rows(p.to));
    }
}

// A softmax number costs about as much as eight elements of a coupling.
template <class A>
void run(const Spline& p, const HalfGrid& g, int threads, double* sums) {
    copy_identity<A>(p);
    share_out(g.tiling.tiles(), p.shape.size() * p.options.bins * 8, threads, [&](int64_t first, int64_t last) {
        const std::unique_ptr<SplineBuffers<A>> buffers(new SplineBuffers<A>);
        run_tiles(p, g, first, last, sums, *buffers);
    });
}

template <class A>
void spline(const Spline& p, int threads) {
    const HalfGrid g(p.shape, p.x, kLanes);
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

void spline_cpu(const Spline& p, int threads) {
    if (p.shape.size() == 0) return;
    p.is_double ? spline<double>(p, threads) : spline<float>(p, threads);
}

void spline_backward_cpu(const Spline& p, int threads) {
    if (p.shape.size() == 0) return;
    const HalfGrid g(p.shape, p.x, kLanes);
    p.is_double ? run<double>(p, g, threads, nullptr) : run<float>(p, g, threads, nullptr);
}

}  // namespace mflow
