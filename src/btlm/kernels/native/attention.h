// Causal attention with ALiBi of one head's queries over the cache, with a running softmax.
#pragma once

#include "cache_write.h"
#include "elements.h"

namespace {

// A query and its running softmax.
struct Query {
    float most, sum;
    float scale;        // packed: scale of the query times scale of the scores
    int32_t offset;     // packed: cancels what the keys' offset of 8 or 128 adds to a product
    alignas(64) float total[MAX_HEAD_DIM];
    alignas(64) float values[MAX_HEAD_DIM];
    alignas(64) int8_t bytes[MAX_HEAD_DIM];
};

// Keeps the first `visible` lanes and sets the others to minus infinity.
inline F hide(F x, int64_t visible) {
    if (visible >= LANES) return x;
    float part[LANES];
    lanes::store(part, x);
    for (int64_t i = visible < 0 ? 0 : visible; i < LANES; ++i) part[i] = -INFINITY;
    return lanes::load(part);
}

// Adds ALiBi to the scores of a block of keys, hides keys after the query's position, and turns the scores into probabilities
// relative to the running maximum. Returns the factor by which the sums so far have to be multiplied.
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

// Prefetches a line that is read some time later: blocks are too short for the processor to do so by itself.
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// A query's weights for the values of a page: 16-bit integers, and what turns their sums into numbers.
struct Weighted {
    alignas(64) uint8_t high[KEY_BLOCK], low[KEY_BLOCK];  // the bytes of the integers
    I high_start, low_start;                              // cancel what the values' offset of 8 adds to the sums
    F unit, kept;                                         // factors of the sums of this page, and of those before it
};

// Adds the sums of the high and the low bytes times the values to 16 dimensions of a query's total.
inline void add_to_total(const Weighted& w, I of_high, I of_low, float* total) {
    const F sum = lanes::fma(lanes::to_float(of_high), lanes::set(256.0f), lanes::to_float(of_low));
    lanes::store(total, lanes::fma(sum, w.unit, lanes::mul(lanes::load(total), w.kept)));
}

// total = total * kept + unit * (sum over a page of (256 * high + low) * value), for N * 16 dimensions. Meanwhile it
// prefetches what lies `ahead` of the values.
template <int BITS, int N>
inline void sum_values(const Weighted& w, const uint8_t* values, int64_t stride, int64_t ahead, float* total) {
    constexpr int64_t STEP = BITS == 4 ? 8 : 4;  // tokens in four bytes
    I of_high[N], of_low[N];
    BTLM_UNROLL for (int i = 0; i < N; ++i) {
        of_high[i] = w.high_start;
        of_low[i] = w.low_start;
    }
    for (int64_t t = 0; t < KEY_BLOCK; t += STEP) {
        const int32_t four_high = load_quad(w.high + t), four_low = load_quad(w.low + t);
        BTLM_UNROLL for (int i = 0; i < N; ++i) {
            const uint8_t* line = values + t / STEP * stride + i * 64;
            const B bytes = lanes::load_bytes(line);
            fetch(line + ahead);
            const B four = BITS == 4 ? lanes::low_nibbles(bytes) : bytes;
            of_high[i] = lanes::dot_signed(of_high[i], four_high, four);
            of_low[i] = lanes::dot_signed(of_low[i], four_low, four);
            if constexpr (BITS == 4) {
                const B next = lanes::high_nibbles(bytes);
                of_high[i] = lanes::dot_signed(of_high[i], load_quad(w.high + t + 4), next);
                of_low[i] = lanes::dot_signed(of_low[i], load_quad(w.low + t + 4), next);
            }
        }
    }
    BTLM_UNROLL for (int i = 0; i < N; ++i) add_to_total(w, of_high[i], of_low[i], total + i * LANES);
}

inline int32_t sum_block(const uint8_t* bytes) {  // KEY_BLOCK bytes
    return lanes::reduce_add(lanes::dot_bytes(lanes::iset(0), lanes::load_bytes(bytes), 0x01010101));
}

// Turns the products of a query with the keys of a page into weights: applies the scales and ALiBi, updates the softmax, and
// rounds the probabilities times the scales of the values to 16 bits.
template <int BITS>
BTLM_INLINE Weighted weigh(const Cache& cache, const I (&products)[KEY_BLOCK / LANES], int64_t at, int64_t first_key,
                           int64_t position, float slope, Query& q) {
    constexpr int BLOCKS = KEY_BLOCK / LANES;
    F scores[BLOCKS];
    for (int s = 0; s < BLOCKS; ++s) {
        const F scale = lanes::mul(lanes::load_bf16(cache.key_scales + at + s * LANES), lanes::set(q.scale));
        scores[s] = lanes::mul(lanes::to_float(products[s]), scale);
    }
    const float correction = softmax_step(q, scores, first_key, position, slope);
    F most = lanes::zero();
    for (int s = 0; s < BLOCKS; ++s) {
        scores[s] = lanes::mul(scores[s], lanes::load_bf16(cache.value_scales + at + s * LANES));
        most = lanes::max(most, scores[s]);
    }
    const float largest_weight = lanes::reduce_max(most);
    const bool some = largest_weight > SMALLEST;
    const F to_16_bits = lanes::set(some ? 65535.0f / largest_weight : 0.0f);
    Weighted w;
    for (int s = 0; s < BLOCKS; ++s) {
        const I weight = lanes::to_int(lanes::mul(scores[s], to_16_bits));
        lanes::store_bytes(w.low + s * LANES, weight);
        lanes::store_bytes(w.high + s * LANES, lanes::shift_right_8(weight));
    }
    w.high_start = lanes::iset(BITS == 4 ? -8 * sum_block(w.high) : 0);
    w.low_start = lanes::iset(BITS == 4 ? -8 * sum_block(w.low) : 0);
    w.unit = lanes::set(some ? largest_weight / 65535.0f : 0.0f);
    w.kept = lanes::set(correction);
    return w;
}

// sum_values for the remaining dimensions of a head, at most 128 at a time.
template <int BITS>
inline auto value_sums(int64_t dimensions) {
    constexpr decltype(&sum_values<BITS, 1>) SIZES[] = {
        sum_values<BITS, 1>, sum_values<BITS, 2>, sum_values<BITS, 3>, sum_values<BITS, 4>,
        sum_values<BITS, 5>, sum_values<BITS, 6>, sum_values<BITS, 7>, sum_values<BITS, 8>};
    return SIZES[(dimensions < 8 * LANES ? dimensions : 8 * LANES) / LANES - 1];
}

// Attends with one query to the keys of a page, which begin at `at`; those at `next` come next.
template <int BITS>
inline void attend_block_packed(const Cache& cache, int64_t at, int64_t next, int64_t first_key, int64_t position, float slope,
                                Query& q) {
    constexpr int BLOCKS = KEY_BLOCK / LANES;
    const int64_t row = cache.width * BITS / 8;
    const auto* keys = static_cast<const uint8_t*>(cache.keys) + at * row;
    const auto* values = static_cast<const uint8_t*>(cache.values) + at * row;
    const int64_t ahead = (next - at) * row;
    I products[BLOCKS];
    for (int s = 0; s < BLOCKS; ++s) products[s] = lanes::iset(q.offset);
    for (int64_t c = 0; c < row / 4; ++c) {
        if constexpr (BITS == 4) {
            const int32_t quad = load_quad(q.bytes + c * 8), next_quad = load_quad(q.bytes + c * 8 + 4);
            BTLM_UNROLL for (int s = 0; s < BLOCKS; ++s) {
                const B both = lanes::load_bytes(keys + (c * BLOCKS + s) * 64);
                fetch(keys + (c * BLOCKS + s) * 64 + ahead);
                products[s] = lanes::dot_nibbles(products[s], lanes::low_nibbles(both), quad);
                products[s] = lanes::dot_nibbles(products[s], lanes::high_nibbles(both), next_quad);
            }
        } else {
            const int32_t quad = load_quad(q.bytes + c * 4);
            BTLM_UNROLL for (int s = 0; s < BLOCKS; ++s) {
                const uint8_t* line = keys + (c * BLOCKS + s) * 64;
                products[s] = lanes::dot_bytes(products[s], lanes::load_bytes(line), quad);
                fetch(line + ahead);
            }
        }
    }
    const Weighted w = weigh<BITS>(cache, products, at, first_key, position, slope, q);
    for (int64_t d = 0; d < cache.width; d += 8 * LANES) {
        const auto add_values = value_sums<BITS>(cache.width - d);
        add_values(w, values + d * 4, cache.width * 4, ahead, q.total + d);
    }
}

inline F load_lanes(const float* p) { return lanes::load(p); }
inline F load_lanes(const uint16_t* p) { return lanes::load_bf16(p); }

template <class T>
inline void attend_block_plain(const Cache& cache, int64_t at, int64_t, int64_t first_key, int64_t position, float slope,
                               Query& q) {
    constexpr int BLOCKS = KEY_BLOCK / LANES;
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
    if (packed(cache.dtype)) {
        std::memset(q.bytes, 0, sizeof q.bytes);
        q.scale = from_bf16(quantize_head(values, cache.head_dim, 127.0f, q.bytes)) * scale;
        q.offset = 0;
        for (int64_t d = 0; d < cache.head_dim; ++d) q.offset -= (cache.dtype == Dtype::int4 ? 8 : 128) * q.bytes[d];
    } else {
        for (int64_t d = 0; d < cache.head_dim; ++d) q.values[d] = values[d] * scale;
    }
}

// Attends with `count` queries. `attend_page(at, next, key, position, first, n, tile)` attends with queries `first` to n of a
// tile, which begins at `position`, to the page whose first key is `key`.
template <class AttendPage>
inline void attend_pages(const Cache& cache, int64_t slot, int64_t head, int64_t first, int64_t count, const float* queries,
                         int64_t query_stride, float scale, float* out, int64_t out_stride, const AttendPage& attend_page) {
    Query tile[QUERY_TILE];
    for (int64_t done = 0; done < count; done += QUERY_TILE) {
        const int64_t n = count - done < QUERY_TILE ? count - done : QUERY_TILE, position = first + done;
        for (int64_t i = 0; i < n; ++i) start(cache, queries + (done + i) * query_stride, scale, tile[i]);
        for (int64_t key = 0; key < position + n; key += KEY_BLOCK) {
            const int64_t at = cache.at(slot, head, key);
            const int64_t next = key + KEY_BLOCK < position + n ? cache.at(slot, head, key + KEY_BLOCK)
                                 : head + 1 < cache.heads       ? cache.at(slot, head + 1, 0)
                                                                : at;
            attend_page(at, next, key, position, key > position ? key - position : 0, n, tile);
        }
        for (int64_t i = 0; i < n; ++i) {
            const float* own = queries + (done + i) * query_stride;  // query, and the key and value that the token appended
            const int64_t width = cache.heads * cache.head_dim;
            const bool finite = !std::isnan(largest(own, cache.head_dim) + largest(own + width, cache.head_dim) +
                                            largest(own + 2 * width, cache.head_dim));
            const F whole = lanes::set(finite ? tile[i].sum : NAN);
            for (int64_t d = 0; d < cache.head_dim; d += LANES)
                store_some(out + (done + i) * out_stride + d, lanes::div(lanes::load(tile[i].total + d), whole),
                           cache.head_dim - d);
        }
    }
}

inline void attend(const Cache& cache, int64_t slot, int64_t head, int64_t first, int64_t count, const float* queries,
                   int64_t query_stride, float slope, float scale, float* out, int64_t out_stride) {
    const auto step = cache.dtype == Dtype::int4       ? attend_block_packed<4>
                      : cache.dtype == Dtype::int8     ? attend_block_packed<8>
                      : cache.dtype == Dtype::bfloat16 ? attend_block_plain<uint16_t>
                                                       : attend_block_plain<float>;
    attend_pages(cache, slot, head, first, count, queries, query_stride, scale, out, out_stride,
                 [&](int64_t at, int64_t next, int64_t key, int64_t position, int64_t i, int64_t n, Query* tile) {
                     for (; i < n; ++i) step(cache, at, next, key, position + i, slope, tile[i]);
                 });
}

}  // namespace
