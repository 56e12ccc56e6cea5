// The kernels over the sixteen lanes of an instruction path; a source file a path includes its lanes, then this.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define BTLM_UNROLL _Pragma("GCC unroll 16")

namespace {

using namespace btlm;
using lanes::B;
using lanes::F;
using lanes::I;

constexpr float SMALLEST = 1e-30f;  // what is smaller is stored as 0: its reciprocal would overflow

// Scalars

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
    if ((word & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((word >> 16) | 64);  // NaN stays one
    return static_cast<uint16_t>((word + 0x7FFFu + ((word >> 16) & 1)) >> 16);
}

inline uint16_t to_bf16_above(float x) { return static_cast<uint16_t>((bits_of(x) + 0xFFFFu) >> 16); }  // x >= 0

inline int32_t load_quad(const void* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// Parts of a block at the end of a row

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

// exp(x), below -87 exactly 0: 2**n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2] (Taylor's; the remainder is below
// 2e-7, about the spacing of floats there).
inline F exp(F x) {
    using namespace lanes;
    const F clamped = lanes::min(lanes::max(x, set(-87.0f)), set(88.0f));
    const F n = lanes::round(mul(clamped, set(1.44269504f)));
    F r = lanes::fma(n, set(-0.693359375f), clamped);  // ln 2 in two parts, the first one exact times n
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

inline F silu(F x) {  // below -87 exactly 0, as exp is
    return lanes::keep_above(lanes::div(x, lanes::add(lanes::set(1.0f), exp(lanes::sub(lanes::zero(), x)))), x, -87.0f);
}

inline float largest(const float* x, int64_t n) {
    F most = lanes::zero();
    for (int64_t i = 0; i < n; i += LANES) most = lanes::max(most, lanes::abs(load_some(x + i, n - i)));
    return lanes::reduce_max(most);
}

// Layer normalization and tables

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n, float* out) {
    const float count = static_cast<float>(n);
    F sum = lanes::zero();
    for (int64_t i = 0; i < n; i += LANES) sum = lanes::add(sum, load_some(x + i, n - i));
    const F mean = lanes::set(lanes::reduce_add(sum) / count);
    F squares = lanes::zero();
    for (int64_t i = 0; i < n; i += LANES) {
        F centred = lanes::sub(load_some(x + i, n - i), mean);
        if (n - i < LANES) {
            float part[LANES] = {};
            store_some(part, centred, n - i);
            centred = lanes::load(part);
        }
        squares = lanes::fma(centred, centred, squares);
    }
    const F scale = lanes::set(1.0f / std::sqrt(lanes::reduce_add(squares) / count + eps));
    for (int64_t i = 0; i < n; i += LANES) {
        const F normal = lanes::mul(lanes::sub(load_some(x + i, n - i), mean), scale);
        store_some(out + i, lanes::fma(normal, load_some(weight + i, n - i), load_some(bias + i, n - i)), n - i);
    }
}

template <class T>
void embed_plain(const T* table, const Matrix& m, int64_t row, float factor, float* out) {
    const T* weight = table + row * m.columns;
    for (int64_t i = 0; i < m.columns; i += LANES)
        store_some(out + i, lanes::mul(load_some(weight + i, m.columns - i), lanes::set(factor)), m.columns - i);
}

void embed(const Matrix& m, int64_t row, float factor, float* out) {
    if (m.kind == Kind::f32) return embed_plain(static_cast<const float*>(m.weight), m, row, factor, out);
    if (m.kind == Kind::bf16) return embed_plain(static_cast<const uint16_t*>(m.weight), m, row, factor, out);
    const int64_t block = row / LANES, lane = row % LANES;
    const uint16_t* scale = m.scale + block * (m.columns / m.group) * LANES + lane;
    const bool q4 = m.kind == Kind::q4;
    const auto* weight = static_cast<const uint8_t*>(m.weight) + block * m.columns * (q4 ? 8 : 16) + lane * 4;
    for (int64_t c = 0; c < m.columns; ++c) {
        const float s = from_bf16(scale[c / m.group * LANES]) * factor;
        if (q4) {
            const int byte = weight[c / 8 * 64 + c % 4];
            out[c] = static_cast<float>((c % 8 < 4 ? byte & 15 : byte >> 4) - 8) * s;
        } else {
            out[c] = static_cast<float>(weight[c / 4 * 64 + c % 4] - 128) * s;
        }
    }
}

// Products with packed weights

void quantize(const float* x, int64_t stride, Activations& into, int64_t panel) {
    const int64_t first = panel * lanes::MAX_TOKENS;
    const int64_t left = into.tokens - first, width = left < lanes::MAX_TOKENS ? left : lanes::MAX_TOKENS;
    const int64_t groups = into.columns / into.group;
    int8_t* values = into.values + first * into.columns;
    float* scales = into.scales + first * groups;
    int32_t* sums = into.sums + first * groups;
    for (int64_t t = 0; t < width; ++t) {
        const float* row = x + (first + t) * stride;
        for (int64_t g = 0; g < groups; ++g) {
            const float* in = row + g * into.group;
            const float most = largest(in, into.group);
            const F inverse = lanes::set(most > SMALLEST ? 127.0f / most : 0.0f);
            I sum = lanes::iset(0);
            for (int i = 0; i < into.group; i += LANES) {
                const I q = lanes::to_int(lanes::mul(lanes::load(in + i), inverse));
                sum = lanes::add(sum, q);
                uint8_t bytes[LANES];
                lanes::store_bytes(bytes, q);
                int8_t* quads = values + ((g * into.group + i) / 4 * width + t) * 4;
                for (int quad = 0; quad < 4; ++quad) std::memcpy(quads + quad * width * 4, bytes + quad * 4, 4);
            }
            scales[g * width + t] = most > SMALLEST ? most / 127.0f : 0.0f;
            sums[g * width + t] = lanes::reduce_add(sum);
        }
    }
}

// The products of NR blocks of 16 rows with a panel of NT tokens.
template <int BITS, int NT, int NR>
inline void tile(const uint8_t* const (&weight)[NR], const uint16_t* const (&scale)[NR], const int8_t* x,
                 const float* x_scales, const int32_t* x_sums, int64_t columns, int group, F (&total)[NR][NT]) {
    constexpr int64_t STEP = BITS == 4 ? 8 : 4;  // columns in 64 bytes
    constexpr int32_t ZERO = BITS == 4 ? 8 : 128;
    for (int r = 0; r < NR; ++r)
        for (int t = 0; t < NT; ++t) total[r][t] = lanes::zero();
    const int64_t groups = columns / group, steps = group / STEP;
    for (int64_t g = 0; g < groups; ++g) {
        I sum[NR][NT];
        BTLM_UNROLL for (int t = 0; t < NT; ++t) {
            const I start = lanes::iset(-ZERO * x_sums[g * NT + t]);
            for (int r = 0; r < NR; ++r) sum[r][t] = start;
        }
        for (int64_t s = 0; s < steps; ++s) {
            const int64_t at = g * steps + s;
            const int8_t* quads = x + at * STEP * NT;
            if constexpr (BITS == 4) {
                B low[NR], high[NR];
                BTLM_UNROLL for (int r = 0; r < NR; ++r) {
                    const B both = lanes::load_bytes(weight[r] + at * 64);
                    low[r] = lanes::low_nibbles(both);
                    high[r] = lanes::high_nibbles(both);
                }
                BTLM_UNROLL for (int t = 0; t < NT; ++t) {
                    const int32_t quad = load_quad(quads + t * 4);
                    BTLM_UNROLL for (int r = 0; r < NR; ++r) sum[r][t] = lanes::dot_nibbles(sum[r][t], low[r], quad);
                }
                BTLM_UNROLL for (int t = 0; t < NT; ++t) {
                    const int32_t quad = load_quad(quads + (NT + t) * 4);
                    BTLM_UNROLL for (int r = 0; r < NR; ++r) sum[r][t] = lanes::dot_nibbles(sum[r][t], high[r], quad);
                }
            } else {
                B bytes[NR];
                BTLM_UNROLL for (int r = 0; r < NR; ++r) bytes[r] = lanes::load_bytes(weight[r] + at * 64);
                BTLM_UNROLL for (int t = 0; t < NT; ++t) {
                    const int32_t quad = load_quad(quads + t * 4);
                    BTLM_UNROLL for (int r = 0; r < NR; ++r) sum[r][t] = lanes::dot_bytes(sum[r][t], bytes[r], quad);
                }
            }
        }
        F scales[NR];
        BTLM_UNROLL for (int r = 0; r < NR; ++r) scales[r] = lanes::load_bf16(scale[r] + g * LANES);
        BTLM_UNROLL for (int t = 0; t < NT; ++t) {
            const F factor = lanes::set(x_scales[g * NT + t]);
            BTLM_UNROLL for (int r = 0; r < NR; ++r)
                total[r][t] = lanes::fma(lanes::to_float(sum[r][t]), lanes::mul(scales[r], factor), total[r][t]);
        }
    }
}

inline F with_bias(F x, const Matrix& m, int64_t row) {
    return m.bias == nullptr ? x : lanes::add(x, lanes::load(m.bias + row));
}

inline void put(Output to, int64_t token, int64_t row, F x) {
    float* out = to.out + token * to.stride + row;
    lanes::store(out, to.add ? lanes::add(lanes::load(out), x) : x);
}

template <int BITS, int NT, int NR>
inline void block(const Matrix& m, const Matrix* gate, const Activations& x, Output to, int64_t row, int64_t token) {
    const int64_t groups = x.columns / x.group;
    const int64_t weight_bytes = m.columns * LANES * BITS / 8, scale_count = groups * LANES;
    const uint8_t* weight[NR];
    const uint16_t* scale[NR];
    for (int r = 0; r < NR; ++r) {
        const Matrix& source = gate != nullptr && r == 1 ? *gate : m;
        const int64_t at = gate != nullptr ? row : row + r;
        weight[r] = static_cast<const uint8_t*>(source.weight) + at * weight_bytes;
        scale[r] = source.scale + at * scale_count;
    }
    F total[NR][NT];
    tile<BITS, NT, NR>(weight, scale, x.values + token * x.columns, x.scales + token * groups, x.sums + token * groups,
                       x.columns, x.group, total);
    for (int t = 0; t < NT; ++t) {
        if (NR == 2 && gate != nullptr) {
            const F product = with_bias(total[0][t], m, row * LANES);
            const F gated = silu(with_bias(total[NR - 1][t], *gate, row * LANES));
            put(to, token + t, row * LANES, lanes::mul(product, gated));
        } else {
            for (int r = 0; r < NR; ++r)
                put(to, token + t, (row + r) * LANES, with_bias(total[r][t], m, (row + r) * LANES));
        }
    }
}

// The panels of NT tokens are of the largest size or the last one.
template <int BITS, int NR, int NT>
inline void panel(int width, const Matrix& m, const Matrix* gate, const Activations& x, Output to, int64_t row,
                  int64_t token) {
    if (width == NT) return block<BITS, NT, NR>(m, gate, x, to, row, token);
    if constexpr (NT > 1) panel<BITS, NR, NT - 1>(width, m, gate, x, to, row, token);
}

template <int BITS>
void multiply_bits(const Matrix& m, const Matrix* gate, const Activations& x, Output to, int64_t first, int64_t last) {
    for (int64_t row = first; row < last;) {
        const bool pair = gate != nullptr || (lanes::ROW_BLOCKS == 2 && row + 1 < last);
        for (int64_t token = 0; token < x.tokens; token += lanes::MAX_TOKENS) {
            const int64_t left = x.tokens - token;
            const int width = static_cast<int>(left < lanes::MAX_TOKENS ? left : lanes::MAX_TOKENS);
            if (pair)
                panel<BITS, 2, lanes::MAX_TOKENS>(width, m, gate, x, to, row, token);
            else
                panel<BITS, 1, lanes::MAX_TOKENS>(width, m, gate, x, to, row, token);
        }
        row += pair && gate == nullptr ? 2 : 1;
    }
}

void multiply_packed(const Matrix& m, const Matrix* gate, const Activations& x, Output to, int64_t first, int64_t last) {
    if (m.kind == Kind::q4) return multiply_bits<4>(m, gate, x, to, first, last);
    multiply_bits<8>(m, gate, x, to, first, last);
}

// Products with plain weights, in fp32

// sums[t][c] += x[t][k] * weight[k][c], k ascending: `width` columns of an input-major matrix.
template <class T>
void by_inputs(const T* weight, int64_t stride, const float* x, int64_t x_stride, int64_t tokens, int64_t inputs,
               int64_t width, int64_t sum_stride, float* sums) {
    constexpr int DEPTH = 8;  // inputs between two visits of a sum
    for (int64_t k = 0; k < inputs; k += DEPTH) {
        const int depth = static_cast<int>(inputs - k < DEPTH ? inputs - k : DEPTH);
        for (int64_t c = 0; c < width; c += LANES) {
            F w[DEPTH];
            for (int i = 0; i < DEPTH; ++i)
                w[i] = i < depth ? load_some(weight + (k + i) * stride + c, width - c) : lanes::zero();
            for (int64_t t = 0; t < tokens; ++t) {
                float* sum = sums + t * sum_stride + c;
                const float* in = x + t * x_stride + k;
                F total = lanes::load(sum);
                if (depth == DEPTH) {
                    BTLM_UNROLL for (int i = 0; i < DEPTH; ++i) total = lanes::fma(lanes::set(in[i]), w[i], total);
                } else {
                    for (int i = 0; i < depth; ++i) total = lanes::fma(lanes::set(in[i]), w[i], total);
                }
                lanes::store(sum, total);
            }
        }
    }
}

// sums[t][r] = x[t] . weight[r] for `width` rows of a row-major matrix.
template <class T>
void by_rows(const T* weight, const float* x, int64_t x_stride, int64_t tokens, int64_t inputs, int64_t width,
             int64_t sum_stride, float* sums) {
    constexpr int TILE = 4;
    for (int64_t r = 0; r < width; ++r) {
        const T* row = weight + r * inputs;
        for (int64_t t = 0; t < tokens; t += TILE) {
            const int count = static_cast<int>(tokens - t < TILE ? tokens - t : TILE);
            F total[TILE] = {lanes::zero(), lanes::zero(), lanes::zero(), lanes::zero()};
            for (int64_t k = 0; k < inputs; k += LANES) {
                const F w = load_some(row + k, inputs - k);
                for (int i = 0; i < count; ++i)
                    total[i] = lanes::fma(w, load_some(x + (t + i) * x_stride + k, inputs - k), total[i]);
            }
            for (int i = 0; i < count; ++i) sums[(t + i) * sum_stride + r] = lanes::reduce_add(total[i]);
        }
    }
}

template <class T>
void partial_sums(const Matrix& m, const float* x, int64_t x_stride, int64_t tokens, int64_t row, int64_t width,
                  float* sums) {
    const auto* weight = static_cast<const T*>(m.weight);
    const int64_t stride = PLAIN_TILE / tokens / LANES * LANES;
    if (m.input_major) {
        std::memset(sums, 0, static_cast<size_t>(PLAIN_TILE) * sizeof *sums);
        by_inputs(weight + row, m.rows, x, x_stride, tokens, m.columns, width, stride, sums);
    } else {
        by_rows(weight + row * m.columns, x, x_stride, tokens, m.columns, width, stride, sums);
    }
}

void multiply_plain(const Matrix& m, const Matrix* gate, const float* x, int64_t x_stride, int64_t tokens, Output to,
                    int64_t first, int64_t last, float* scratch) {
    constexpr int64_t TOKENS = 64;
    const auto compute = [&](const Matrix& source, int64_t token, int64_t count, int64_t row, int64_t width, float* sums) {
        const auto function = source.kind == Kind::f32 ? partial_sums<float> : partial_sums<uint16_t>;
        function(source, x + token * x_stride, x_stride, count, row, width, sums);
    };
    for (int64_t token = 0; token < tokens; token += TOKENS) {
        const int64_t count = tokens - token < TOKENS ? tokens - token : TOKENS;
        const int64_t widest = PLAIN_TILE / count / LANES * LANES;
        for (int64_t row = first; row < last; row += widest) {
            const int64_t width = last - row < widest ? last - row : widest;
            compute(m, token, count, row, width, scratch);
            if (gate != nullptr) compute(*gate, token, count, row, width, scratch + PLAIN_TILE);
            for (int64_t t = 0; t < count; ++t) {
                for (int64_t c = 0; c < width; c += LANES) {
                    const int64_t n = width - c;
                    const auto value = [&](const Matrix& source, const float* sums) {
                        const F sum = load_some(sums + t * widest + c, n);
                        return source.bias == nullptr ? sum : lanes::add(sum, load_some(source.bias + row + c, n));
                    };
                    F product = value(m, scratch);
                    if (gate != nullptr) product = lanes::mul(product, silu(value(*gate, scratch + PLAIN_TILE)));
                    float* out = to.out + (token + t) * to.stride + row + c;
                    if (to.add) product = lanes::add(product, load_some(out, n));
                    store_some(out, product, n);
                }
            }
        }
    }
}

// Attention

// Whole numbers of at most `limit` relative to a scale that bf16 holds exactly. Returns the scale.
inline uint16_t quantize_head(const float* x, int64_t n, float limit, int8_t* q) {
    const float most = largest(x, n);
    if (!(most > SMALLEST)) {
        std::memset(q, 0, static_cast<size_t>(n));
        return 0;
    }
    const uint16_t above = to_bf16_above(most / limit);
    const uint16_t scale = above < 0x7F80 ? above : 0x7F7F;  // finite: a masked key of weight 0 must add 0
    const F inverse = lanes::set(1.0f / from_bf16(scale));
    for (int64_t i = 0; i < n; i += LANES) {
        uint8_t bytes[LANES];
        lanes::store_bytes(bytes, lanes::to_int(lanes::mul(load_some(x + i, n - i), inverse)));
        std::memcpy(q + i, bytes, static_cast<size_t>(n - i < LANES ? n - i : LANES));
    }
    return scale;
}

// Puts a number of -8 to 7 into one half of a byte.
inline void put_nibble(uint8_t& byte, bool high, int value) {
    byte = static_cast<uint8_t>(high ? (byte & 15) | (value + 8) << 4 : (byte & 240) | (value + 8));
}

template <int BITS>
inline void append_packed(const Cache& cache, int64_t head_of_slot, int64_t position, const float* key, const float* value) {
    constexpr float LIMIT = BITS == 4 ? 7.0f : 127.0f;
    constexpr int64_t BLOCK = KEY_BLOCK, STEP = BITS == 4 ? 8 : 4;  // dimensions, or tokens, in four bytes
    int8_t q[MAX_HEAD_DIM] = {};
    const int64_t head = head_of_slot * cache.capacity, row = cache.width * BITS / 8;
    auto* keys = static_cast<uint8_t*>(cache.keys) + (head + position / BLOCK * BLOCK) * row + position % BLOCK * 4;
    cache.key_scales[head + position] = quantize_head(key, cache.head_dim, LIMIT, q);
    for (int64_t d = 0; d < cache.width; ++d) {
        uint8_t& byte = keys[d / STEP * BLOCK * 4 + d % 4];
        if constexpr (BITS == 4)
            put_nibble(byte, d % 8 >= 4, q[d]);
        else
            byte = static_cast<uint8_t>(q[d] + 128);
    }
    auto* values = static_cast<uint8_t*>(cache.values) + (head + position / STEP * STEP) * row + position % 4;
    cache.value_scales[head + position] = quantize_head(value, cache.head_dim, LIMIT, q);
    for (int64_t d = 0; d < cache.width; ++d) {
        if constexpr (BITS == 4)
            put_nibble(values[d * 4], position % 8 >= 4, q[d]);
        else
            values[d * 4] = static_cast<uint8_t>(q[d]);
    }
}

inline void store_as(float x, float* to) { *to = x; }
inline void store_as(float x, uint16_t* to) { *to = to_bf16(x); }

template <class T>
inline void append_plain(const Cache& cache, int64_t head_of_slot, int64_t position, const float* key, const float* value) {
    T* keys = static_cast<T*>(cache.keys) + (head_of_slot * cache.capacity + position / 16 * 16) * cache.width;
    T* values = static_cast<T*>(cache.values) + (head_of_slot * cache.capacity + position) * cache.width;
    for (int64_t d = 0; d < cache.head_dim; ++d) {
        store_as(key[d], keys + d * 16 + position % 16);
        store_as(value[d], values + d);
    }
}

void append(const Cache& cache, int64_t slot, int64_t head, int64_t position, const float* key, const float* value) {
    const int64_t head_of_slot = slot * cache.heads + head;
    if (cache.kind == CacheKind::int4) return append_packed<4>(cache, head_of_slot, position, key, value);
    if (cache.kind == CacheKind::int8) return append_packed<8>(cache, head_of_slot, position, key, value);
    if (cache.kind == CacheKind::bf16) return append_plain<uint16_t>(cache, head_of_slot, position, key, value);
    append_plain<float>(cache, head_of_slot, position, key, value);
}

// A query and its running softmax.
struct Query {
    float most, sum;
    float scale;        // packed: of the query times that of the scores
    int32_t offset;     // packed: what the keys' offset of 8 or 128 adds to a product
    alignas(64) float total[MAX_HEAD_DIM];
    alignas(64) float values[MAX_HEAD_DIM];
    alignas(64) int8_t bytes[MAX_HEAD_DIM];
};

// The first `visible` lanes, the others minus infinity.
inline F hide(F x, int64_t visible) {
    if (visible >= LANES) return x;
    float part[LANES];
    lanes::store(part, x);
    for (int64_t i = visible < 0 ? 0 : visible; i < LANES; ++i) part[i] = -INFINITY;
    return lanes::load(part);
}

// Adds ALiBi to the scores of a block of keys and turns them into probabilities relative to the running maximum. Keys after
// the query's position are hidden. Returns what the sums so far have to be multiplied by.
inline float softmax_step(Query& q, F (&scores)[KEY_BLOCK / LANES], int64_t first_key, int64_t position, float slope) {
    F most = lanes::set(-INFINITY);
    for (int s = 0; s < KEY_BLOCK / LANES; ++s) {
        const auto behind = static_cast<int32_t>(first_key + s * LANES - position);
        const F distance = lanes::to_float(lanes::add(lanes::iota(), lanes::iset(behind)));
        scores[s] = hide(lanes::fma(lanes::set(slope), distance, scores[s]), 1 - behind);
        most = lanes::max(most, scores[s]);
    }
    const float block_most = lanes::reduce_max(most), now = block_most > q.most ? block_most : q.most;
    const float correction = std::exp(q.most - now);
    F sum = lanes::zero();
    for (int s = 0; s < KEY_BLOCK / LANES; ++s) {
        scores[s] = exp(lanes::sub(scores[s], lanes::set(now)));
        sum = lanes::add(sum, scores[s]);
    }
    q.most = now;
    q.sum = q.sum * correction + lanes::reduce_add(sum);
    return correction;
}

// Brings memory near before it is used: the pieces of a head are too short for the processor to see them coming.
inline void fetch(const void* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// total = total * kept + unit * (the sum over a block of keys of their values times 256 * high + low), N * 16 dimensions.
template <int BITS, int N>
inline void sum_values(const uint8_t* high, const uint8_t* low, I high_start, I low_start, const uint8_t* values,
                       int64_t stride, F unit, F kept, float* total) {
    constexpr int64_t STEP = BITS == 4 ? 8 : 4;  // tokens in four bytes
    I of_high[N], of_low[N];
    BTLM_UNROLL for (int i = 0; i < N; ++i) {
        of_high[i] = high_start;
        of_low[i] = low_start;
    }
    for (int64_t t = 0; t < KEY_BLOCK; t += STEP) {
        const int32_t four_high = load_quad(high + t), four_low = load_quad(low + t);
        BTLM_UNROLL for (int i = 0; i < N; ++i) {
            const B bytes = lanes::load_bytes(values + t / STEP * stride + i * 64);
            const B four = BITS == 4 ? lanes::low_nibbles(bytes) : bytes;
            of_high[i] = lanes::dot_signed(of_high[i], four_high, four);
            of_low[i] = lanes::dot_signed(of_low[i], four_low, four);
            if constexpr (BITS == 4) {
                const B next = lanes::high_nibbles(bytes);
                of_high[i] = lanes::dot_signed(of_high[i], load_quad(high + t + 4), next);
                of_low[i] = lanes::dot_signed(of_low[i], load_quad(low + t + 4), next);
            }
        }
    }
    BTLM_UNROLL for (int i = 0; i < N; ++i) {
        const F sum = lanes::fma(lanes::to_float(of_high[i]), lanes::set(256.0f), lanes::to_float(of_low[i]));
        lanes::store(total + i * LANES, lanes::fma(sum, unit, lanes::mul(lanes::load(total + i * LANES), kept)));
    }
}

inline int32_t sum_block(const uint8_t* bytes) {  // of a block of keys
    return lanes::reduce_add(lanes::dot_bytes(lanes::iset(0), lanes::load_bytes(bytes), 0x01010101));
}

// For what is left of a head, at most 128 dimensions.
template <int BITS>
inline auto value_sums(int64_t dimensions) {
    constexpr decltype(&sum_values<BITS, 1>) SIZES[] = {
        sum_values<BITS, 1>, sum_values<BITS, 2>, sum_values<BITS, 3>, sum_values<BITS, 4>,
        sum_values<BITS, 5>, sum_values<BITS, 6>, sum_values<BITS, 7>, sum_values<BITS, 8>};
    return SIZES[(dimensions < 8 * LANES ? dimensions : 8 * LANES) / LANES - 1];
}

template <int BITS>
inline void attend_block_packed(const Cache& cache, int64_t head_of_slot, int64_t first_key, int64_t position, float slope,
                                bool next, Query& q) {
    constexpr int BLOCKS = KEY_BLOCK / LANES;
    const int64_t at = head_of_slot * cache.capacity + first_key, row = cache.width * BITS / 8;
    const auto* keys = static_cast<const uint8_t*>(cache.keys) + at * row;
    const auto* values = static_cast<const uint8_t*>(cache.values) + at * row;

    // What comes next: this head's next block, or the first one of the next head.
    const int64_t ahead = next ? KEY_BLOCK * row : ((head_of_slot + 1) * cache.capacity - at) * row;
    fetch(keys + ahead, KEY_BLOCK * row);
    fetch(values + ahead, KEY_BLOCK * row);
    I products[BLOCKS];
    for (int s = 0; s < BLOCKS; ++s) products[s] = lanes::iset(q.offset);
    for (int64_t c = 0; c < row / 4; ++c) {
        if constexpr (BITS == 4) {
            const int32_t quad = load_quad(q.bytes + c * 8), next_quad = load_quad(q.bytes + c * 8 + 4);
            BTLM_UNROLL for (int s = 0; s < BLOCKS; ++s) {
                const B both = lanes::load_bytes(keys + (c * BLOCKS + s) * 64);
                products[s] = lanes::dot_nibbles(products[s], lanes::low_nibbles(both), quad);
                products[s] = lanes::dot_nibbles(products[s], lanes::high_nibbles(both), next_quad);
            }
        } else {
            const int32_t quad = load_quad(q.bytes + c * 4);
            BTLM_UNROLL for (int s = 0; s < BLOCKS; ++s)
                products[s] = lanes::dot_bytes(products[s], lanes::load_bytes(keys + (c * BLOCKS + s) * 64), quad);
        }
    }
    F scores[BLOCKS];
    for (int s = 0; s < BLOCKS; ++s) {
        const F scale = lanes::mul(lanes::load_bf16(cache.key_scales + at + s * LANES), lanes::set(q.scale));
        scores[s] = lanes::mul(lanes::to_float(products[s]), scale);
    }
    const float correction = softmax_step(q, scores, first_key, position, slope);

    // Probabilities times the scales of the values, in 16 bits of which each half meets the values' bits by itself.
    F most = lanes::zero();
    for (int s = 0; s < BLOCKS; ++s) {
        scores[s] = lanes::mul(scores[s], lanes::load_bf16(cache.value_scales + at + s * LANES));
        most = lanes::max(most, scores[s]);
    }
    const float largest_weight = lanes::reduce_max(most);
    const bool some = largest_weight > SMALLEST;
    const F to_16_bits = lanes::set(some ? 65535.0f / largest_weight : 0.0f);
    alignas(64) uint8_t high[KEY_BLOCK], low[KEY_BLOCK];
    for (int s = 0; s < BLOCKS; ++s) {
        const I weight = lanes::to_int(lanes::mul(scores[s], to_16_bits));
        lanes::store_bytes(low + s * LANES, weight);
        lanes::store_bytes(high + s * LANES, lanes::shift_right_8(weight));
    }
    const I high_start = lanes::iset(BITS == 4 ? -8 * sum_block(high) : 0);
    const I low_start = lanes::iset(BITS == 4 ? -8 * sum_block(low) : 0);
    const F unit = lanes::set(some ? largest_weight / 65535.0f : 0.0f), kept = lanes::set(correction);
    for (int64_t d = 0; d < cache.width; d += 8 * LANES) {
        const auto add_values = value_sums<BITS>(cache.width - d);
        add_values(high, low, high_start, low_start, values + d * 4, cache.width * 4, unit, kept, q.total + d);
    }
}

inline F load_lanes(const float* p) { return lanes::load(p); }
inline F load_lanes(const uint16_t* p) { return lanes::load_bf16(p); }

template <class T>
inline void attend_block_plain(const Cache& cache, int64_t head_of_slot, int64_t first_key, int64_t position, float slope,
                               bool, Query& q) {
    constexpr int BLOCKS = KEY_BLOCK / LANES;
    const int64_t at = head_of_slot * cache.capacity + first_key;
    const T* keys = static_cast<const T*>(cache.keys) + at * cache.width;
    const T* values = static_cast<const T*>(cache.values) + at * cache.width;
    F scores[BLOCKS];
    for (int s = 0; s < BLOCKS; ++s) scores[s] = lanes::zero();
    for (int64_t d = 0; d < cache.head_dim; ++d) {
        const F value = lanes::set(q.values[d]);
        BTLM_UNROLL for (int s = 0; s < BLOCKS; ++s)
            scores[s] = lanes::fma(value, load_lanes(keys + (s * cache.width + d) * LANES), scores[s]);
    }
    const float correction = softmax_step(q, scores, first_key, position, slope);
    alignas(64) float weights[KEY_BLOCK];
    for (int s = 0; s < BLOCKS; ++s) lanes::store(weights + s * LANES, scores[s]);
    const int64_t last = position - first_key + 1, count = last < KEY_BLOCK ? last : KEY_BLOCK;
    for (int64_t d = 0; d < cache.width; d += LANES) {
        F total = lanes::mul(lanes::load(q.total + d), lanes::set(correction));
        for (int64_t t = 0; t < count; ++t)
            total = lanes::fma(lanes::set(weights[t]), load_lanes(values + t * cache.width + d), total);
        lanes::store(q.total + d, total);
    }
}

inline void start(const Cache& cache, const float* values, float scale, Query& q) {
    q.most = -INFINITY;
    q.sum = 0.0f;
    std::memset(q.total, 0, sizeof q.total);
    if (packed(cache.kind)) {
        std::memset(q.bytes, 0, sizeof q.bytes);
        q.scale = from_bf16(quantize_head(values, cache.head_dim, 127.0f, q.bytes)) * scale;
        q.offset = 0;
        for (int64_t d = 0; d < cache.head_dim; ++d) q.offset -= (cache.kind == CacheKind::int4 ? 8 : 128) * q.bytes[d];
    } else {
        for (int64_t d = 0; d < cache.head_dim; ++d) q.values[d] = values[d] * scale;
    }
}

void attend(const Cache& cache, int64_t slot, int64_t head, int64_t first, int64_t count, const float* queries,
            int64_t query_stride, float slope, float scale, float* out, int64_t out_stride) {
    const int64_t head_of_slot = slot * cache.heads + head;
    const auto step = cache.kind == CacheKind::int4   ? attend_block_packed<4>
                      : cache.kind == CacheKind::int8 ? attend_block_packed<8>
                      : cache.kind == CacheKind::bf16 ? attend_block_plain<uint16_t>
                                                      : attend_block_plain<float>;
    Query tile[QUERY_TILE];
    for (int64_t done = 0; done < count; done += QUERY_TILE) {
        const int64_t n = count - done < QUERY_TILE ? count - done : QUERY_TILE, position = first + done;
        for (int64_t i = 0; i < n; ++i) start(cache, queries + (done + i) * query_stride, scale, tile[i]);
        for (int64_t key = 0; key < position + n; key += KEY_BLOCK)
            for (int64_t i = key > position ? key - position : 0; i < n; ++i)
                step(cache, head_of_slot, key, position + i, slope, key + KEY_BLOCK < position + n, tile[i]);
        for (int64_t i = 0; i < n; ++i) {
            const F whole = lanes::set(tile[i].sum);
            for (int64_t d = 0; d < cache.head_dim; d += LANES)
                store_some(out + (done + i) * out_stride + d, lanes::div(lanes::load(tile[i].total + d), whole),
                           cache.head_dim - d);
        }
    }
}

int64_t sum_bytes(const uint8_t* p, int64_t n) {
    I sums[4] = {lanes::iset(0), lanes::iset(0), lanes::iset(0), lanes::iset(0)};
    for (int64_t i = 0; i + 256 <= n; i += 256)
        BTLM_UNROLL for (int s = 0; s < 4; ++s)
            sums[s] = lanes::dot_bytes(sums[s], lanes::load_bytes(p + i + s * 64), 0x01010101);
    int64_t total = 0;
    for (const I& sum : sums) total += lanes::reduce_add(sum);
    return total;
}

constexpr Path PATH = {lanes::NAME, lanes::MAX_TOKENS, quantize, multiply_packed, multiply_plain, layer_norm,
                       embed,       append,           attend,   sum_bytes};

}  // namespace
