// Writing one token's key and value of one head into the cache, rounded to the dtype of the cache.
#pragma once

#include "elements.h"

namespace {

// Rounds x to integers from -limit to limit. Returns the scale, a finite bf16 number, so that a hidden key with weight 0 adds 0;
// what is not finite is stored as zeros.
inline uint16_t quantize_head(const float* x, int64_t n, float limit, int8_t* q) {
    const float most = largest(x, n);
    if (!(most > SMALLEST)) {
        std::memset(q, 0, static_cast<size_t>(n));
        return 0;
    }
    const uint16_t scale = to_bf16_above(most / limit);
    const F inverse = lanes::set(1.0f / from_bf16(scale));
    for (int64_t i = 0; i < n; i += LANES) {
        uint8_t bytes[LANES];
        lanes::store_bytes(bytes, lanes::to_int(lanes::mul(load_some(x + i, n - i), inverse)));
        std::memcpy(q + i, bytes, static_cast<size_t>(n - i < LANES ? n - i : LANES));
    }
    return scale;
}

inline uint32_t four_bytes(const int8_t* from) {
    uint32_t bytes;
    std::memcpy(&bytes, from, 4);
    return bytes;
}

// Stores a number from -8 to 7 in one half of a byte.
inline void put_nibble(uint8_t& byte, bool high, int value) {
    byte = static_cast<uint8_t>(high ? (byte & 15) | (value + 8) << 4 : (byte & 240) | (value + 8));
}

// `at` is where the tokens of the head in this page begin, and `inside` the place of the token there.
template <int BITS>
inline void append_packed(const Cache& cache, int64_t at, int64_t inside, const float* key, const float* value) {
    constexpr float LIMIT = BITS == 4 ? 7.0f : 127.0f;
    constexpr int64_t STEP = BITS == 4 ? 8 : 4;  // dimensions, or tokens, in four bytes
    int8_t q[MAX_HEAD_DIM] = {};
    const int64_t row = cache.width * BITS / 8;
    auto* keys = static_cast<uint8_t*>(cache.keys) + at * row + inside * 4;
    cache.key_scales[at + inside] = quantize_head(key, cache.head_dim, LIMIT, q);
    for (int64_t d = 0; d < cache.width; d += STEP) {  // flipping the sign adds half of the range
        uint32_t quad = four_bytes(q + d) ^ 0x80808080;
        if constexpr (BITS == 4)
            quad = ((four_bytes(q + d) & 0x0f0f0f0f) ^ 0x08080808) | ((four_bytes(q + d + 4) & 0x0f0f0f0f) ^ 0x08080808) << 4;
        std::memcpy(keys + d / STEP * KEY_BLOCK * 4, &quad, 4);
    }
    auto* values = static_cast<uint8_t*>(cache.values) + (at + inside / STEP * STEP) * row + inside % 4;
    cache.value_scales[at + inside] = quantize_head(value, cache.head_dim, LIMIT, q);
    for (int64_t d = 0; d < cache.width; ++d) {
        if constexpr (BITS == 4)
            put_nibble(values[d * 4], inside % 8 >= 4, q[d]);
        else
            values[d * 4] = static_cast<uint8_t>(q[d]);
    }
}

inline void store_as(float x, float* to) { *to = x; }
inline void store_as(float x, uint16_t* to) { *to = to_bf16(x); }

template <class T>
inline void append_plain(const Cache& cache, int64_t at, int64_t inside, const float* key, const float* value) {
    T* keys = static_cast<T*>(cache.keys) + (at + inside / 16 * 16) * cache.width;
    T* values = static_cast<T*>(cache.values) + (at + inside) * cache.width;
    for (int64_t d = 0; d < cache.head_dim; ++d) {
        store_as(key[d], keys + d * 16 + inside % 16);
        store_as(value[d], values + d);
    }
}

inline void append(const Cache& cache, int64_t slot, int64_t head, int64_t position, const float* key, const float* value) {
    const int64_t at = cache.at(slot, head, position), inside = position % KEY_BLOCK;
    if (cache.dtype == Dtype::int4) return append_packed<4>(cache, at, inside, key, value);
    if (cache.dtype == Dtype::int8) return append_packed<8>(cache, at, inside, key, value);
    if (cache.dtype == Dtype::bfloat16) return append_plain<uint16_t>(cache, at, inside, key, value);
    append_plain<float>(cache, at, inside, key, value);
}

}  // namespace
