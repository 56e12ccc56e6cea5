// Sixteen lanes in plain C++: runs on every machine, and is what the other instruction sets are compared with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {  // each instruction set has its own
namespace lanes {

constexpr const char* NAME = "plain";
constexpr int MAX_TOKENS = 4;
constexpr int ROW_BLOCKS = 1;

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct B { uint8_t v[64]; };

#define BTLM_EACH(T, expression) \
    T r;                         \
    for (int i = 0; i < 16; ++i) r.v[i] = expression; \
    return r

inline F set(float x) { BTLM_EACH(F, x); }
inline F zero() { return set(0.0f); }
inline F load(const float* p) { BTLM_EACH(F, p[i]); }
inline void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
inline float widen(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
}
inline F load_bf16(const uint16_t* p) { BTLM_EACH(F, widen(p[i])); }
inline F add(F x, F y) { BTLM_EACH(F, x.v[i] + y.v[i]); }
inline F sub(F x, F y) { BTLM_EACH(F, x.v[i] - y.v[i]); }
inline F mul(F x, F y) { BTLM_EACH(F, x.v[i] * y.v[i]); }
inline F div(F x, F y) { BTLM_EACH(F, x.v[i] / y.v[i]); }
inline F fma(F x, F y, F z) { BTLM_EACH(F, x.v[i] * y.v[i] + z.v[i]); }
inline F max(F x, F y) { BTLM_EACH(F, x.v[i] > y.v[i] ? x.v[i] : y.v[i]); }
inline F min(F x, F y) { BTLM_EACH(F, x.v[i] < y.v[i] ? x.v[i] : y.v[i]); }
inline F abs(F x) { BTLM_EACH(F, std::fabs(x.v[i])); }
inline float reduce_add(F x) {
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) x.v[i] += x.v[i + width];
    return x.v[0];
}
inline float reduce_max(F x) {
    float most = x.v[0];
    for (int i = 1; i < 16; ++i) most = x.v[i] > most ? x.v[i] : most;
    return most;
}
inline F round(F x) { BTLM_EACH(F, std::nearbyint(x.v[i])); }
inline F scale2(F x, F n) { BTLM_EACH(F, std::ldexp(x.v[i], static_cast<int>(n.v[i]))); }
inline F keep_above(F a, F x, float limit) { BTLM_EACH(F, x.v[i] <= limit ? 0.0f : a.v[i]); }

inline I iload(const int32_t* p) { BTLM_EACH(I, p[i]); }
inline I iset(int32_t x) { BTLM_EACH(I, x); }
inline I add(I x, I y) { BTLM_EACH(I, x.v[i] + y.v[i]); }
inline I iota() { BTLM_EACH(I, i); }
inline F to_float(I x) { BTLM_EACH(F, static_cast<float>(x.v[i])); }
inline int32_t to_int(float x) {  // a number outside int32 becomes the smallest int32, as in the vector instructions
    const float whole = std::nearbyint(x);
    return whole >= -2147483648.0f && whole < 2147483648.0f ? static_cast<int32_t>(whole) : INT32_MIN;
}
inline I to_int(F x) { BTLM_EACH(I, to_int(x.v[i])); }
inline I shift_right_8(I x) { BTLM_EACH(I, static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) >> 8)); }
inline void store_bytes(uint8_t* p, I x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(x.v[i] & 255);
}
inline int32_t reduce_add(I x) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += x.v[i];
    return sum;
}

inline B load_bytes(const void* p) {
    B r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline void bstore(void* p, B x) { std::memcpy(p, x.v, sizeof x.v); }
inline B low_nibbles(B x) {
    for (uint8_t& byte : x.v) byte &= 15;
    return x;
}
inline B high_nibbles(B x) {
    for (uint8_t& byte : x.v) byte = static_cast<uint8_t>(byte >> 4);
    return x;
}
inline I dot_bytes(I acc, B u, int32_t s) {
    int8_t bytes[4];
    std::memcpy(bytes, &s, 4);
    for (int i = 0; i < 64; ++i) acc.v[i / 4] += u.v[i] * bytes[i % 4];
    return acc;
}
inline I dot_nibbles(I acc, B u, int32_t s) { return dot_bytes(acc, u, s); }
inline I dot_signed(I acc, int32_t u, B s) {
    uint8_t bytes[4];
    std::memcpy(bytes, &u, 4);
    for (int i = 0; i < 64; ++i) acc.v[i / 4] += static_cast<int8_t>(s.v[i]) * bytes[i % 4];
    return acc;
}

#undef BTLM_EACH

}  // namespace lanes
}  // namespace
