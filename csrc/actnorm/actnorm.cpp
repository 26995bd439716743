// Actnorm on the CPU. Rows of a state run along the axis that is contiguous in memory, pixels or channels.

#include "actnorm.h"

#include <cmath>
#include <vector>

#include "../common/loops.h"

namespace mflow {
namespace {

// The numbers of each channel. `offset` is added to x in the gradient of log_scale.
template <class A>
struct Channels {
    std::vector<A> scale, shift, offset;
    double log_det = 0;

    template <class Problem>
    explicit Channels(const Problem& p)
        : scale(p.shape.channels), shift(p.shape.channels), offset(p.shape.channels) {
        const A *bias = static_cast<const A*>(p.bias), *log_scale = static_cast<const A*>(p.log_scale);
        for (int64_t c = 0; c < p.shape.channels; ++c) {
            scale[c] = std::exp(p.inverse ? -log_scale[c] : log_scale[c]);
            shift[c] = bias[c];
            offset[c] = p.inverse ? A(0) : bias[c];
            log_det += log_scale[c];
        }
        log_det *= p.inverse ? -double(p.shape.pixels) : double(p.shape.pixels);
    }
};

template <class A>
MFLOW_INLINE const A* at(const StateView& view, int64_t sample, int64_t channel, int64_t pixel) {
    return static_cast<const A*>(view.data) + sample * view.sample + channel * view.channel + pixel * view.pixel;
}
template <class A>
MFLOW_INLINE A* to(const StateView& view, int64_t sample, int64_t channel, int64_t pixel) {
    return const_cast<A*>(at<A>(view, sample, channel, pixel));
}

template <class A>
MFLOW_INLINE A forward_value(bool inverse, A x, A scale, A shift) {
    return inverse ? scale * x - shift : scale * (x + shift);
}

template <class A>
MFLOW_INLINE void forward_sample(const ActNorm& p, const Channels<A>& k, int64_t n) {
    const auto [_, channels, pixels] = p.shape;
    const bool inverse = p.inverse;
    if (p.x.pixel == 1 && p.y.pixel == 1 && pixels > 1) {
        for (int64_t c = 0; c < channels; ++c) {
            const A *x = at<A>(p.x, n, c, 0), scale = k.scale[c], shift = k.shift[c];
            A* y = to<A>(p.y, n, c, 0);
            for (int64_t i = 0; i < pixels; ++i) y[i] = forward_value(inverse, x[i], scale, shift);
        }
    } else if (p.x.channel == 1 && p.y.channel == 1) {
        for (int64_t i = 0; i < pixels; ++i) {
            const A *x = at<A>(p.x, n, 0, i), *scale = k.scale.data(), *shift = k.shift.data();
            A* y = to<A>(p.y, n, 0, i);
            for (int64_t c = 0; c < channels; ++c) y[c] = forward_value(inverse, x[c], scale[c], shift[c]);
        }
    } else {
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t i = 0; i < pixels; ++i) {
                *to<A>(p.y, n, c, i) = forward_value(inverse, *at<A>(p.x, n, c, i), k.scale[c], k.shift[c]);
            }
        }
    }
    p.logdet.at<A>(n) = A(k.log_det);
}

