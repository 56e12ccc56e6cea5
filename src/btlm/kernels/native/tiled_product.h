// Products with 4- and 8-bit weights on tiles. A block of 64 bytes of the packed weights is a row of a tile: four inputs of 16
// outputs. 4-bit weights are unpacked to such rows, a group at a time, for many tokens.
#pragma once

#include <type_traits>

#include "packed_product.h"
#include "tile_config.h"

namespace {

// The tiles of a thread, with their configuration, until the end of a scope.
template <class Tiles>
struct Configured {
    explicit Configured(const TileConfig& config) { Tiles::configure(config); }
    ~Configured() { Tiles::release(); }
    Configured(const Configured&) = delete;
    Configured& operator=(const Configured&) = delete;
};

constexpr int64_t TILE_SIZE = TILE_ROWS * TILE_BYTES;
constexpr int64_t BLOCK_TOKENS = 128;  // tokens for which a group is unpacked once; their inputs stay in a core's cache

// Unpacks a line of 4-bit numbers to two lines, the numbers of its low nibbles and those of its high nibbles.
inline void unpack_line(const uint8_t* from, uint8_t* low, uint8_t* high) {
    const B both = lanes::load_bytes(from);
    lanes::bstore(low, lanes::low_nibbles(both));
    lanes::bstore(high, lanes::high_nibbles(both));
}

inline void quantize_tiled(const float* x, int64_t stride, Activations& into, int64_t panel) {
    const int64_t first = panel * TILE_ROWS, groups = into.columns / into.group;
    int8_t* values = into.values + first * into.columns;
    float* scales = into.scales + first * groups;
    int32_t* sums = into.sums + first * groups;
    const int64_t left = into.tokens - first, count = left < TILE_ROWS ? left : TILE_ROWS;
    for (int64_t t = 0; t < count; ++t)
        quantize_token(
            x + (first + t) * stride, into.columns, into.group,
            [=](int64_t column, const uint8_t* bytes) {
                std::memcpy(values + (column / TILE_DEPTH * TILE_ROWS + t) * TILE_DEPTH + column % TILE_DEPTH, bytes, LANES);
            },
            [=](int64_t g, float scale, int32_t sum) {
                scales[g * TILE_ROWS + t] = scale;
                sums[g * TILE_ROWS + t] = sum;
            });
    for (int64_t t = count; t < TILE_ROWS; ++t)
        for (int64_t tile = 0; tile < into.columns / TILE_DEPTH; ++tile)
            std::memset(values + (tile * TILE_ROWS + t) * TILE_DEPTH, 0, TILE_DEPTH);
}

// The sums of a group of inputs for NR blocks of 16 outputs and NP panels of tokens: [NP][NR][TILE_ROWS][LANES].
template <class Tiles, int NP, int NR>
inline void multiply_group(const int8_t* const (&panel)[2], const uint8_t* const (&weight)[2], int64_t tiles, int32_t* sums) {
    const auto each = [](auto on) {
        on(std::integral_constant<int, 0>{});
        if constexpr (NP == 2) on(std::integral_constant<int, 1>{});
    };
    const auto each_block = [](auto on) {
        on(std::integral_constant<int, 0>{});
        if constexpr (NR == 2) on(std::integral_constant<int, 1>{});
    };
    // Tiles 0 to 3 hold sums, 4 and 5 tokens, 6 and 7 weights.
    each([&](auto p) { each_block([&](auto r) { Tiles::template zero<2 * p + r>(); }); });
    for (int64_t tile = 0; tile < tiles; ++tile) {
        each([&](auto p) { Tiles::template load<4 + p>(panel[p] + tile * TILE_SIZE, TILE_DEPTH); });
        each_block([&](auto r) { Tiles::template load<6 + r>(weight[r] + tile * TILE_SIZE, TILE_BYTES); });
        each([&](auto p) {
            each_block([&](auto r) { Tiles::template multiply_signed_unsigned<2 * p + r, 4 + p, 6 + r>(); });
        });
    }
    each([&](auto p) {
        each_block([&](auto r) { Tiles::template store<2 * p + r>(sums + (p * NR + r) * TILE_ROWS * LANES, TILE_BYTES); });
    });
}

// Multiplies NR blocks of 16 outputs with up to BLOCK_TOKENS tokens.
template <class Tiles, int BITS, int NR>
void multiply_blocks(const Matrix& m, const Matrix* gate, const Activations& x, Output to, int64_t row, int64_t token,
                     int64_t count) {
    constexpr int32_t ZERO = BITS == 4 ? 8 : 128;
    const int64_t groups = x.columns / x.group, tiles = x.group / TILE_DEPTH, group_bytes = x.group * LANES * BITS / 8;
    const uint8_t* weight[NR];
    const uint16_t* scale[NR];
    for (int r = 0; r < NR; ++r) {
        const Matrix& source = gate != nullptr && r == 1 ? *gate : m;
        const int64_t at = gate != nullptr ? row : row + r;
        weight[r] = static_cast<const uint8_t*>(source.weight) + at * groups * group_bytes;
        scale[r] = source.scale + at * groups * LANES;
    }
    alignas(64) float total[BLOCK_TOKENS][NR][LANES];
    alignas(64) uint8_t unpacked[2][BITS == 4 ? NR : 1][BITS == 4 ? MOST_TILED_GROUP * LANES : 1];
    alignas(64) int32_t sums[2][2 * NR * TILE_ROWS * LANES];
    for (int64_t t = 0; t < count; ++t)
        for (int r = 0; r < NR; ++r) lanes::store(total[t][r], lanes::zero());
    // What was just stored cannot be loaded to a tile before it has left the store buffer, and sums of tiles are late, too. So
    // a group is unpacked while the one before it is multiplied, and sums are added while the next ones are computed.
    const auto prepare = [&](int64_t g) {
        for (int r = 0; r < NR; ++r) {
            const uint8_t* from = weight[r] + g * group_bytes;
            for (int64_t at = 0; at < group_bytes; at += TILE_BYTES) {
                __builtin_prefetch(from + at + FETCH_AHEAD, 0, 3);
                if constexpr (BITS == 4)
                    unpack_line(from + at, unpacked[g % 2][r] + 2 * at, unpacked[g % 2][r] + 2 * at + TILE_BYTES);
            }
        }
    };
    const auto add = [&](int64_t g, int64_t first, const int32_t* of_group) {
        F scales[NR];
        for (int r = 0; r < NR; ++r) scales[r] = lanes::load_bf16(scale[r] + g * LANES);
        for (int64_t t = 0; t < 2 * TILE_ROWS && first + t < count; ++t) {
            const int64_t p = t / TILE_ROWS, inside = t % TILE_ROWS;
            const int64_t of = (token + first + p * TILE_ROWS) * groups + g * TILE_ROWS + inside;
            const F factor = lanes::set(x.scales[of]);
            const I start = lanes::iset(-ZERO * x.sums[of]);
            BTLM_UNROLL for (int r = 0; r < NR; ++r) {
                const I sum = lanes::add(lanes::iload(of_group + ((p * NR + r) * TILE_ROWS + inside) * LANES), start);
                float* at = total[first + t][r];
                lanes::store(at, lanes::fma(lanes::to_float(sum), lanes::mul(scales[r], factor), lanes::load(at)));
            }
        }
    };
    int64_t step = 0, group_before = 0, first_before = 0;
    prepare(0);
    for (int64_t g = 0; g < groups; ++g) {
        if (g + 1 < groups) prepare(g + 1);
        const uint8_t* lines[2] = {};
        for (int r = 0; r < NR; ++r) lines[r] = BITS == 4 ? unpacked[g % 2][BITS == 4 ? r : 0] : weight[r] + g * group_bytes;
        for (int64_t first = 0; first < count; first += 2 * TILE_ROWS) {
            const int64_t panels = count - first > TILE_ROWS ? 2 : 1;
            const int8_t* panel[2] = {};
            for (int64_t p = 0; p < panels; ++p)
                panel[p] = x.values + (token + first + p * TILE_ROWS) * x.columns + g * x.group * TILE_ROWS;
            const auto multiply = panels == 2 ? multiply_group<Tiles, 2, NR> : multiply_group<Tiles, 1, NR>;
            multiply(panel, lines, tiles, sums[step % 2]);
            if (step > 0) add(group_before, first_before, sums[(step - 1) % 2]);
            group_before = g, first_before = first, ++step;
        }
    }
    add(group_before, first_before, sums[(step - 1) % 2]);
    for (int64_t t = 0; t < count; ++t) {
        if (NR == 2 && gate != nullptr)
            put_gated(m, *gate, to, row, token + t, lanes::load(total[t][0]), lanes::load(total[t][NR - 1]));
        else
            for (int r = 0; r < NR; ++r) put(m, to, row + r, token + t, lanes::load(total[t][r]));
    }
}

template <class Tiles>
void multiply_tiled(const Matrix& m, const Matrix* gate, const Activations& x, Output to, int64_t first, int64_t last) {
    const int64_t rows = x.tokens < TILE_ROWS ? x.tokens : TILE_ROWS;
    const Configured<Tiles> tiles(PRODUCT_TILES.of[rows - 1]);
    const bool four = m.dtype == Dtype::int4;
    for (int64_t token = 0; token < x.tokens; token += BLOCK_TOKENS) {
        const int64_t left = x.tokens - token, count = left < BLOCK_TOKENS ? left : BLOCK_TOKENS;
        for (int64_t row = first; row < last;) {
            const bool pair = gate != nullptr || row + 1 < last;
            const auto multiply = pair ? (four ? multiply_blocks<Tiles, 4, 2> : multiply_blocks<Tiles, 8, 2>)
                                       : (four ? multiply_blocks<Tiles, 4, 1> : multiply_blocks<Tiles, 8, 1>);
            multiply(m, gate, x, to, row, token, count);
            row += pair && gate == nullptr ? 2 : 1;
        }
    }
}

}  // namespace
