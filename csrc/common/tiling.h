// How the CPU loops cut states into tiles.
#pragma once

#include <algorithm>
#include <cstdint>

namespace mflow {

constexpr int kTile = 1024;  // elements of a full tile

// A tile of one sample: `rows` rows that begin with row `outer`. Each has `width` elements and begins
// with element `inner`.
struct Tile {
    int64_t sample, outer, inner;
    int rows, width;
    int size() const { return rows * width; }
};

// Cuts samples of `outer` rows with `inner` elements each into tiles of `rows` by `width` elements. Tiles
// at the ends may be smaller. Tiles follow one another along a row, then down the rows, then through the
// samples. The order depends on shapes alone, so sums added in this order have the same bits with
// any number of threads.
class Tiling {
public:
    Tiling() = default;
    Tiling(int64_t samples, int64_t outer, int64_t inner, int64_t rows, int64_t width)
        : samples_(samples),
          outer_(outer),
          inner_(inner),
          rows_(rows),
          width_(width),
          across_((outer + rows - 1) / rows),
          along_((inner + width - 1) / width) {}

    int64_t along() const { return along_; }  // tiles that share a row
    int64_t tiles_per_sample() const { return across_ * along_; }
    int64_t tiles() const { return samples_ * tiles_per_sample(); }

    Tile tile(int64_t index) const {
        Tile t;
        t.inner = index % along_ * width_;
        t.outer = index / along_ % across_ * rows_;
        t.sample = index / along_ / across_;
        t.width = static_cast<int>(std::min(width_, inner_ - t.inner));
        t.rows = static_cast<int>(std::min(rows_, outer_ - t.outer));
        return t;
    }

private:
    int64_t samples_ = 0, outer_ = 0, inner_ = 0, rows_ = 1, width_ = 1, across_ = 0, along_ = 0;
};

}  // namespace mflow
