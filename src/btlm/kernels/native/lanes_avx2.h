// Sixteen lanes in two AVX2 registers. AVX2 sums products of bytes in 16 bits, which could saturate; products with nibbles
// cannot, so that bytes are multiplied as two nibbles.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {  // each instruction set has its own
namespace lanes {

constexpr const char* NAME = "avx2";
constexpr int MAX_TOKENS = 4;
constexpr int ROW_BLOCKS = 1;

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct B { __m256i a, b; };

inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline __m256 widen(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline F load_bf16(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F abs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline float reduce_add(F x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
inline float reduce_max(F x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
inline F round(F x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline __m256 power(__m256 n) {  // 2**n for integers n from -126 to 127
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F scale2(F x, F n) { return {_mm256_mul_ps(x.a, power(n.a)), _mm256_mul_ps(x.b, power(n.b))}; }
inline F keep_above(F r, F x, float limit) {  // r where x > limit or NaN, else 0
    const __m256 all = _mm256_set1_ps(limit);
    return {_mm256_and_ps(r.a, _mm256_cmp_ps(x.a, all, _CMP_NLE_UQ)), _mm256_and_ps(r.b, _mm256_cmp_ps(x.b, all, _CMP_NLE_UQ))};
}

inline I iset(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline I shift_right_8(I x) { return {_mm256_srli_epi32(x.a, 8), _mm256_srli_epi32(x.b, 8)}; }
inline void store_bytes(uint8_t* p, I x) {
    const __m256i low = _mm256_set1_epi32(255);
    const __m256i words = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
inline int32_t reduce_add(I x) {
    const __m256i s = _mm256_add_epi32(x.a, x.b);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xB1)));
}

inline B load_bytes(const void* p) {
    const auto* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline __m256i low_nibbles(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline __m256i high_nibbles(__m256i x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
inline B low_nibbles(B x) { return {low_nibbles(x.a), low_nibbles(x.b)}; }
inline B high_nibbles(B x) { return {high_nibbles(x.a), high_nibbles(x.b)}; }

inline __m256i quads(__m256i u, __m256i s) {  // u is at most 15: 2 * 15 * 128 fits into 16 bits
    return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
}
inline I dot_nibbles(I acc, B u, int32_t s) {
    const __m256i all = _mm256_set1_epi32(s);
    return {_mm256_add_epi32(acc.a, quads(u.a, all)), _mm256_add_epi32(acc.b, quads(u.b, all))};
}
inline I dot_bytes(I acc, B u, int32_t s) {
    const __m256i all = _mm256_set1_epi32(s);
    const auto both = [all](__m256i acc, __m256i u) {
        const __m256i high = _mm256_slli_epi32(quads(high_nibbles(u), all), 4);
        return _mm256_add_epi32(acc, _mm256_add_epi32(quads(low_nibbles(u), all), high));
    };
    return {both(acc.a, u.a), both(acc.b, u.b)};
}
inline I dot_signed(I acc, int32_t u, B s) {
    const __m256i all = _mm256_set1_epi32(u), low = low_nibbles(all), high = high_nibbles(all);
    const auto both = [low, high](__m256i acc, __m256i s) {
        return _mm256_add_epi32(acc, _mm256_add_epi32(quads(low, s), _mm256_slli_epi32(quads(high, s), 4)));
    };
    return {both(acc.a, s.a), both(acc.b, s.b)};
}

}  // namespace lanes
}  // namespace