// Sums dy and dy * (x + offset) over the pixels of each channel, and writes dx if there is room for it.
template <bool WRITES, class A>
MFLOW_INLINE void backward_sample(const ActNormBackward& p, const Channels<A>& k, int64_t n, A* sums,
                                  A* slopes) {
    const auto [_, channels, pixels] = p.shape;
    const auto room = [&](int64_t c, int64_t i) { return WRITES ? to<A>(p.dx, n, c, i) : nullptr; };
    if (p.x.pixel == 1 && p.dy.pixel == 1 && (!WRITES || p.dx.pixel == 1) && pixels > 1) {
        for (int64_t c = 0; c < channels; ++c) {
            const A *x = at<A>(p.x, n, c, 0), *dy = at<A>(p.dy, n, c, 0), scale = k.scale[c], offset = k.offset[c];
            A *dx = room(c, 0), sum = 0, slope = 0;
#pragma omp simd reduction(+ : sum, slope)
            for (int64_t i = 0; i < pixels; ++i) {
                if (WRITES) dx[i] = scale * dy[i];
                sum += dy[i];
                slope += dy[i] * (x[i] + offset);
            }
            sums[c] = sum;
            slopes[c] = slope;
        }
        return;
    }
    for (int64_t c = 0; c < channels; ++c) sums[c] = slopes[c] = 0;
    const bool neighbours = p.x.channel == 1 && p.dy.channel == 1 && (!WRITES || p.dx.channel == 1);
    for (int64_t i = 0; i < pixels && neighbours; ++i) {
        const A *x = at<A>(p.x, n, 0, i), *dy = at<A>(p.dy, n, 0, i);
        const A *scale = k.scale.data(), *offset = k.offset.data();
        A* dx = room(0, i);
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
            if (WRITES) dx[c] = scale[c] * dy[c];
            sums[c] += dy[c];
            slopes[c] += dy[c] * (x[c] + offset[c]);
        }
    }
    for (int64_t c = 0; c < channels && !neighbours; ++c) {
        for (int64_t i = 0; i < pixels; ++i) {
            const A x = *at<A>(p.x, n, c, i), dy = *at<A>(p.dy, n, c, i);
            if (WRITES) *room(c, i) = k.scale[c] * dy;
            sums[c] += dy;
            slopes[c] += dy * (x + k.offset[c]);
        }
    }
}

// Function clones cannot be templates.
#define MFLOW_SAMPLES(A)                                                                                     \
    MFLOW_CLONES void run_samples(const ActNorm& p, const Channels<A>& k, int64_t first, int64_t last) {     \
        for (int64_t n = first; n < last; ++n) forward_sample<A>(p, k, n);                                   \
    }                                                                                                        \
    MFLOW_CLONES void run_samples(const ActNormBackward& p, const Channels<A>& k, int64_t first,             \
                                  int64_t last, A* sums, A* slopes) {                                        \
        for (int64_t n = first; n < last; ++n) {                                                             \
            A *own = sums + n * p.shape.channels, *own_slopes = slopes + n * p.shape.channels;               \
            p.dx.data ? backward_sample<true, A>(p, k, n, own, own_slopes)                                   \
                      : backward_sample<false, A>(p, k, n, own, own_slopes);                                 \
        }                                                                                                    \
    }
MFLOW_SAMPLES(float)
MFLOW_SAMPLES(double)
#undef MFLOW_SAMPLES

template <class A>
void forward(const ActNorm& p, int threads) {
    const Channels<A> k(p);
    share_out(p.shape.samples, p.shape.size(), threads,
              [&](int64_t first, int64_t last) { run_samples(p, k, first, last); });
}

// The sums of each sample are added in order, so the bits do not depend on the number of threads.
template <class A>
void backward(const ActNormBackward& p, int threads) {
    const Channels<A> k(p);
    const auto [samples, channels, pixels] = p.shape;
    std::vector<A> sums(samples * channels), slopes(samples * channels);
    share_out(samples, p.shape.size(), threads, [&](int64_t first, int64_t last) {
        run_samples(p, k, first, last, sums.data(), slopes.data());
    });
    std::vector<double> dbias(channels), dlog_scale(channels);
    double dlog_det = 0;
    for (int64_t n = 0; n < samples; ++n) {
        dlog_det += p.dlogdet.at<A>(n);
        for (int64_t c = 0; c < channels; ++c) {
            dbias[c] += sums[n * channels + c];
            dlog_scale[c] += slopes[n * channels + c];
        }
    }
    for (int64_t c = 0; c < channels; ++c) {
        const double sign = p.inverse ? -1 : 1, slope = k.scale[c] * dlog_scale[c] + double(pixels) * dlog_det;
        static_cast<A*>(p.dbias)[c] = A(p.inverse ? -dbias[c] : k.scale[c] * dbias[c]);
        static_cast<A*>(p.dlog_scale)[c] = A(sign * slope);
    }
}

}  // namespace

void run(const ActNorm& p, int threads) { p.is_double ? forward<double>(p, threads) : forward<float>(p, threads); }
void run(const ActNormBackward& p, int threads) {
    p.is_double ? backward<double>(p, threads) : backward<float>(p, threads);
}

}  // namespace mflow
