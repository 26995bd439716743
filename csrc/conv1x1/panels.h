// Panels: small dense buffers that hold a tile of a state. If channels are neighbours in memory
// (PIXEL_ROWS), the rows of a panel are pixels; otherwise they are channels.
#pragma once

#include <algorithm>
#include <vector>

#include "../common/tiling.h"
#include "../coupling/tile_arithmetic.h"
#include "conv1x1.h"
#include "matrix_product.h"

namespace mflow {

constexpr int kPanel = 4 * kTile;  // elements, with rows padded to whole vectors

// The tiles of a state. Each has all channels of some pixels. States without spatial axes (`vectors`)
// have one pixel in each sample, so the whole batch is treated as the pixels of one sample.
template <bool PIXEL_ROWS, class A>
struct Grid {
    bool vectors;
    int channels, first;
    int64_t stride;  // between a panel's rows
    Tiling tiling;

    template <class Problem>
    explicit Grid(const Problem& p) {
        vectors = p.shape.pixels == 1;
        channels = static_cast<int>(p.shape.channels);
        first = static_cast<int>(p.first);
        const int64_t samples = vectors ? 1 : p.shape.samples;
        const int64_t pixels = vectors ? p.shape.samples : p.shape.pixels;
        int64_t width = std::min<int64_t>(kTile / (channels - first), kPanel / whole_vectors<A>(channels));
        const int64_t unit = PIXEL_ROWS ? 6 : kLanes<A>;  // pixels that `product` takes at once
        width = std::min(pixels, width / unit * unit);
        stride = whole_vectors<A>(PIXEL_ROWS ? channels : width);
        tiling = PIXEL_ROWS ? Tiling(samples, pixels, channels, width, channels)
                            : Tiling(samples, channels, pixels, channels, width);
    }

    Tile tile(int64_t index) const { return tiling.tile(index); }
    static int64_t first_pixel(const Tile& t) { return PIXEL_ROWS ? t.outer : t.inner; }
    static int pixels(const Tile& t) { return PIXEL_ROWS ? t.rows : t.width; }

    // The part of a tile that begins with `channel`, in memory and in a panel.
    MFLOW_INLINE Part<A> in_memory(const StateView& view, const Tile& t, int channel) const {
        const int64_t pixel = vectors ? view.sample : view.pixel;
        const int64_t sample = vectors ? 0 : view.sample;
        A* data = static_cast<A*>(view.data);
        data += t.sample * sample + channel * view.channel + first_pixel(t) * pixel;
        return PIXEL_ROWS ? Part<A>{data, pixel, view.channel, false}
                          : Part<A>{data, view.channel, pixel, false};
    }
    MFLOW_INLINE Part<A> in_panel(A* panel, int channel) const {
        return {panel + (PIXEL_ROWS ? channel : channel * stride), stride, 1, false};
    }
    MFLOW_INLINE int rows(const Tile& t, int channels) const {
        return PIXEL_ROWS ? pixels(t) : channels;
    }
    MFLOW_INLINE int columns(const Tile& t, int channels) const {
        return PIXEL_ROWS ? channels : pixels(t);
    }
    // Copies `channels` channels of a tile.
    MFLOW_INLINE void move(const Tile& t, int channels, Part<A> from, Part<A> to) const {
        copy<A>(rows(t, channels), columns(t, channels), from, to);
    }
    MFLOW_INLINE Part<A> dense(const Tile& t, int channels, A* data) const {
        return {data, columns(t, channels), 1, true};
    }
};

template <class A>
A at(const Matrix& m, int64_t row, int64_t column) {
    return static_cast<const A*>(m.data)[row * m.row + column * m.column];
}

// A matrix as `product` reads it. If rows are pixels, it is transposed and padded to whole vectors.
template <bool PIXEL_ROWS, class A>
class PackedMatrix {
public:
    PackedMatrix(const Matrix& m, int channels) : matrix_(m), channels_(channels) {
        if (!PIXEL_ROWS || !m.data) return;
        packed_.resize(channels * whole_vectors<A>(channels));
        A* row = packed_.data();
        for (int c = 0; c < channels; ++c, row += whole_vectors<A>(channels)) {
            for (int o = 0; o < channels; ++o) row[o] = at<A>(m, o, c);
        }
    }
    explicit operator bool() const { return matrix_.data; }

    template <class Begin>
    MFLOW_INLINE void operator()(const Grid<PIXEL_ROWS, A>& g, const Tile& t, const A* in, A* out,
                                 const Begin& begin) const {
        const int rows = g.rows(t, channels_), columns = g.columns(t, channels_);
        if (PIXEL_ROWS) {
            product<A>(rows, columns, channels_, {in, g.stride, 1}, packed_.data(), g.stride, out,
                       g.stride, begin);
        } else {
            const A* data = static_cast<const A*>(matrix_.data);
            const Operand<A> weight = {data, matrix_.row, matrix_.column};
            product<A>(rows, columns, channels_, weight, in, g.stride, out, g.stride, begin);
        }
    }

private:
    Matrix matrix_;
    int channels_;
    std::vector<A> packed_;
};

// z and y are the panels before and after a product, g is the gradient of y, and `turned` is z with pixels
// as rows. Padding takes part in the arithmetic although its results are dropped, so it is zero: denormals
// would be slow.
template <class A>
struct Panels {
    A z[kPanel] = {}, g[kPanel] = {}, turned[kPanel] = {};
    A y[kPanel];
    CouplingBuffers<A> half;
};

}  // namespace mflow
