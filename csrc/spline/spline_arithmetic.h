// Computes the splines of a tile in dense buffers. A *lane* is an element of the tile. Loops over lanes
// are innermost, so that they vectorize.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/functions.h"
#include "../common/grid.h"
#include "spline.h"
#include "spline_numbers.h"

namespace mflow {

// One axis of a tile's splines: the widths or the heights of their bins.
template <class A>
struct Axis {
    A exps[(kMaxBins + 1) * kLanes];  // softmax numerators, bin by bin; later gradients
    A inverse_sum[kLanes];
    // Each lane's bin has a first knot (its distance from the interval's end), a length, a softmax value, and
    // a sum of the softmax values below it. `start_error` is what rounding took from the sum `start`.
    A start[kLanes], start_error[kLanes], size[kLanes], share[kLanes], below[kLanes];
};

template <class A>
struct SplineBuffers {
    Axis<A> widths, heights;
    A number[kLanes], x[kLanes], y[kLanes], position[kLanes], inside[kLanes], bin[kLanes], log_slope[kLanes];
    A slope0[kLanes], slope1[kLanes], raw0[kLanes], raw1[kLanes], edge[kLanes], total[kLanes];
    A position_error[kLanes], edge_error[kLanes];
    A dy[kLanes], dlogdet[kLanes], dx[kLanes], dstart[kLanes], dsize[kLanes], dstart_y[kLanes], dsize_y[kLanes];
    A dslope0[kLanes], dslope1[kLanes], mean[kLanes];
};

// The options in the type of the computation.
template <class A>
struct SplineConstants {
    A low, high, length, min_width, min_height, min_slope, cooling, size_limit, slope_limit;
    explicit SplineConstants(const SplineOptions& o)
        : low(A(o.low)),
          high(A(o.high)),
          length(A(o.high - o.low)),
          min_width(A(o.min_width)),
          min_height(A(o.min_height)),
          min_slope(A(o.min_slope)),
          cooling(A(1 / o.temperature)),
          // 1 / limit; 0 limits nothing.
          size_limit(o.exponential ? A(-2 / std::log(o.min_slope)) : A(0)),
          slope_limit(o.exponential ? A(-1 / std::log(o.min_slope)) : A(0)) {}
};

template <class A>
MFLOW_INLINE A magnitude(A x) {
    return x < A(0) ? -x : x;
}

// A raw number of a width or height as the softmax reads it.
template <class A>
MFLOW_INLINE A cooled(A raw, const SplineConstants<A>& k) {
    const A r = raw * k.cooling;
    return r / (A(1) + magnitude(r) * k.size_limit);
}

// Reads the raw numbers of one axis and computes its softmax.
template <class A>
MFLOW_INLINE void read_axis(const Spline& p, const HalfGrid& g, const Tile& t, const SplineConstants<A>& k,
                            int first, Axis<A>& axis, SplineBuffers<A>& b) {
    const int n = t.size(), bins = p.options.bins;
    A* const largest = b.edge;
    A* const total = b.total;
    read_numbers<A>(p, g, t, first, bins, axis.exps);
    for (int j = 0; j < bins; ++j) {
        A* const row = axis.exps + j * kLanes;
#pragma omp simd
        for (int i = 0; i < n; ++i) {
            const A r = cooled(row[i], k);
            row[i] = r;
            largest[i] = j == 0 || r > largest[i] ? r : largest[i];
        }
    }
    for (int i = 0; i < n; ++i) total[i] = A(0);
    for (int j = 0; j < bins; ++j) {
        A* const exps = axis.exps + j * kLanes;
#pragma omp simd
        for (int i = 0; i < n; ++i) {
            const A e = exp_of(exps[i] - largest[i]);
            exps[i] = e;
            total[i] += e;
        }
    }
#pragma omp simd
    for (int i = 0; i < n; ++i) axis.inverse_sum[i] = A(1) / total[i];
}

// What rounding took from the sum a + b (Knuth's two-sum).
template <class A>
MFLOW_INLINE A error_of(A a, A b, A sum) {
    const A part = sum - a;
    return (a - (sum - part)) + (b - part);
}

// Finds each lane's bin: the last one that begins at or below the lane's position if SEARCH, otherwise
// the bin that the lane has.
template <bool SEARCH, class A>
MFLOW_INLINE void find_bin(int n, int bins, A length, A least, Axis<A>& axis, SplineBuffers<A>& b) {
    const A rest = A(1) - least * A(bins);
    for (int i = 0; i < n; ++i) b.edge[i] = b.edge_error[i] = b.total[i] = A(0);
    for (int j = 0; j < bins; ++j) {
        const A* const exps = axis.exps + j * kLanes;
        const A index = A(j);
#pragma omp simd
        for (int i = 0; i < n; ++i) {
            const A share = exps[i] * axis.inverse_sum[i], size = length * (least + rest * share);
            const A edge = b.edge[i], total = b.total[i];
            const bool take = j == 0 || (SEARCH ? b.position[i] >= edge : b.bin[i] == index);
            if (SEARCH) b.bin[i] = take ? index : b.bin[i];
            axis.start[i] = take ? edge : axis.start[i];
            axis.start_error[i] = take ? b.edge_error[i] : axis.start_error[i];
            axis.size[i] = take ? size : axis.size[i];
            axis.share[i] = take ? share : axis.share[i];
            axis.below[i] = take ? total : axis.below[i];
            b.edge[i] = edge + size;
            b.edge_error[i] += error_of(edge, size, b.edge[i]);
            b.total[i] = total + share;
        }
    }
}

// The slopes of `count` raw numbers.
template <class A>
MFLOW_INLINE void slopes_of(int count, const A* raw, const SplineConstants<A>& k, bool exponential, A* to) {
    if (exponential) {
#pragma omp simd
        for (int i = 0; i < count; ++i) to[i] = exp_of(raw[i] / (A(1) + magnitude(raw[i]) * k.slope_limit));
    } else {
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            const A positive = raw[i] > A(0) ? raw[i] : A(0);
            to[i] = k.min_slope + (log1p_of(exp_of(-magnitude(raw[i]))) + positive);
        }
    }
}

