// Products with bf16 and fp32 weights, computed in fp32.
//
// The inputs of an input-major matrix are added by chunks of PLAIN_CHUNK. A chunk is cut into PLAIN_DEPTH runs of consecutive
// inputs, and a visit adds one input of each run to a sum. So a task with all outputs of a chunk reads PLAIN_DEPTH long pieces
// of memory from front to back, which is how memory is read fastest, and loads and stores a sum once per PLAIN_DEPTH inputs.
#pragma once

#include "elements.h"

namespace {

constexpr int PAIR = 2 * LANES;  // outputs computed together
static_assert(PLAIN_OUTPUTS % PAIR == 0 && PLAIN_TILE / PLAIN_TOKENS >= PAIR);

struct Pair {
    F a, b;
};

inline Pair zeros() { return {lanes::zero(), lanes::zero()}; }
inline Pair add(Pair x, Pair y) { return {lanes::add(x.a, y.a), lanes::add(x.b, y.b)}; }

template <class T>
inline Pair load_pair(const T* p) {
    return {load_some(p, LANES), load_some(p + LANES, LANES)};
}

template <class T>
inline Pair load_pair(const T* p, int64_t n) {
    if (n >= PAIR) return load_pair(p);
    return {load_some(p, n), n > LANES ? load_some(p + LANES, n - LANES) : lanes::zero()};
}

inline void store_pair(float* p, Pair x) {
    lanes::store(p, x.a);
    lanes::store(p + LANES, x.b);
}

// Prefetches what is read a short time later; the processor foresees the next lines of a row, and not those of other rows.
template <class T>
inline void fetch_pair(const T* p) {
    for (int64_t at = 0; at < PAIR; at += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + at, 0, 3);
}

// A chunk of inputs.
struct Chunk {
    int64_t first, count, run;

    Chunk(int64_t chunk, int64_t inputs) : first(chunk * PLAIN_CHUNK) {
        count = inputs - first < PLAIN_CHUNK ? inputs - first : PLAIN_CHUNK;
        run = (count + PLAIN_DEPTH - 1) / PLAIN_DEPTH;
    }
    // The number of inputs of visit `visit`; they are `run` apart, the first is `first + visit`.
    int64_t depth(int64_t visit) const { return (count - visit + run - 1) / run; }
};

// The inputs of a chunk in the order in which they are used: [run][tokens][PLAIN_DEPTH], padded with zeros.
void arrange(const float* x, int64_t stride, int64_t tokens, int64_t inputs, float* to) {
    for (int64_t c = 0; c < plain_chunks(inputs); ++c) {
        const Chunk chunk(c, inputs);
        for (int64_t visit = 0; visit < chunk.run; ++visit) {
            const int64_t depth = chunk.depth(visit);
            for (int64_t t = 0; t < tokens; ++t, to += PLAIN_DEPTH)
                for (int64_t i = 0; i < PLAIN_DEPTH; ++i)
                    to[i] = i < depth ? x[t * stride + chunk.first + visit + i * chunk.run] : 0.0f;
        }
    }
}

// Adds the products of VISITS visits to the sums of a pair of outputs. A visit has inputs whose weights are `apart`; the next
// one is `next` behind.
template <int VISITS, class T>
BTLM_INLINE void add_tile(const T* weight, int64_t apart, int64_t next, const float* in, int64_t tokens, float* sums,
                          int64_t sum_stride) {
    Pair w[VISITS][PLAIN_DEPTH];
    BTLM_UNROLL for (int v = 0; v < VISITS; ++v) {
        BTLM_UNROLL for (int i = 0; i < PLAIN_DEPTH; ++i) {
            w[v][i] = load_pair(weight + v * next + i * apart);
            fetch_pair(weight + (v + VISITS) * next + i * apart);
        }
    }
    for (int64_t t = 0; t < tokens; ++t, sums += sum_stride) {
        Pair total = load_pair(sums);
        BTLM_UNROLL for (int v = 0; v < VISITS; ++v) {
            BTLM_UNROLL for (int i = 0; i < PLAIN_DEPTH; ++i) {
                const F value = lanes::set(in[(v * tokens + t) * PLAIN_DEPTH + i]);
                total = {lanes::fma(value, w[v][i].a, total.a), lanes::fma(value, w[v][i].b, total.b)};
            }
        }
        store_pair(sums, total);
    }
}

// The same for one token, one visit and `count` pairs of outputs; weights are multiplied as they are loaded.
template <class T>
BTLM_INLINE void add_tiles(const T* weight, int64_t apart, int64_t count, const float* in, float* sums) {
    constexpr int64_t AHEAD = 2048 / static_cast<int64_t>(sizeof(T));  // 32 lines; 16 and 64 were slower
    F value[PLAIN_DEPTH];
    BTLM_UNROLL for (int i = 0; i < PLAIN_DEPTH; ++i) value[i] = lanes::set(in[i]);
    for (int64_t at = 0; at < count * PAIR; at += PAIR) {
        Pair total = load_pair(sums + at);
        BTLM_UNROLL for (int i = 0; i < PLAIN_DEPTH; ++i) {
            const T* from = weight + i * apart + at;
            const Pair w = load_pair(from);
            __builtin_prefetch(from + AHEAD, 0, 3);
            total = {lanes::fma(value[i], w.a, total.a), lanes::fma(value[i], w.b, total.b)};
        }
        store_pair(sums + at, total);
    }
}

// The same for fewer inputs or outputs.
template <class T>
void add_rest(const T* weight, int64_t apart, int64_t depth, int64_t width, const float* in, int64_t tokens, float* sums,
              int64_t sum_stride) {
    for (int64_t t = 0; t < tokens; ++t, in += PLAIN_DEPTH, sums += sum_stride) {
        Pair total = load_pair(sums);
        for (int64_t i = 0; i < depth; ++i) {
            const Pair w = load_pair(weight + i * apart, width);
            const F value = lanes::set(in[i]);
            total = {lanes::fma(value, w.a, total.a), lanes::fma(value, w.b, total.b)};
        }
        store_pair(sums, total);
    }
}

// sums[t][c] = sum over the inputs of a chunk of x[t][k] * weight[k][c], for `width` outputs from `row` on.
template <class T>
void sum_chunk(const Matrix& m, const float* x, int64_t tokens, int64_t c, int64_t row, int64_t width, float* sums,
               int64_t sum_stride) {
    const Chunk chunk(c, m.columns);
    const int64_t apart = chunk.run * m.rows, whole = width / PAIR * PAIR;
    const T* const weight = static_cast<const T*>(m.weight) + chunk.first * m.rows + row;
    const float* const in = x + chunk.first * tokens;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t at = 0; at < width; at += PAIR) store_pair(sums + t * sum_stride + at, zeros());
    for (int64_t visit = 0; visit < chunk.run;) {
        const T* from = weight + visit * m.rows;
        const float* values = in + visit * tokens * PLAIN_DEPTH;
        const bool two = tokens > 1 && visit + 1 < chunk.run && chunk.depth(visit + 1) == PLAIN_DEPTH;
        const bool one = !two && chunk.depth(visit) == PLAIN_DEPTH;
        if (one && tokens == 1) add_tiles(from, apart, whole / PAIR, values, sums);
        for (int64_t at = 0; tokens > 1 && at < whole; at += PAIR) {
            if (two) add_tile<2>(from + at, apart, m.rows, values, tokens, sums + at, sum_stride);
            if (one) add_tile<1>(from + at, apart, m.rows, values, tokens, sums + at, sum_stride);
        }
        for (const int64_t end = visit + (two ? 2 : 1); visit < end; ++visit, from += m.rows, values += tokens * PLAIN_DEPTH)
            for (int64_t at = one || two ? whole : 0; at < width; at += PAIR)
                add_rest(from + at, apart, chunk.depth(visit), width - at, values, tokens, sums + at, sum_stride);
    }
}

