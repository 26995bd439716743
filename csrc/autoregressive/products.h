// Products of weights with the lanes of a block of samples. Each unit is a row of kBlock lanes.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/loops.h"
#include "autoregressive.h"

namespace mflow {

constexpr int kBlock = 64;  // samples of a block

// A vector of 64 bytes: one register of AVX-512, two of AVX2.
template <class A>
struct Vector {
    typedef A type __attribute__((vector_size(64), aligned(sizeof(A)), may_alias));
    static constexpr int lanes = 64 / sizeof(A);
};

// ROWS rows and VECTORS vectors of `product`, summed in registers.
template <int ROWS, int VECTORS, class A>
MFLOW_INLINE void product_tile(int64_t depth, const A* weight, int64_t stride, const A* bias, const A* in, A* out) {
    using V = typename Vector<A>::type;
    constexpr int lanes = Vector<A>::lanes;
    V sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = V{} + bias[r];
    }
    for (int64_t k = 0; k < depth; ++k, in += kBlock) {
        for (int v = 0; v < VECTORS; ++v) {
            const V right = *reinterpret_cast<const V*>(in + v * lanes);
            for (int r = 0; r < ROWS; ++r) sums[r][v] += weight[r * stride + k] * right;
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<V*>(out + r * kBlock + v * lanes) = sums[r][v];
    }
}

// out[r][lane] = bias[r] + sum over k < depth of weight[r * stride + k] in[k][lane].
template <class A>
MFLOW_INLINE void product(int64_t rows, int64_t depth, const A* weight, int64_t stride, const A* bias, const A* in,
                          A* out) {
    constexpr int lanes = Vector<A>::lanes;
    const auto tiles = [&](auto count, auto vectors) __attribute__((always_inline)) {
        for (int i = 0; i < kBlock; i += lanes * vectors.value) {
            product_tile<count.value, vectors.value, A>(depth, weight, stride, bias, in + i, out + i);
        }
        rows -= count.value;
        weight += count.value * stride;
        bias += count.value;
        out += count.value * kBlock;
    };
    while (rows >= 4) tiles(std::integral_constant<int, 4>{}, std::integral_constant<int, 2>{});
    while (rows >= 2) tiles(std::integral_constant<int, 2>{}, std::integral_constant<int, 4>{});
    if (rows) tiles(std::integral_constant<int, 1>{}, std::integral_constant<int, 4>{});
}

// gradient[k] += sum over rows r from `begin` to `end` of weight[r][k] * from[r], for the rows k of `degree`.
template <class A>
MFLOW_INLINE void pull(const MaskedOperation& o, int64_t degree, const A* weight, const A* from, int64_t first,
                       int64_t last, A* gradient) {
    using V = typename Vector<A>::type;
    constexpr int lanes = Vector<A>::lanes;
    const int64_t begin = o.starts[degree], end = o.units;
    const auto tile = [&](auto rows, int64_t k) __attribute__((always_inline)) {
        constexpr int ROWS = decltype(rows)::value, VECTORS = 4 / ROWS < 1 ? 1 : 4 / ROWS;
        for (int i = 0; i < kBlock; i += lanes * VECTORS) {
            V sums[ROWS][VECTORS];
            for (int r = 0; r < ROWS; ++r) {
                for (int v = 0; v < VECTORS; ++v) {
                    sums[r][v] = *reinterpret_cast<const V*>(gradient + (k + r) * kBlock + i + v * lanes);
                }
            }
            for (int64_t row = begin; row < end; ++row) {
                const A* const w = weight + row * o.inputs + k;
                for (int v = 0; v < VECTORS; ++v) {
                    const V right = *reinterpret_cast<const V*>(from + row * kBlock + i + v * lanes);
                    for (int r = 0; r < ROWS; ++r) sums[r][v] += w[r] * right;
                }
            }
            for (int r = 0; r < ROWS; ++r) {
                for (int v = 0; v < VECTORS; ++v) {
                    *reinterpret_cast<V*>(gradient + (k + r) * kBlock + i + v * lanes) = sums[r][v];
                }
            }
        }
    };
    int64_t k = first;
    for (; k + 4 <= last; k += 4) tile(std::integral_constant<int, 4>{}, k);
    for (; k + 2 <= last; k += 2) tile(std::integral_constant<int, 2>{}, k);
    for (; k < last; ++k) tile(std::integral_constant<int, 1>{}, k);
}

// sums[r][k] += sum over lanes of gradient[r][lane] * in[k][lane], for up to four rows r and columns k < depth.
template <class A>
MFLOW_INLINE void add_outer(int64_t rows, int64_t depth, const A* gradient, const A* in_by_lane, int64_t stride, A* sums,
                            int64_t sums_stride) {
    using V = typename Vector<A>::type;
    constexpr int lanes = Vector<A>::lanes;
    const auto tile = [&](auto count, auto vectors, int64_t k) __attribute__((always_inline)) {
        constexpr int ROWS = decltype(count)::value, VECTORS = decltype(vectors)::value;
        V total[ROWS][VECTORS];
        for (int i = 0; i < ROWS; ++i) {
            for (int v = 0; v < VECTORS; ++v) total[i][v] = V{};
        }
        for (int lane = 0; lane < kBlock; ++lane) {
            for (int v = 0; v < VECTORS; ++v) {
                const V right = *reinterpret_cast<const V*>(in_by_lane + lane * stride + k + v * lanes);
                for (int i = 0; i < ROWS; ++i) total[i][v] += gradient[i * kBlock + lane] * right;
            }
        }
        for (int i = 0; i < ROWS; ++i) {
            for (int v = 0; v < VECTORS; ++v) {
                const int64_t first = k + v * lanes;
                const int valid = static_cast<int>(std::min<int64_t>(lanes, depth - first));
                for (int j = 0; j < valid; ++j) sums[i * sums_stride + first + j] += total[i][v][j];
            }
        }
    };
    using std::integral_constant;
    for (int64_t k = 0; k < depth; k += 2 * lanes) {
        const bool two = k + lanes < depth;
        if (rows == 4 && two) {
            tile(integral_constant<int, 4>{}, integral_constant<int, 2>{}, k);
        } else if (rows == 4) {
            tile(integral_constant<int, 4>{}, integral_constant<int, 1>{}, k);
        } else {
            A* const first = sums;
            const A* const own = gradient;
            for (int64_t r = 0; r < rows; ++r, sums += sums_stride, gradient += kBlock) {
                tile(integral_constant<int, 1>{}, integral_constant<int, 1>{}, k);
                if (two) tile(integral_constant<int, 1>{}, integral_constant<int, 1>{}, k + lanes);
            }
            sums = first;
            gradient = own;
        }
    }
}

}  // namespace mflow