// Multiplies gradients of slopes by d slope / d raw.
template <class A>
MFLOW_INLINE void change_slopes(int count, const A* raw, const A* slope, const SplineConstants<A>& k,
                                bool exponential, A* gradient) {
    if (exponential) {
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            const A limited = A(1) + magnitude(raw[i]) * k.slope_limit;
            gradient[i] *= slope[i] / (limited * limited);
        }
    } else {
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            const A e = exp_of(-magnitude(raw[i]));
            gradient[i] *= (raw[i] < A(0) ? e : A(1)) / (A(1) + e);
        }
    }
}

// The slopes at both ends of each lane's bin, and the raw numbers behind them. With linear tails the
// slope at the ends of the interval is 1.
template <class A>
MFLOW_INLINE void read_slopes(const Spline& p, const HalfGrid& g, const Tile& t, const SplineConstants<A>& k,
                              SplineBuffers<A>& b) {
    const bool linear = p.options.tails == SplineOptions::Tails::linear;
    const int n = t.size(), offset = linear ? -1 : 0, last = p.options.slopes() - 1;
    const Part<A> from = part<A>(g, t, numbers_of(p.params, p.options, 2 * p.options.bins, sizeof(A) == 8));
    const int64_t step = p.params.channel;
    for (int r = 0, i = 0; r < t.rows; ++r) {
        for (int c = 0; c < t.width; ++c, ++i) {
            const A* const raw = from.data + r * from.row + c * from.step;
            const int bin = static_cast<int>(b.bin[i]);
            b.raw0[i] = raw[step * std::max(bin + offset, 0)];
            b.raw1[i] = raw[step * std::min(p.options.next(bin) + offset, last)];
        }
    }
    slopes_of<A>(n, b.raw0, k, p.options.exponential, b.slope0);
    slopes_of<A>(n, b.raw1, k, p.options.exponential, b.slope1);
    if (!linear) return;
    const A end = A(p.options.bins - 1);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        b.slope0[i] = b.bin[i] == A(0) ? A(1) : b.slope0[i];
        b.slope1[i] = b.bin[i] == end ? A(1) : b.slope1[i];
    }
}

// Where an element lies in its bin, with the terms of the formulas. t and s = 1 - t are its distances from
// the bin's ends, in bin lengths.
template <class A>
struct Place {
    A t, s, q, slope, below, slant;  // q = t s; slope = height / width
};

