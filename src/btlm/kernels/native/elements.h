// Elements shared by all kernels of an instruction set: bf16, ends of rows, exp and SiLU. Include the lanes first.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define BTLM_UNROLL _Pragma("GCC unroll 16")
#define BTLM_INLINE inline __attribute__((always_inline))  // keeps sums in registers that the caller declares

namespace {

using namespace btlm;
using lanes::B;
using lanes::F;
using lanes::I;

constexpr float SMALLEST = 1e-30f;  // smaller values are stored as 0: their reciprocal would overflow

// Numbers

inline float from_bf16(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
}

inline uint32_t bits_of(float x) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    return word;
}

inline uint16_t to_bf16(float x) {  // nearest, ties to even
    const uint32_t word = bits_of(x);
    if ((word & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((word >> 16) | 64);  // NaN stays NaN
    return static_cast<uint16_t>((word + 0x7FFFu + ((word >> 16) & 1)) >> 16);
}

inline uint16_t to_bf16_above(float x) { return static_cast<uint16_t>((bits_of(x) + 0xFFFFu) >> 16); }  // x >= 0

inline int32_t load_quad(const void* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// Up to 16 elements, fewer at the end of a row

inline F load_some(const float* p, int64_t n) {
    if (n >= LANES) return lanes::load(p);
    float part[LANES] = {};
    std::memcpy(part, p, static_cast<size_t>(n) * sizeof *p);
    return lanes::load(part);
}

inline F load_some(const uint16_t* p, int64_t n) {
    if (n >= LANES) return lanes::load_bf16(p);
    uint16_t part[LANES] = {};
    std::memcpy(part, p, static_cast<size_t>(n) * sizeof *p);
    return lanes::load_bf16(part);
}

inline void store_some(float* p, F x, int64_t n) {
    if (n >= LANES) return lanes::store(p, x);
    float part[LANES];
    lanes::store(part, x);
    std::memcpy(p, part, static_cast<size_t>(n) * sizeof *p);
}

// Functions

// exp(x), exactly 0 for x at most -87: 2**n times Taylor's polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2], where its remainder
// is below 2e-7, about the spacing of floats.
inline F exp(F x) {
    using namespace lanes;
    const F clamped = lanes::min(lanes::max(x, set(-87.0f)), set(88.0f));
    const F n = lanes::round(mul(clamped, set(1.44269504f)));
    F r = lanes::fma(n, set(-0.693359375f), clamped);  // ln 2 in two parts; the product of n and the first is exact
    r = lanes::fma(n, set(2.12194440e-4f), r);
    F p = set(1.0f / 720);
    p = lanes::fma(p, r, set(1.0f / 120));
    p = lanes::fma(p, r, set(1.0f / 24));
    p = lanes::fma(p, r, set(1.0f / 6));
    p = lanes::fma(p, r, set(0.5f));
    p = lanes::fma(p, r, set(1.0f));
    p = lanes::fma(p, r, set(1.0f));
    return keep_above(scale2(p, n), x, -87.0f);
}

inline F silu(F x) {  // exactly 0 for x at most -87, as exp is
    return lanes::keep_above(lanes::div(x, lanes::add(lanes::set(1.0f), exp(lanes::sub(lanes::zero(), x)))), x, -87.0f);
}

inline float largest(const float* x, int64_t n) {  // of the absolute values; NaN if x holds NaN or infinity
    F most = lanes::zero(), zeros = lanes::zero();
    for (int64_t i = 0; i < n; i += LANES) {
        const F part = load_some(x + i, n - i);
        most = lanes::max(most, lanes::abs(part));
        zeros = lanes::fma(part, lanes::zero(), zeros);
    }
    return lanes::reduce_add(zeros) == 0.0f ? lanes::reduce_max(most) : NAN;
}

}  // namespace
