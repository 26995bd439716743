// bfloat16 on the CPU: the upper 16 bits of a float32. The conversions have no branches, so that loops
// over them vectorize.
#pragma once

#include <cstdint>

#include "../common/loops.h"

namespace mflow {

struct BFloat16 {
    uint16_t bits;
};

// The value in the type A that sums it.
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

// The sum v in the type T of the result.
template <class T>
struct Narrow {
    template <class A>
    static MFLOW_INLINE T from(A v) { return static_cast<T>(v); }
};
template <>
struct Narrow<BFloat16> {
    // Rounds to nearest; a tie goes to the even neighbour.
    static MFLOW_INLINE BFloat16 from(float v) {
        const uint32_t bits = bit_cast<uint32_t>(v);
        const uint32_t kept = bits >> 16, dropped = bits & 0xffffu;
        // 0x8000 is half of the last place that is kept. A carry into the exponent is right, too.
        const uint32_t up = dropped + (kept & 1u) > 0x8000u;
        const uint32_t quiet_nan = 0x7fc0u;
        return {static_cast<uint16_t>(v == v ? kept + up : quiet_nan)};
    }
};

}  // namespace mflow