template <bool INVERSE, class A>
MFLOW_INLINE Place<A> place(A distance, A width, A height, A d0, A d1) {
    Place<A> at;
    at.slope = height / width;
    const A r = distance / (INVERSE ? height : width);
    const A u = r < A(0) ? A(0) : r > A(1) ? A(1) : r, v = A(1) - u;
    at.t = u;
    if (INVERSE) {
        // The root of the quadratic, written without a difference of positive terms.
        const A tilt = d0 * v - d1 * u, twice = A(2) * at.slope;
        const A root = std::sqrt(tilt * tilt + twice * twice * u * v);
        const A sum = root + magnitude(tilt);
        at.t = tilt < A(0) ? sum / (sum + twice * v) : twice * u / (twice * u + sum);
    }
    at.s = A(1) - at.t;
    at.q = at.t * at.s;
    at.below = at.slope * (at.t * at.t + at.s * at.s) + (d0 + d1) * at.q;
    at.slant = d1 * at.t * at.t + A(2) * at.slope * at.q + d0 * at.s * at.s;
    return at;
}

// Finds where the elements lie: all but the formula.
template <class A>
MFLOW_INLINE void locate(const Spline& p, const HalfGrid& g, const Tile& t, const SplineConstants<A>& k,
                         const A* x, SplineBuffers<A>& b) {
    const int n = t.size(), bins = p.options.bins;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        const bool inside = x[i] >= k.low && x[i] <= k.high;
        b.inside[i] = inside ? A(1) : A(0);
        b.position[i] = inside ? x[i] - k.low : A(0);
        b.position_error[i] = inside ? error_of(x[i], -k.low, b.position[i]) : A(0);
    }
    read_axis<A>(p, g, t, k, 0, b.widths, b);
    read_axis<A>(p, g, t, k, bins, b.heights, b);
    if (p.inverse) {
        find_bin<true, A>(n, bins, k.length, k.min_height, b.heights, b);
        find_bin<false, A>(n, bins, k.length, k.min_width, b.widths, b);
    } else {
        find_bin<true, A>(n, bins, k.length, k.min_width, b.widths, b);
        find_bin<false, A>(n, bins, k.length, k.min_height, b.heights, b);
    }
    read_slopes<A>(p, g, t, k, b);
}

// The distance of a lane's position from the first knot of its bin.
template <class A>
MFLOW_INLINE A distance_of(int i, const Axis<A>& axis, const SplineBuffers<A>& b) {
    return (b.position[i] - axis.start[i]) + (b.position_error[i] - axis.start_error[i]);
}

// y and log |dy/dx|.
template <bool INVERSE, class A>
MFLOW_INLINE void transform(int n, const A* x, const SplineConstants<A>& k, A outside, SplineBuffers<A>& b,
                            A* y) {
    const Axis<A>&w = b.widths, &h = b.heights;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        const A d0 = b.slope0[i], d1 = b.slope1[i];
        const Place<A> at = place<INVERSE>(distance_of(i, INVERSE ? h : w, b), w.size[i], h.size[i], d0, d1);
        const A share = (at.slope * at.t * at.t + d0 * at.q) / at.below;
        const A start = INVERSE ? w.start[i] : h.start[i], knot = k.low + start;
        const A error = (INVERSE ? w.start_error[i] : h.start_error[i]) + error_of(k.low, start, knot);
        const A value = knot + ((INVERSE ? w.size[i] * at.t : h.size[i] * share) + error);
        const A ratio = at.slope / at.below;
        // Two logarithms: the square of the ratio may overflow.
        const A log_slope = log_of(at.slant) + A(2) * log_of(ratio);
        const bool inside = b.inside[i] != A(0);
        y[i] = inside ? value : x[i] + outside;
        b.log_slope[i] = inside ? (INVERSE ? -log_slope : log_slope) : outside;
    }
}

