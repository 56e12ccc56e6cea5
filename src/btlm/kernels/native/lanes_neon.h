// Sixteen lanes in four NEON registers, with the dot products of ARMv8.2 (FEAT_DotProd).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {  // each instruction set has its own
namespace lanes {

constexpr const char* NAME = "neon";
constexpr int MAX_TOKENS = 4;
constexpr int ROW_BLOCKS = 1;

struct F { float32x4_t v[4]; };
struct I { int32x4_t v[4]; };
struct B { uint8x16_t v[4]; };

#define BTLM_EACH(T, expression) \
    T r;                         \
    for (int i = 0; i < 4; ++i) r.v[i] = expression; \
    return r

inline F set(float x) { BTLM_EACH(F, vdupq_n_f32(x)); }
inline F zero() { return set(0.0f); }
inline F load(const float* p) { BTLM_EACH(F, vld1q_f32(p + 4 * i)); }
inline void store(float* p, F x) { for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]); }
inline F load_bf16(const uint16_t* p) {
    BTLM_EACH(F, vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p + 4 * i)), 16)));
}
inline F add(F x, F y) { BTLM_EACH(F, vaddq_f32(x.v[i], y.v[i])); }
inline F sub(F x, F y) { BTLM_EACH(F, vsubq_f32(x.v[i], y.v[i])); }
inline F mul(F x, F y) { BTLM_EACH(F, vmulq_f32(x.v[i], y.v[i])); }
inline F div(F x, F y) { BTLM_EACH(F, vdivq_f32(x.v[i], y.v[i])); }
inline F fma(F x, F y, F z) { BTLM_EACH(F, vfmaq_f32(z.v[i], x.v[i], y.v[i])); }
inline F max(F x, F y) { BTLM_EACH(F, vmaxq_f32(x.v[i], y.v[i])); }
inline F min(F x, F y) { BTLM_EACH(F, vminq_f32(x.v[i], y.v[i])); }
inline F abs(F x) { BTLM_EACH(F, vabsq_f32(x.v[i])); }
inline float reduce_add(F x) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3])));
}
inline float reduce_max(F x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
inline F round(F x) { BTLM_EACH(F, vrndnq_f32(x.v[i])); }
inline float32x4_t power(float32x4_t n) {  // 2**n for integers n from -126 to 127
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline F scale2(F x, F n) { BTLM_EACH(F, vmulq_f32(x.v[i], power(n.v[i]))); }
inline F keep_above(F a, F x, float limit) {  // a where x > limit or NaN, else 0
    BTLM_EACH(F, vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a.v[i]), vcleq_f32(x.v[i], vdupq_n_f32(limit)))));
}

inline I iset(int32_t x) { BTLM_EACH(I, vdupq_n_s32(x)); }
inline I add(I x, I y) { BTLM_EACH(I, vaddq_s32(x.v[i], y.v[i])); }
inline I iota() {
    alignas(16) static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    BTLM_EACH(I, vld1q_s32(lanes + 4 * i));
}
inline F to_float(I x) { BTLM_EACH(F, vcvtq_f32_s32(x.v[i])); }
inline I to_int(F x) { BTLM_EACH(I, vcvtnq_s32_f32(x.v[i])); }
inline I shift_right_8(I x) {
    BTLM_EACH(I, vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(x.v[i]), 8)));
}
inline void store_bytes(uint8_t* p, I x) {
    const auto words = [&x](int i) {
        return vcombine_u16(vmovn_u32(vreinterpretq_u32_s32(x.v[i])), vmovn_u32(vreinterpretq_u32_s32(x.v[i + 1])));
    };
    vst1q_u8(p, vcombine_u8(vmovn_u16(words(0)), vmovn_u16(words(2))));
}
inline int32_t reduce_add(I x) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
}

inline B load_bytes(const void* p) { BTLM_EACH(B, vld1q_u8(static_cast<const uint8_t*>(p) + 16 * i)); }
inline B low_nibbles(B x) { BTLM_EACH(B, vandq_u8(x.v[i], vdupq_n_u8(15))); }
inline B high_nibbles(B x) { BTLM_EACH(B, vshrq_n_u8(x.v[i], 4)); }

// The instruction takes signed bytes on both sides. Nibbles fit; unsigned bytes are split into two nibbles.
inline int8x16_t quad(int32_t s) { return vreinterpretq_s8_s32(vdupq_n_s32(s)); }
inline I dot_nibbles(I acc, B u, int32_t s) {
    BTLM_EACH(I, vdotq_s32(acc.v[i], vreinterpretq_s8_u8(u.v[i]), quad(s)));
}
inline I dot_bytes(I acc, B u, int32_t s) {
    const I low = dot_nibbles(acc, low_nibbles(u), s), high = dot_nibbles(iset(0), high_nibbles(u), s);
    BTLM_EACH(I, vaddq_s32(low.v[i], vshlq_n_s32(high.v[i], 4)));
}
inline I dot_signed(I acc, int32_t u, B s) {
    const int8x16_t low = quad(u & 0x0F0F0F0F), high = quad((u >> 4) & 0x0F0F0F0F);
    const auto both = [&](int i) {
        const int8x16_t values = vreinterpretq_s8_u8(s.v[i]);
        return vaddq_s32(vdotq_s32(acc.v[i], values, low), vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), values, high), 4));
    };
    BTLM_EACH(I, both(i));
}

#undef BTLM_EACH

}  // namespace lanes
}  // namespace
