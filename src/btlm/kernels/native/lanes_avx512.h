// Sixteen lanes in one AVX-512 register, with VNNI's four-byte dot products.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {  // each instruction set has its own
namespace lanes {

constexpr const char* NAME = "avx512vnni";
constexpr int MAX_TOKENS = 8;  // 2 x 8 accumulators; 10 and 12 were slower (spilled registers)
constexpr int ROW_BLOCKS = 2;

using F = __m512;   // 16 floats
using I = __m512i;  // 16 int32
using B = __m512i;  // 64 bytes

inline F zero() { return _mm512_setzero_ps(); }
inline F set(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline F load_bf16(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline float reduce_add(F a) { return _mm512_reduce_add_ps(a); }
inline float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }  // a * 2**n for integers n
inline F keep_above(F a, F x, float limit) {  // a where x > limit or NaN, else 0
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLE_UQ), a);
}

inline I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
inline I iset(int32_t x) { return _mm512_set1_epi32(x); }
inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I to_int(F a) { return _mm512_cvtps_epi32(a); }  // nearest, ties to even
inline I shift_right_8(I a) { return _mm512_srli_epi32(a, 8); }
inline void store_bytes(uint8_t* p, I a) {  // the low byte of each lane
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
inline int32_t reduce_add(I a) { return _mm512_reduce_add_epi32(a); }

inline B load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void bstore(void* p, B a) { _mm512_storeu_si512(p, a); }
inline B low_nibbles(B a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline B high_nibbles(B a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }

// Lane n of the result: acc[n] + sum over i < 4 of u[4n + i] * s[i].
inline I dot_nibbles(I acc, B u, int32_t s) { return _mm512_dpbusd_epi32(acc, u, _mm512_set1_epi32(s)); }
inline I dot_bytes(I acc, B u, int32_t s) { return _mm512_dpbusd_epi32(acc, u, _mm512_set1_epi32(s)); }
// The same with the unsigned bytes broadcast and the signed bytes in the lanes.
inline I dot_signed(I acc, int32_t u, B s) { return _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(u), s); }

}  // namespace lanes
}  // namespace