// The gradients of x and of each bin's start, length and slopes.
template <bool INVERSE, class A>
MFLOW_INLINE void differentiate(int n, const A* dy, SplineBuffers<A>& b, A* dx) {
    const Axis<A>&w = b.widths, &h = b.heights;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        const A d0 = b.slope0[i], d1 = b.slope1[i], width = w.size[i], height = h.size[i];
        const Place<A> at =
            place<INVERSE>(distance_of(i, INVERSE ? h : w, b), width, height, d0, d1);
        const A t = at.t, s = at.s, q = at.q, slope = at.slope;
        const A over = A(1) / at.below, of_slant = A(1) / at.slant;
        const A share = (slope * t * t + d0 * q) * over;
        const A share_t = slope * at.slant * over * over;
        // Derivatives of the logarithm of the slope.
        const A log_t = A(2) * (d1 * t + slope * (s - t) - d0 * s) * of_slant -
                        A(2) * (d0 + d1 - A(2) * slope) * (s - t) * over;
        const A log_slope = A(2) / slope + A(2) * q * of_slant - A(2) * (t * t + s * s) * over;
        const A log_0 = s * s * of_slant - A(2) * q * over, log_1 = t * t * of_slant - A(2) * q * over;
        const A l = INVERSE ? -b.dlogdet[i] : b.dlogdet[i];
        const A dstart = INVERSE ? dy[i] : -(dy[i] * height * share_t + l * log_t) / width;
        const A of_y = INVERSE ? -(dy[i] * width + l * log_t) / (height * share_t) : dy[i];
        const A scaled = of_y * height;
        const A dslope = scaled * q * (d1 * t * t - d0 * s * s) * over * over + l * log_slope;
        const bool inside = b.inside[i] != A(0);
        dx[i] = !inside ? dy[i] : INVERSE ? -of_y : -dstart;
        b.dstart[i] = inside ? dstart : A(0);
        b.dsize[i] = inside ? t * dstart - slope / width * dslope : A(0);
        b.dstart_y[i] = inside ? of_y : A(0);
        b.dsize_y[i] = inside ? of_y * share + dslope / width : A(0);
        b.dslope0[i] = inside ? scaled * q * (slope * s * s + d1 * q) * over * over + l * log_0 : A(0);
        b.dslope1[i] = inside ? l * log_1 - scaled * q * share * over : A(0);
    }
}

// The gradients of an axis' raw numbers, through its softmax.
template <class A>
MFLOW_INLINE void write_axis(const Spline& p, const HalfGrid& g, const Tile& t, const SplineConstants<A>& k,
                             int first, A least, Axis<A>& axis, const A* dstart, const A* dsize,
                             SplineBuffers<A>& b) {
    const int n = t.size(), bins = p.options.bins;
    const A factor = k.length * (A(1) - least * A(bins)) * k.cooling;
#pragma omp simd
    for (int i = 0; i < n; ++i) b.mean[i] = dstart[i] * axis.below[i] + dsize[i] * axis.share[i];
    for (int j = 0; j < bins; ++j) {
        A* const row = axis.exps + j * kLanes;
        const A index = A(j);
#pragma omp simd
        for (int i = 0; i < n; ++i) {
            const A own = b.bin[i] > index ? dstart[i] : b.bin[i] == index ? dsize[i] : A(0);
            row[i] = factor * (row[i] * axis.inverse_sum[i]) * (own - b.mean[i]);
        }
        if (p.options.exponential) {
            read_numbers<A>(p, g, t, first + j, 1, b.number);
#pragma omp simd
            for (int i = 0; i < n; ++i) {
                const A limited = A(1) + magnitude(b.number[i] * k.cooling) * k.size_limit;
                row[i] /= limited * limited;
            }
        }
    }
    write_numbers<A>(p, g, t, first, bins, axis.exps);
}

template <class A>
MFLOW_INLINE void write_slopes(const Spline& p, const HalfGrid& g, const Tile& t, const SplineConstants<A>& k,
                               SplineBuffers<A>& b) {
    const int n = t.size();
    const A offset = p.options.tails == SplineOptions::Tails::linear ? A(-1) : A(0);
    // On a circle, the knot after the last bin is the first one.
    const A turn = p.options.tails == SplineOptions::Tails::circular ? A(p.options.bins) : A(-1);
    change_slopes<A>(n, b.raw0, b.slope0, k, p.options.exponential, b.dslope0);
    change_slopes<A>(n, b.raw1, b.slope1, k, p.options.exponential, b.dslope1);
    A* const rows = b.widths.exps;  // no longer needed
    for (int j = 0; j < p.options.slopes(); ++j) {
        A* const row = rows + j * kLanes;
        const A index = A(j);
#pragma omp simd
        for (int i = 0; i < n; ++i) {
            const A first = b.bin[i] + offset;
            const A next = first + A(1) == turn ? A(0) : first + A(1);
            row[i] = first == index ? b.dslope0[i] : next == index ? b.dslope1[i] : A(0);
        }
    }
    write_numbers<A>(p, g, t, 2 * p.options.bins, p.options.slopes(), rows);
}

}  // namespace mflow