// Adds the products of LANES inputs, or of the last `size` inputs unless they are WHOLE.
template <bool WHOLE, int R, int N, class T>
BTLM_INLINE void add_inputs(const T* row, int64_t apart, const float* x, int64_t x_stride, int64_t size, F (&total)[R][N]) {
    F w[R];
    BTLM_UNROLL for (int r = 0; r < R; ++r) w[r] = load_some(row + r * apart, WHOLE ? LANES : size);
    BTLM_UNROLL for (int t = 0; t < N; ++t) {
        const F value = load_some(x + t * x_stride, WHOLE ? LANES : size);
        BTLM_UNROLL for (int r = 0; r < R; ++r) total[r][t] = lanes::fma(w[r], value, total[r][t]);
    }
}

// sums[t][r] = x[t] . weight[r] for R rows of a row-major matrix and N tokens.
template <int R, int N, class T>
void dot_rows(const T* row, const float* x, int64_t x_stride, int64_t inputs, float* sums, int64_t sum_stride) {
    F total[R][N];
    BTLM_UNROLL for (int r = 0; r < R; ++r)
        BTLM_UNROLL for (int t = 0; t < N; ++t) total[r][t] = lanes::zero();
    int64_t at = 0;
    _Pragma("GCC unroll 4") for (; at + LANES <= inputs; at += LANES)
        add_inputs<true>(row + at, inputs, x + at, x_stride, LANES, total);
    if (at < inputs) add_inputs<false>(row + at, inputs, x + at, x_stride, inputs - at, total);
    BTLM_UNROLL for (int r = 0; r < R; ++r)
        BTLM_UNROLL for (int t = 0; t < N; ++t) sums[t * sum_stride + r] = lanes::reduce_add(total[r][t]);
}

template <int R, int N, class T>
void dot_tokens(const T* row, const float* x, int64_t x_stride, int64_t tokens, int64_t inputs, float* sums,
                int64_t sum_stride) {
    if constexpr (N > 1)
        if (tokens < N) return dot_tokens<R, N - 1>(row, x, x_stride, tokens, inputs, sums, sum_stride);
    dot_rows<R, N>(row, x, x_stride, inputs, sums, sum_stride);
}

