// Reads and writes a tile of a sample in any layout, as a dense array of the type that sums it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/loops.h"
#include "bfloat16.h"
#include "masked_penalty.h"

namespace mflow {

// Walks the elements of a sample in a view, from `begin` on, row by row along the innermost axis.
class Rows {
public:
    MFLOW_INLINE Rows(const Problem& p, const View& view, uint32_t begin) : p_(p), view_(view) {
        for (int a = 0; a < p.axes; ++a) {
            at_[a] = begin % p.extent[a];
            begin /= p.extent[a];
            offset_ += at_[a] * view.stride[a];
        }
    }
    MFLOW_INLINE int64_t offset() const { return offset_; }
    MFLOW_INLINE int left() const { return static_cast<int>(p_.extent[0] - at_[0]); }
    // Number of whole rows that follow at intervals of stride[1]; 0 within a row.
    MFLOW_INLINE int whole() const {
        return p_.axes > 1 && at_[0] == 0 ? static_cast<int>(p_.extent[1] - at_[1]) : 0;
    }
    // Advances along `axis` by `count`, which must not go past the end of the axis.
    MFLOW_INLINE void advance(int axis, int count) {
        at_[axis] += count;
        offset_ += count * view_.stride[axis];
        for (int a = axis; a + 1 < p_.axes && at_[a] == p_.extent[a]; ++a) {
            offset_ += view_.stride[a + 1] - at_[a] * view_.stride[a];
            at_[a] = 0;
            ++at_[a + 1];
        }
    }

private:
    const Problem& p_;
    const View& view_;
    uint32_t at_[kMaxAxes] = {};
    int64_t offset_ = 0;
};

constexpr int kShortRow = 64;  // rows up to this length are read column by column, many rows at a time
constexpr int kSlack = 8;      // number of values that may be written past the end of a tile's buffer

// Copies the next `count` values of `rows`, in any layout, to `buffer`.
template <class S, class A>
void gather(const Problem& p, const View& view, const S* base, Rows rows, int count, A* buffer) {
    const int64_t stride = view.stride[0], across = view.stride[1];
    const int width = static_cast<int>(p.extent[0]);
    for (int done = 0; done < count;) {
        const S* row = base + rows.offset();
        A* out = buffer + done;
        if (const int many = std::min(rows.whole(), (count - done) / width);
            width <= kShortRow && many > 0) {
            if (stride == 0) {  // write whole vectors; the next row overwrites the excess
                for (int r = 0; r < many; ++r) {
                    const A value = widen<A>(row[r * across]);
                    for (int c = 0; c < width; c += kSlack) {
                        for (int i = 0; i < kSlack; ++i) out[r * width + c + i] = value;
                    }
                }
            } else {
                for (int c = 0; c < width; ++c) {
                    for (int r = 0; r < many; ++r) {
                        out[r * width + c] = widen<A>(row[c * stride + r * across]);
                    }
                }
            }
            rows.advance(1, many);
            done += many * width;
            continue;
        }
        const int length = std::min(count - done, rows.left());
        if (stride == 0) {
            std::fill_n(out, length, widen<A>(*row));
        } else if (stride == 1) {
            for (int i = 0; i < length; ++i) out[i] = widen<A>(row[i]);
        } else {
            for (int i = 0; i < length; ++i) out[i] = widen<A>(row[i * stride]);
        }
        rows.advance(0, length);
        done += length;
    }
}

// Writes sign * values to `count` elements of a sample from `begin` on, in any layout.
template <class T, class A>
void scatter(const Problem& p, const View& view, T* base, uint32_t begin, int count,
             const A* values, A sign) {
    Rows rows(p, view, begin);
    for (int done = 0; done < count;) {
        const int length = std::min(count - done, rows.left());
        T* row = base + rows.offset();
        for (int i = 0; i < length; ++i) {
            row[i * view.stride[0]] = Narrow<T>::from(sign * values[done + i]);
        }
        rows.advance(0, length);
        done += length;
    }
}

// `count` values of a sample from `begin` on, in the accumulator's type. Returns their own address if
// they are contiguous and have that type; otherwise copies them to `buffer`.
template <class S, class A>
MFLOW_INLINE const A* read(const Problem& p, const View& view, int64_t sample, uint32_t begin,
                           int count, A* buffer) {
    const S* base = static_cast<const S*>(view.data) + sample * view.sample_stride;
    if (view.dense) {
        base += begin;
    } else {
        const Rows rows(p, view, begin);
        if (view.stride[0] != 1 || rows.left() < count) {
            gather<S, A>(p, view, base, rows, count, buffer);
            return buffer;
        }
        base += rows.offset();
    }
    if (std::is_same<S, A>::value) return reinterpret_cast<const A*>(base);
#pragma omp simd
    for (int i = 0; i < count; ++i) buffer[i] = widen<A>(base[i]);
    return buffer;
}

// Writes sign * values through the view.
template <class T, class A>
MFLOW_INLINE void write(const Problem& p, const View& view, int64_t sample, uint32_t begin,
                        int count, const A* values, A sign) {
    T* base = static_cast<T*>(view.data) + sample * view.sample_stride;
    if (!view.dense) return scatter<T, A>(p, view, base, begin, count, values, sign);
    base += begin;
#pragma omp simd
    for (int i = 0; i < count; ++i) base[i] = Narrow<T>::from(sign * values[i]);
}

}  // namespace mflow
