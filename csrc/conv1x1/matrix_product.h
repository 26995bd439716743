// Small matrix products on the CPU, one vector of columns at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/loops.h"

namespace mflow {

// A vector of 64 bytes: one register of AVX-512, two of AVX2. It needs only the alignment of an A.
template <class A>
struct Vector;
template <>
struct Vector<float> {
    typedef float type __attribute__((vector_size(64), aligned(4), may_alias));
};
template <>
struct Vector<double> {
    typedef double type __attribute__((vector_size(64), aligned(8), may_alias));
};
template <class A>
constexpr int kLanes = 64 / sizeof(A);

// `count` rounded up to whole vectors.
template <class A>
constexpr int64_t whole_vectors(int64_t count) {
    return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// A matrix whose element (i, k) is data[i * row + k * step].
template <class A>
struct Operand {
    const A* data;
    int64_t row, step;
};

// Computes ROWS rows of `product` in registers. AVX2 has registers for 6 rows.
template <int ROWS, class A, class Begin>
MFLOW_INLINE void product_rows(int depth, const Operand<A>& a, const A* b, int64_t b_row, A* out,
                               int64_t out_row, const Begin& begin) {
    using V = typename Vector<A>::type;
    V sums[ROWS];
    for (int i = 0; i < ROWS; ++i) begin(i, sums[i]);
    const A* left = a.data;
    for (int k = 0; k < depth; ++k, left += a.step, b += b_row) {
        const V right = *reinterpret_cast<const V*>(b);
        for (int i = 0; i < ROWS; ++i) sums[i] += left[i * a.row] * right;
    }
    for (int i = 0; i < ROWS; ++i) *reinterpret_cast<V*>(out + i * out_row) = sums[i];
}

// out[row][column] = begin + sum over k < depth of a(row, k) * b[k][column]. The number of columns is
// rounded up to whole vectors, so the rows of b and out must have room for them. begin(row, column, sum)
// sets the vector that the sum starts from.
template <class A, class Begin>
MFLOW_INLINE void product(int rows, int columns, int depth, const Operand<A>& a, const A* b,
                          int64_t b_row, A* out, int64_t out_row, const Begin& begin) {
    using V = typename Vector<A>::type;
    for (int column = 0; column < columns; column += kLanes<A>) {
        int row = 0;
        const auto next = [&](auto count) __attribute__((always_inline)) {
            const Operand<A> from = {a.data + row * a.row, a.row, a.step};
            const auto begin_row = [&](int i, V& sum) __attribute__((always_inline)) {
                begin(row + i, column, sum);
            };
            product_rows<count.value, A>(depth, from, b + column, b_row,
                                         out + row * out_row + column, out_row, begin_row);
            row += count.value;
        };
        while (row + 6 <= rows) next(std::integral_constant<int, 6>{});
        if (row + 4 <= rows) next(std::integral_constant<int, 4>{});
        if (row + 2 <= rows) next(std::integral_constant<int, 2>{});
        if (row < rows) next(std::integral_constant<int, 1>{});
    }
}

}  // namespace mflow
