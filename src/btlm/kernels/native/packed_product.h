// Products with 4- and 8-bit weights: activations are rounded to 8 bits, sums within a group are exact.
#pragma once

#include "elements.h"

namespace {

// Rounds the inputs of one token. Passes 16 numbers at a time to `put(column, bytes)`, and the scale and the sum of each group
// to `end(group, scale, sum)`.
template <class Put, class End>
inline void quantize_token(const float* row, int64_t columns, int group, const Put& put, const End& end) {
    for (int64_t g = 0; g < columns / group; ++g) {
        const float* in = row + g * group;
        const float most = largest(in, group);
        const bool used = most > SMALLEST;
        const F inverse = lanes::set(used ? 127.0f / most : 0.0f);
        I sum = lanes::iset(0);
        for (int i = 0; i < group; i += LANES) {
            const I q = used ? lanes::to_int(lanes::mul(lanes::load(in + i), inverse)) : lanes::iset(0);
            sum = lanes::add(sum, q);
            uint8_t bytes[LANES];
            lanes::store_bytes(bytes, q);
            put(g * group + i, bytes);
        }
        end(g, used ? most / 127.0f : std::isnan(most) ? NAN : 0.0f, lanes::reduce_add(sum));  // NaN stays NaN
    }
}

inline void quantize(const float* x, int64_t stride, Activations& into, int64_t panel) {
    const int64_t first = panel * lanes::MAX_TOKENS;
    const int64_t left = into.tokens - first, width = left < lanes::MAX_TOKENS ? left : lanes::MAX_TOKENS;
    const int64_t groups = into.columns / into.group;
    int8_t* values = into.values + first * into.columns;
    float* scales = into.scales + first * groups;
    int32_t* sums = into.sums + first * groups;
    for (int64_t t = 0; t < width; ++t)
        quantize_token(
            x + (first + t) * stride, into.columns, into.group,
            [=](int64_t column, const uint8_t* bytes) {
                int8_t* quads = values + (column / 4 * width + t) * 4;
                for (int quad = 0; quad < 4; ++quad) std::memcpy(quads + quad * width * 4, bytes + quad * 4, 4);
            },
            [=](int64_t g, float scale, int32_t sum) {
                scales[g * width + t] = scale;
                sums[g * width + t] = sum;
            });
}

// How far before their use weights are fetched, in bytes, where few tokens share them; half of that was slower.
constexpr int64_t FETCH_AHEAD = 4096;

// Multiplies NR blocks of 16 rows with a panel of NT tokens.
template <int BITS, int NT, int NR>
inline void tile(const uint8_t* const (&weight)[NR], const uint16_t* const (&scale)[NR], const int8_t* x,
                 const float* x_scales, const int32_t* x_sums, int64_t columns, int group, F (&total)[NR][NT]) {
    constexpr int64_t STEP = BITS == 4 ? 8 : 4;  // columns in 64 bytes
    constexpr int32_t ZERO = BITS == 4 ? 8 : 128;
    constexpr bool FETCHES = NT <= 4 && NT < lanes::MAX_TOKENS;
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
                    if (FETCHES) __builtin_prefetch(weight[r] + at * 64 + FETCH_AHEAD, 0, 3);
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
                BTLM_UNROLL for (int r = 0; r < NR; ++r) {
                    if (FETCHES) __builtin_prefetch(weight[r] + at * 64 + FETCH_AHEAD, 0, 3);
                    bytes[r] = lanes::load_bytes(weight[r] + at * 64);
                }
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

inline F with_bias(F x, const Matrix& m, int64_t block) {
    return m.bias == nullptr ? x : lanes::add(x, lanes::load(m.bias + block * LANES));
}

inline void write(Output to, int64_t block, int64_t token, F x) {
    float* out = to.out + token * to.stride + block * LANES;
    lanes::store(out, to.add ? lanes::add(lanes::load(out), x) : x);
}

// Write a token's sums for a block of 16 rows.

inline void put(const Matrix& m, Output to, int64_t block, int64_t token, F sum) {
    write(to, block, token, with_bias(sum, m, block));
}

inline void put_gated(const Matrix& m, const Matrix& gate, Output to, int64_t block, int64_t token, F sum, F gate_sum) {
    write(to, block, token, lanes::mul(with_bias(sum, m, block), silu(with_bias(gate_sum, gate, block))));
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
        if (NR == 2 && gate != nullptr)
            put_gated(m, *gate, to, row, token + t, total[0][t], total[NR - 1][t]);
        else
            for (int r = 0; r < NR; ++r) put(m, to, row + r, token + t, total[r][t]);
    }
}

// Chooses the tile for a panel of `width` tokens, at most NT; only the last panel is narrower than the largest.
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

inline void multiply_packed(const Matrix& m, const Matrix* gate, const Activations& x, Output to, int64_t first, int64_t last) {
    if (m.dtype == Dtype::int4) return multiply_bits<4>(m, gate, x, to, first, last);
    multiply_bits<8>(m, gate, x, to, first, last);
}

}  // namespace
