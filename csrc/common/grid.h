// The tiles of a half of a state, and how a tile of one tensor is read and written.
#pragma once

#include <algorithm>
#include <cstring>

#include "loops.h"
#include "state_view.h"
#include "tiling.h"

namespace mflow {

// A tile of one tensor in memory.
template <class A>
struct Part {
    A* data;
    int64_t row, step;  // strides from row to row, and within a row
    bool dense;         // whether its elements follow one another without gaps
};

template <class A>
MFLOW_INLINE void copy(int rows, int width, Part<A> from, Part<A> to) {
    if (from.step != 1 || to.step != 1 || width < 4) {
        for (int i = 0; i < width; ++i) {
            const A* in = from.data + i * from.step;
            A* out = to.data + i * to.step;
            for (int r = 0; r < rows; ++r) out[r * to.row] = in[r * from.row];
        }
        return;
    }
    for (int r = 0; r < rows; ++r, from.data += from.row, to.data += to.row) {
        in_blocks(width, [&](auto length, int64_t i) {
            std::memcpy(to.data + i, from.data + i, length.value * sizeof(A));
        });
    }
}

// The tiles of a half. Their rows run along the axis that is contiguous in memory, pixels or channels.
// For states without spatial axes (`vectors`), the rows of a tile are samples.
struct HalfGrid {
    bool pixels_inside, vectors;
    Tiling tiling;

    // `like` is the state whose layout decides, and `tile` the number of elements of a full tile.
    HalfGrid(const Shape& s, const StateView& like, int64_t tile) {
        vectors = s.pixels == 1;
        pixels_inside = !vectors && like.pixel == 1;
        const int64_t outer = vectors ? s.samples : pixels_inside ? s.channels : s.pixels;
        const int64_t inner = pixels_inside ? s.pixels : s.channels;
        const int64_t width = std::min<int64_t>(inner, tile);
        const int64_t rows = std::min<int64_t>(outer, tile / width);
        tiling = Tiling(vectors ? 1 : s.samples, outer, inner, rows, width);
    }
    // Number of sums of log s of a sample: one for each of its tiles.
    int64_t sums() const { return vectors ? tiling.along() : tiling.tiles_per_sample(); }
};

template <class A>
MFLOW_INLINE Part<A> part(const HalfGrid& g, const Tile& t, const StateView& view) {
    const int64_t row = g.vectors ? view.sample : g.pixels_inside ? view.channel : view.pixel;
    const int64_t step = g.pixels_inside ? view.pixel : view.channel;
    A* data = static_cast<A*>(view.data) + t.sample * view.sample + t.outer * row + t.inner * step;
    return {data, row, step, step == 1 && (row == t.width || t.rows == 1)};
}

template <class A>
MFLOW_INLINE const A* read(const HalfGrid& g, const Tile& t, const StateView& view, A* buffer) {
    const Part<A> from = part<A>(g, t, view);
    if (from.dense) return from.data;
    copy<A>(t.rows, t.width, from, {buffer, t.width, 1, true});
    return buffer;
}

// Memory for results: the tile itself if it is dense, otherwise the buffer, which `write` copies later.
template <class A>
MFLOW_INLINE A* room(const HalfGrid& g, const Tile& t, const StateView& view, A* buffer) {
    const Part<A> to = part<A>(g, t, view);
    return to.dense ? to.data : buffer;
}
template <class A>
MFLOW_INLINE void write(const HalfGrid& g, const Tile& t, const StateView& view, A* values) {
    const Part<A> to = part<A>(g, t, view);
    if (to.data != values) copy<A>(t.rows, t.width, {values, t.width, 1, true}, to);
}

}  // namespace mflow
