// What every instruction set offers: kernels for a range of work, without threads and without allocation.
//
// The order of a sum depends neither on the number of tokens nor on the number of threads, so that a token's result has the
// same bits alone or in a batch, in one chunk or many.
#pragma once

#include <cstdint>

namespace btlm {

constexpr int LANES = 16;        // outputs in a block of weights, keys in a block of the cache
constexpr int KEY_BLOCK = 64;    // keys per update of the running maximum
constexpr int RUN_PAGES = 16;    // consecutive pages of the cache in which a head's tokens lie side by side
constexpr int QUERY_TILE = 32;   // queries that share keys while the keys are in the processor's cache
constexpr int MAX_HEAD_DIM = 256;
constexpr int PLAIN_TILE = 4096;  // sums of a task with plain weights: tokens x outputs
constexpr int PLAIN_TOKENS = 64;  // tokens of a task with plain weights
constexpr int PLAIN_DEPTH = 4;    // inputs added per visit of a sum
constexpr int PLAIN_CHUNK = 256;  // inputs of a partial sum
constexpr int PLAIN_OUTPUTS = 32;  // tasks with plain weights begin at multiples of so many outputs

// Kernels that use the tiles of AMX, registers of 16 rows of 64 bytes; see Tiled.
constexpr int TILED_FROM = 4;          // tokens; fewer do not fill a tile, and wait for the weights
constexpr int TILE_ROWS = 16;          // tokens in a panel, outputs in a block
constexpr int TILE_DEPTH = 64;         // inputs in a row
constexpr int MOST_TILED_GROUP = 512;  // inputs of a group that are unpacked at once

enum class Dtype { int4, int8, bfloat16, float32 };
constexpr int bits(Dtype dtype) {
    return dtype == Dtype::int4 ? 4 : dtype == Dtype::int8 ? 8 : dtype == Dtype::bfloat16 ? 16 : 32;
}
constexpr bool packed(Dtype dtype) { return bits(dtype) <= 8; }  // integers with scales

// A weight matrix with `rows` outputs and `columns` inputs.
struct Matrix {
    Dtype dtype;
    const void* weight;     // int4: [rows/16, columns/8, 64]; int8: [rows/16, columns/4, 64]; else a plain array
    const uint16_t* scale;  // for int4 and int8: bf16 [rows/16, columns/group, 16]
    const float* bias;      // [rows], or null
    int64_t rows, columns;
    int group;
    bool input_major;  // a plain array is [columns, rows] instead of [rows, columns]
};

// Eight-bit activations in panels of `Path::max_tokens` tokens; the last panel has the remaining tokens. A panel has values
// [columns/4][tokens][4], and scales and sums [columns/group][tokens].
//
// For tiles, panels have TILE_ROWS tokens; what the last one lacks is padding, whose values are 0. A panel has values
// [columns/TILE_DEPTH][TILE_ROWS][TILE_DEPTH], and scales and sums [columns/group][TILE_ROWS].
struct Activations {
    int8_t* values;
    float* scales;
    int32_t* sums;
    int64_t tokens, columns;
    int group;
};

constexpr int64_t padded_inputs(int64_t inputs) { return (inputs + PLAIN_DEPTH - 1) / PLAIN_DEPTH * PLAIN_DEPTH; }
constexpr int64_t plain_chunks(int64_t inputs) { return (inputs + PLAIN_CHUNK - 1) / PLAIN_CHUNK; }

// Where a product goes: out[token * stride + row]. It replaces the number there, or is added to it.
struct Output {
    float* out;
    int64_t stride;
    bool add;
};

// The keys and values of one layer, in pages of 64 tokens, for `slots` sequences of at most `capacity` tokens (a multiple of
// 64). `table` [slots, capacity/64] has the page of each piece of 64 tokens; sequences can share pages. Heads are padded to
// `width`, a multiple of 16. Blocks of 64 tokens of a head are stored by runs of 16 pages: [runs, heads, pages of the run],
// so that a head's tokens in consecutive pages are read like one array. The last run has the remaining pages. A block is
//   int8: keys u8 = q + 128 [width/4, 64, 4], values s8 [64/4, width, 4], scales of both bf16 [64]
//   int4: q + 8, two per byte: keys [width/8, 64, 4], the low nibbles the first four of eight dimensions; values
//         [64/8, width, 4], the low nibbles the first four of eight tokens; scales too
//   else: keys [64/16, width, 16], values [64, width]
struct Cache {
    Dtype dtype;
    void *keys, *values;
    uint16_t *key_scales, *value_scales;
    const int32_t* table;
    int64_t pages, slots, heads, capacity, head_dim, width;