// The same for `rows` rows and all tokens.
template <class T>
void sum_rows(const T* weight, const float* x, int64_t x_stride, int64_t tokens, int64_t inputs, int64_t rows, float* sums,
              int64_t sum_stride) {
    constexpr int N = lanes::ROW_BLOCKS == 2 ? 4 : 2, R = N;  // 16 sums in registers, or 4
    const bool one_by_one = tokens <= 2;  // so that memory is read from front to back; more tokens share the loads of inputs
    for (int64_t t = 0; t < tokens; t += N) {
        for (int64_t r = 0; r < rows;) {
            const bool several = !one_by_one && rows - r >= R;
            const auto dot = several ? dot_tokens<R, N, T> : dot_tokens<1, N, T>;
            dot(weight + r * inputs, x + t * x_stride, x_stride, tokens - t, inputs, sums + t * sum_stride + r, sum_stride);
            r += several ? R : 1;
        }
    }
}

// Adds biases, opens gates, and writes the products for `width` outputs from `row` on.
void finish(const Matrix& m, const Matrix* gate, int64_t tokens, int64_t row, int64_t width, const float* sums,
            const float* gate_sums, int64_t sum_stride, Output to) {
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t c = 0; c < width; c += LANES) {
            const int64_t n = width - c;
            const auto value = [&](const Matrix& source, const float* of) {
                const F sum = lanes::load(of + t * sum_stride + c);
                return source.bias == nullptr ? sum : lanes::add(sum, load_some(source.bias + row + c, n));
            };
            F product = value(m, sums);
            if (gate != nullptr) product = lanes::mul(product, silu(value(*gate, gate_sums)));
            float* out = to.out + t * to.stride + row + c;
            if (to.add) product = lanes::add(product, load_some(out, n));
            store_some(out, product, n);
        }
    }
}

template <class T>
void multiply_plain(const Matrix& m, const Matrix* gate, const float* x, int64_t x_stride, int64_t tokens, Output to,
                    int64_t first, int64_t last, float* scratch) {
    float* const part = scratch + 2 * PLAIN_TILE;
    const auto sum = [&](const Matrix& source, const float* from, int64_t count, int64_t row, int64_t width, int64_t stride,
                         float* total) {
        if (!source.input_major)
            return sum_rows(static_cast<const T*>(source.weight) + row * source.columns, from, x_stride, count, source.columns,
                            width, total, stride);
        sum_chunk<T>(source, from, count, 0, row, width, total, stride);
        for (int64_t chunk = 1; chunk < plain_chunks(source.columns); ++chunk) {
            sum_chunk<T>(source, from, count, chunk, row, width, part, stride);
            for (int64_t t = 0; t < count; ++t)
                for (int64_t at = t * stride; at < t * stride + width; at += PAIR)
                    store_pair(total + at, add(load_pair(total + at), load_pair(part + at)));
        }
    };
    for (int64_t token = 0; token < tokens; token += PLAIN_TOKENS) {
        const int64_t count = tokens - token < PLAIN_TOKENS ? tokens - token : PLAIN_TOKENS;
        const int64_t widest = PLAIN_TILE / count / PAIR * PAIR;
        for (int64_t row = first; row < last; row += widest) {
            const int64_t width = last - row < widest ? last - row : widest;
            sum(m, x + token * x_stride, count, row, width, widest, scratch);
            if (gate != nullptr) sum(*gate, x + token * x_stride, count, row, width, widest, scratch + PLAIN_TILE);
            finish(m, gate, count, row, width, scratch, scratch + PLAIN_TILE, widest,
                   {to.out + token * to.stride, to.stride, to.add});
        }
    }
}

void multiply_plain(const Matrix& m, const Matrix* gate, const float* x, int64_t x_stride, int64_t tokens, Output to,
                    int64_t first, int64_t last, float* scratch) {
    const auto multiply = m.dtype == Dtype::float32 ? multiply_plain<float> : multiply_plain<uint16_t>;
    multiply(m, gate, x, x_stride, tokens, to, first, last, scratch);
}

void multiply_chunk(const Matrix& m, const float* x, int64_t chunk, int64_t first, int64_t last, float* sums) {
    const auto sum = m.dtype == Dtype::float32 ? sum_chunk<float> : sum_chunk<uint16_t>;
    sum(m, x, 1, chunk, first, last - first, sums, 0);
}

void add_chunks(const Matrix& m, const Matrix* gate, const float* sums, int64_t stride, Output to, int64_t first,
                int64_t last) {
    const int64_t chunks = plain_chunks(m.columns);
    for (int64_t row = first; row < last; row += PAIR) {
        float totals[2][PAIR];
        for (int which = 0; which < (gate != nullptr ? 2 : 1); ++which) {
            const float* of = sums + which * chunks * stride + row;
            Pair total = load_pair(of);
            for (int64_t chunk = 1; chunk < chunks; ++chunk) total = add(total, load_pair(of + chunk * stride));
            store_pair(totals[which], total);
        }
        finish(m, gate, 1, row, last - row < PAIR ? last - row : PAIR, totals[0], totals[1], 0, to);
    }
}

}  // namespace
