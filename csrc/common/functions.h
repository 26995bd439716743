// exp and log for loops that vectorize. float64 uses libm. float32 uses polynomials without branches,
// accurate to a few units in the last place: exp that of Cephes (expf), log the series of the inverse
// hyperbolic tangent. NaN and infinities pass through.
#pragma once

#include <cmath>
#include <cstdint>

#include "loops.h"

namespace mflow {

// e^x = two * two2 * (1 + less), with less = e^r - 1 for the remainder |r| <= log(2) / 2. The power of two
// is split into two factors, so that a subnormal result is rounded only once.
struct ExpParts {
    float less, two, two2;
};

MFLOW_INLINE ExpParts exp_parts(float x) {
    x = x < -104.0f ? -104.0f : x;  // e^-104 is 0
    x = x > 89.0f ? 89.0f : x;      // e^89 is infinite
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
    const float shifted = x * 1.44269504088896341f + 12582912.0f;
    const float whole = shifted - 12582912.0f;
    const int32_t n = static_cast<int32_t>(bit_cast<uint32_t>(shifted) - 0x4b400000u);
    float r = x - whole * 0.693359375f;  // log 2 has two parts; the first is exact in few bits
    r = r + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const int32_t half = n >> 1;
    const auto power = [](int32_t k) {
        return bit_cast<float>(static_cast<uint32_t>(k + 127) << 23);
    };
    return {p * r * r + r, power(half), power(n - half)};
}

MFLOW_INLINE float exp_of(float x) {
    const ExpParts e = exp_parts(x);
    return (1.0f + e.less) * e.two * e.two2;
}
MFLOW_INLINE double exp_of(double x) { return std::exp(x); }

// 2 atanh(t) for |t| <= 1/3: the logarithm of (1 + t) / (1 - t).
MFLOW_INLINE float twice_atanh(float t) {
    const float q = t * t;
    float p = 2.0f / 15;
    p = p * q + 2.0f / 13;
    p = p * q + 2.0f / 11;
    p = p * q + 2.0f / 9;
    p = p * q + 2.0f / 7;
    p = p * q + 2.0f / 5;
    p = p * q + 2.0f / 3;
    return p * q * t + 2.0f * t;
}

// For -1/2 <= x <= 1.
MFLOW_INLINE float log1p_of(float x) { return twice_atanh(x / (2.0f + x)); }
MFLOW_INLINE double log1p_of(double x) { return std::log1p(x); }

// For x >= 0.
MFLOW_INLINE float log_of(float x) {
    const bool subnormal = x < 0x1p-126f;
    const uint32_t bits = bit_cast<uint32_t>(x * (subnormal ? 0x1p24f : 1.0f));
    // The mantissa between sqrt(1/2) and sqrt(2).
    const uint32_t above = bits - 0x3f3504f3u;
    const float m = bit_cast<float>((above & 0x007fffffu) + 0x3f3504f3u);
    const float n = static_cast<float>(static_cast<int32_t>(above) >> 23);
    const float whole = subnormal ? n - 24.0f : n;
    const float y = twice_atanh((m - 1.0f) / (m + 1.0f)) + whole * -2.12194440e-4f;
    const float log = y + whole * 0.693359375f;
    return x - x == 0.0f ? log : x;  // infinity and NaN
}
MFLOW_INLINE double log_of(double x) { return std::log(x); }

}  // namespace mflow
