// Reads the raw numbers of a tile's splines into dense buffers, and writes their gradients. A *lane* is an
// element of the tile.
#pragma once

#include <cstring>
#include <type_traits>

#include "../common/grid.h"
#include "spline.h"

namespace mflow {

constexpr int kLanes = 128;  // elements of a full tile

// The numbers `index` of a tile's elements: the view of params in which channels are the state's.
inline StateView numbers_of(const StateView& params, const SplineOptions& o, int index, bool is_double) {
    StateView view = params;
    view.data = static_cast<char*>(params.data) + index * params.channel * (is_double ? 8 : 4);
    view.channel = params.channel * o.numbers();
    return view;
}

// Whether the numbers of a tile's elements follow one another, and one stride leads from element to element.
template <class A>
MFLOW_INLINE bool element_by_element(const Tile& t, const StateView& params, const Part<A>& first) {
    return params.channel == 1 && (t.rows == 1 || first.row == t.width * first.step);
}

// out[j * b + i] = in[i * a + j] for i < n and j < count, or the other way round if BACK.
template <bool BACK, class A>
MFLOW_INLINE void transpose(int n, int count, A* in, int64_t a, A* out, int64_t b) {
    typedef A Four __attribute__((vector_size(4 * sizeof(A))));
    typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Index __attribute__((vector_size(4 * sizeof(A))));
    const int whole_n = n / 4 * 4, whole_count = count / 4 * 4;
    for (int j = 0; j < whole_count; j += 4) {
        for (int i = 0; i < whole_n; i += 4) {
            A* const from = BACK ? out + j * b + i : in + i * a + j;
            A* const to = BACK ? in + i * a + j : out + j * b + i;
            const int64_t row = BACK ? b : a, row_to = BACK ? a : b;
            Four v0, v1, v2, v3;
            std::memcpy(&v0, from, sizeof(Four));
            std::memcpy(&v1, from + row, sizeof(Four));
            std::memcpy(&v2, from + 2 * row, sizeof(Four));
            std::memcpy(&v3, from + 3 * row, sizeof(Four));
            const Four low0 = __builtin_shuffle(v0, v1, Index{0, 4, 1, 5});
            const Four high0 = __builtin_shuffle(v0, v1, Index{2, 6, 3, 7});
            const Four low1 = __builtin_shuffle(v2, v3, Index{0, 4, 1, 5});
            const Four high1 = __builtin_shuffle(v2, v3, Index{2, 6, 3, 7});
            const Four rows[4] = {__builtin_shuffle(low0, low1, Index{0, 1, 4, 5}),
                                  __builtin_shuffle(low0, low1, Index{2, 3, 6, 7}),
                                  __builtin_shuffle(high0, high1, Index{0, 1, 4, 5}),
                                  __builtin_shuffle(high0, high1, Index{2, 3, 6, 7})};
            for (int r = 0; r < 4; ++r) std::memcpy(to + r * row_to, &rows[r], sizeof(Four));
        }
    }
    for (int i = 0; i < n; ++i) {
        for (int j = i < whole_n ? whole_count : 0; j < count; ++j) {
            if (BACK) {
                in[i * a + j] = out[j * b + i];
            } else {
                out[j * b + i] = in[i * a + j];
            }
        }
    }
}

// Reads `count` numbers of each element, beginning with number `first`: one row of kLanes for each.
template <class A>
MFLOW_INLINE void read_numbers(const Spline& p, const HalfGrid& g, const Tile& t, int first, int count, A* rows) {
    const Part<A> from = part<A>(g, t, numbers_of(p.params, p.options, first, sizeof(A) == 8));
    if (element_by_element(t, p.params, from)) {
        transpose<false, A>(t.size(), count, from.data, from.step, rows, kLanes);
        return;
    }
    for (int j = 0; j < count; ++j) {
        const StateView number = numbers_of(p.params, p.options, first + j, sizeof(A) == 8);
        copy<A>(t.rows, t.width, part<A>(g, t, number), {rows + j * kLanes, t.width, 1, true});
    }
}

// Writes gradients of numbers, as `read_numbers` reads numbers.
template <class A>
MFLOW_INLINE void write_numbers(const Spline& p, const HalfGrid& g, const Tile& t, int first, int count,
                                A* rows) {
    const Part<A> to = part<A>(g, t, numbers_of(p.dparams, p.options, first, sizeof(A) == 8));
    if (element_by_element(t, p.dparams, to)) {
        transpose<true, A>(t.size(), count, to.data, to.step, rows, kLanes);
        return;
    }
    for (int j = 0; j < count; ++j) {
        const StateView number = numbers_of(p.dparams, p.options, first + j, sizeof(A) == 8);
        copy<A>(t.rows, t.width, {rows + j * kLanes, t.width, 1, true}, part<A>(g, t, number));
    }
}

}  // namespace mflow