    // Where the tokens of a head in the page of a position begin, counted in tokens of one head.
    int64_t at(int64_t slot, int64_t head, int64_t position) const {
        const int64_t page = table[slot * (capacity / KEY_BLOCK) + position / KEY_BLOCK], first = page - page % RUN_PAGES;
        const int64_t length = pages - first < RUN_PAGES ? pages - first : RUN_PAGES;
        return (first * heads + head * length + page - first) * KEY_BLOCK;
    }
};

// `count` consecutive tokens of one sequence: rows from `row` on in the batch, positions from `start` on in the slot.
struct Segment {
    int64_t row, slot, start, count;
};

// Kernels on tiles, for several tokens. Their results have the same bits as those of the Path that they belong to: sums within
// a group of weights and within a page of the cache are exact, and all others are added in the same order.
struct Tiled {
    void (*quantize)(const float* x, int64_t stride, Activations& into, int64_t panel);
    void (*multiply_packed)(const Matrix&, const Matrix* gate, const Activations&, Output, int64_t first, int64_t last);
    void (*attend)(const Cache&, int64_t slot, int64_t head, int64_t start, int64_t count, const float* queries,
                   int64_t query_stride, float slope, float scale, float* out, int64_t out_stride);

    static bool fits(const Matrix& m, int64_t tokens) {
        return tokens >= TILED_FROM && m.group % TILE_DEPTH == 0 && m.group <= MOST_TILED_GROUP;
    }
};

// The kernels compiled for one instruction set.
struct Path {
    const char* name;
    int max_tokens;

    // Rounds panel number `panel` of x, fp32 [tokens, columns] with `stride` between tokens, to eight bits.
    void (*quantize)(const float* x, int64_t stride, Activations& into, int64_t panel);
    // Computes blocks `first` to `last` of 16 rows. With a gate, out = product * silu(product with the gate).
    void (*multiply_packed)(const Matrix&, const Matrix* gate, const Activations&, Output, int64_t first, int64_t last);
    // Arranges the inputs of at most PLAIN_TOKENS tokens, fp32 with `stride` between tokens, for an input-major matrix: into
    // tokens * padded_inputs(inputs) floats. More tokens are arranged in tiles of PLAIN_TOKENS, one after the other.
    void (*arrange)(const float* x, int64_t stride, int64_t tokens, int64_t inputs, float* into);
    // Computes outputs `first` to `last` of a plain matrix. x_stride is the number of floats per token, in inputs that are
    // arranged if the matrix is input-major. The scratch holds 3 * PLAIN_TILE floats.
    void (*multiply_plain)(const Matrix&, const Matrix* gate, const float* x, int64_t x_stride, int64_t tokens, Output,
                           int64_t first, int64_t last, float* scratch);
    // The same for one token and an input-major matrix in two steps. The first computes sums over a chunk of inputs for outputs
    // `first` to `last`. The second adds the sums of all chunks, `stride` apart, after which those of the gate lie.
    void (*multiply_chunk)(const Matrix&, const float* x, int64_t chunk, int64_t first, int64_t last, float* sums);
    void (*add_chunks)(const Matrix&, const Matrix* gate, const float* sums, int64_t stride, Output, int64_t first,
                       int64_t last);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t columns, float* out);
    // Reads row `row` of a table, times a factor.
    void (*embed)(const Matrix&, int64_t row, float factor, float* out);
    // Writes one token's key and value of one head to the cache.
    void (*append)(const Cache&, int64_t slot, int64_t head, int64_t position, const float* key, const float* value);
    // Attends with `count` queries of one head, at positions from `start` on, each to the keys up to its own position. The
    // query, key and value of a token stand `heads * head_dim` apart; if they are not finite, its result is NaN.
    void (*attend)(const Cache&, int64_t slot, int64_t head, int64_t start, int64_t count, const float* queries,
                   int64_t query_stride, float slope, float scale, float* out, int64_t out_stride);
    int64_t (*sum_bytes)(const uint8_t* p, int64_t n);

    const Tiled* tiled = nullptr;  // what computes several tokens with packed weights or a packed cache, if not null
};

}  // namespace btlm
