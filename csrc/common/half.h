// The loops that couplings and splines share on a CPU. Both change one half of a state, tile by tile, and
// sum log |dy/dx| over each sample.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "grid.h"
#include "loops.h"
#include "state_view.h"

namespace mflow {

struct HalfProblem {
    bool is_double = false, inverse = false;
    Shape shape;  // of the half that changes

    // Forward: reads x, writes y and a sum for each sample.
    StateView x, y;
    SampleValues ledger;

    // Backward, without a ledger: reads dy and dlogdet, writes dx.
    SampleValues dlogdet;
    StateView dy, dx;

    // The channels that pass through are copied from `from` to `to`: those of the state, and those of the
    // gradient in a backward problem.
    int64_t identity_channels = 0;  // 0 copies nothing
    StateView from, to;
};

// Copies the tile's share of the channels that pass through: those with the tile's indices, and all that
// follow if the half has no more channels than the tile's.
template <class A>
MFLOW_INLINE void copy_identity(const HalfProblem& p, const HalfGrid& g, const Tile& t) {
    const int64_t first = g.pixels_inside ? t.outer : t.inner;
    const int64_t own = g.pixels_inside ? t.rows : t.width;
    const int64_t left = p.identity_channels - first;
    if (left <= 0) return;
    const int channels = static_cast<int>(first + own == p.shape.channels ? left : std::min(own, left));
    copy<A>(g.pixels_inside ? channels : t.rows, g.pixels_inside ? t.width : channels,
            part<A>(g, t, p.from), part<A>(g, t, p.to));
}

template <class A>
MFLOW_INLINE A sum(int count, const A* values) {
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < count; ++i) total += values[i];
    return total;
}

// Adds up a tile's values of log |dy/dx|, apart for each sample.
template <class A>
MFLOW_INLINE void store_sums(const HalfGrid& g, const Tile& t, int64_t index, A sign, const A* log_s,
                             double* sums) {
    if (!g.vectors) {
        sums[index] = sign * sum(t.size(), log_s);
        return;
    }
    for (int r = 0; r < t.rows; ++r) {
        sums[(t.outer + r) * g.tiling.along() + index % g.tiling.along()] =
            sign * sum(t.width, log_s + r * t.width);
    }
}

// Spreads dlogdet over the elements of a tile.
template <class A>
MFLOW_INLINE void spread_dlogdet(const HalfProblem& p, const HalfGrid& g, const Tile& t, A* to) {
    for (int r = 0; r < t.rows; ++r) {
        const int64_t n = g.vectors ? t.outer + r : t.sample;
        std::fill_n(to + r * t.width, t.width, p.dlogdet.at<A>(n));
    }
}

// Adds the sums of each sample in the order of its tiles, so the bits do not depend on the number of threads.
template <class A>
void write_ledger(const SampleValues& ledger, int64_t samples, const std::vector<double>& sums) {
    const double* next = sums.data();
    for (int64_t n = 0; n < samples; ++n) {
        double total = 0;
        for (size_t i = 0; i < sums.size() / samples; ++i) total += *next++;
        ledger.at<A>(n) = static_cast<A>(total);
    }
}

// Defines run_tiles, which `run_half` calls, for one kind of problem and one type. Function clones cannot be
// templates.
#define MFLOW_RUN_TILES(Problem, A)                                                                      \
    MFLOW_CLONES static void run_tiles(const Problem& p, const HalfGrid& g, int64_t first, int64_t last, \
                                       double* sums, Problem##Buffers<A>& b) {                           \
        for (int64_t i = first; i < last; ++i) {                                                         \
            sums ? forward_tile<A>(p, g, i, b, sums) : backward_tile<A>(p, g, i, b);                     \
        }                                                                                                \
    }

// Runs all tiles of at most `tile` elements. The layout of `like` decides their form, and `work` how many
// threads they are worth.
template <class A, class Buffers, class Problem>
void run_half(const Problem& p, const StateView& like, int64_t tile, int64_t work, int threads) {
    if (p.shape.size() == 0) return write_ledger<A>(p.ledger, p.ledger.data ? p.shape.samples : 0, {});
    const HalfGrid g(p.shape, like, tile);
    std::vector<double> sums(p.ledger.data ? p.shape.samples * g.sums() : 0);
    share_out(g.tiling.tiles(), work, threads, [&](int64_t first, int64_t last) {
        // On the heap: 44 to 88 KB may be too much for the caller's stack.
        const std::unique_ptr<Buffers> buffers(new Buffers);
        run_tiles(p, g, first, last, p.ledger.data ? sums.data() : nullptr, *buffers);
    });
    if (p.ledger.data) write_ledger<A>(p.ledger, p.shape.samples, sums);
}

}  // namespace mflow
