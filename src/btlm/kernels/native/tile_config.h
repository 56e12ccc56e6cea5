// The shapes of AMX's eight tiles, as the processor loads them (Intel 64 and IA-32 Architectures Software Developer's Manual,
// volume 1, section 18.3, "TILECFG").
#pragma once

#include <cstdint>

#include "kernels.h"

namespace btlm {

constexpr int NUM_TILES = 8;
constexpr int TILE_BYTES = 64;  // of a row

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    constexpr void set(int tile, int count, int bytes) {
        rows[tile] = static_cast<uint8_t>(count);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};
static_assert(sizeof(TileConfig) == 64);

constexpr TileConfig full_tiles() {
    TileConfig config;
    for (int tile = 0; tile < NUM_TILES; ++tile) config.set(tile, TILE_ROWS, TILE_BYTES);
    return config;
}

struct ProductConfigs {
    TileConfig of[TILE_ROWS];  // for panels of 1, 2, ... 16 tokens
};

// Tiles 0 to 3 hold sums and 4 and 5 tokens, a row for each token; 6 and 7 hold weights.
constexpr ProductConfigs product_tiles() {
    ProductConfigs configs;
    for (int i = 0; i < TILE_ROWS; ++i) {
        configs.of[i] = full_tiles();
        for (int tile = 0; tile < 6; ++tile) configs.of[i].set(tile, i + 1, TILE_BYTES);
    }
    return configs;
}

// Rows in a tile of keys, each of which holds four dimensions: the most that cut a head of so many quads into equal tiles.
constexpr int key_rows(int quads) {
    int rows = quads < TILE_ROWS ? quads : TILE_ROWS;
    while (quads % rows != 0) --rows;
    return rows;
}

struct AttentionConfigs {
    TileConfig of[MAX_HEAD_DIM / LANES];  // for heads of 16, 32, ... dimensions
};

// Tile 4 holds queries and tile 5 keys; all others are full.
constexpr AttentionConfigs attention_tiles() {
    AttentionConfigs configs;
    for (int i = 0; i < MAX_HEAD_DIM / LANES; ++i) {
        const int rows = key_rows((i + 1) * LANES / 4);
        configs.of[i] = full_tiles();
        configs.of[i].set(4, TILE_ROWS, rows * 4);
        configs.of[i].set(5, rows, TILE_BYTES);
    }
    return configs;
}

// Constants in memory. Configurations on the stack would be at risk: compilers that believe that only part of one is read
// (GCC before version 13 does so of `_tile_loadconfig`) delete the stores of the rest.
inline constexpr ProductConfigs PRODUCT_TILES = product_tiles();
inline constexpr AttentionConfigs ATTENTION_TILES = attention_tiles();

}  // namespace btlm
