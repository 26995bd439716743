// Values of 16 bits on the CPU, converted to and from the type that sums them without branches, so that
// loops over the conversions vectorize.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/loops.h"

namespace mflow {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class A>
MFLOW_INLINE A widen(float v) { return v; }
template <class A>
MFLOW_INLINE A widen(double v) { return static_cast<A>(v); }
template <class A>
MFLOW_INLINE A widen(uint8_t v) { return static_cast<A>(static_cast<int>(v)); }
template <class A>
MFLOW_INLINE A widen(BFloat16 v) {
    return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}
// All cases of a conversion are computed and one is selected, so that loops vectorize.
template <class A>
MFLOW_INLINE A widen(Half v) {
    const int32_t half = static_cast<int16_t>(v.bits);
    const uint32_t exponent = half & 0x7c00;
    // Move sign and mantissa to their places in a float. The exponent's bias is 15 in a half and 127 in
    // a float. The largest exponent, that of infinity and NaN, is 31 in a half and 255 in a float.
    const uint32_t placed = static_cast<uint32_t>(half) << 13 & 0x8fffe000u;
    const uint32_t raise = exponent == 0x7c00u ? 255u - 31u : 127u - 15u;
    // A subnormal half counts units of 2^-24, the last place of a float from 0.5 to 1.
    const float units = bit_cast<float>((half & 0x3ff) | 0x3f000000) - 0.5f;
    const uint32_t subnormal = bit_cast<uint32_t>(units) | (placed & 0x80000000u);
    return bit_cast<float>(exponent == 0 ? subnormal : placed + (raise << 23));
}

template <class T>
struct Narrow {
    template <class A>
    static MFLOW_INLINE T from(A v) { return static_cast<T>(v); }
};
template <>
struct Narrow<BFloat16> {
    static MFLOW_INLINE BFloat16 from(float v) {
        const uint32_t bits = bit_cast<uint32_t>(v);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
    }
};
// Rounds to nearest even.
template <>
struct Narrow<Half> {
    static MFLOW_INLINE Half from(float v) {
        const uint32_t bits = bit_cast<uint32_t>(v);
        const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
        // Magnitudes from 2^16 on become infinity in a half. Drop 13 bits of the mantissa, and lower
        // the exponent's bias from 127 to 15.
        const int32_t finite = std::min(magnitude, 0x47800000);
        const int32_t odd = finite >> 13 & 1;
        const int32_t normal = (finite + (0xfff - ((127 - 15) << 23)) + odd) >> 13;
        // Below 2^-14 a half counts units of 2^-24, the last place of a float from 0.5 to 1.
        const int32_t subnormal = bit_cast<int32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
        const int32_t half = magnitude < 0x38800000 ? subnormal : normal;
        const int32_t nan = magnitude > 0x7f800000 ? 0x7e00 : 0;
        return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | half | nan)};
    }
};

}  // namespace mflow
