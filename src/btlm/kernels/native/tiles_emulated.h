// AMX's tiles in plain C++, so that the kernels on tiles can be tested on every machine. Whatever would be an exception of the
// processor ends the program.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tile_config.h"

namespace {

struct EmulatedTiles {
    struct Tile {
        int rows = 0, row_bytes = 0;
        uint8_t bytes[btlm::TILE_ROWS][btlm::TILE_BYTES] = {};
    };
    struct Registers {
        bool configured = false;
        Tile tile[btlm::NUM_TILES];
    };

    static Registers& registers() {
        thread_local Registers of_thread;
        return of_thread;
    }

    static void require(bool holds, const char* what) {
        if (holds) return;
        std::fprintf(stderr, "emulated tiles: %s\n", what);
        std::abort();
    }

    static Tile& tile(int n) {
        Registers& all = registers();
        require(all.configured, "used without a configuration");
        return all.tile[n];
    }

    static void configure(const btlm::TileConfig& config) {
        Registers& all = registers();
        require(!all.configured, "configured twice");
        require(config.palette == 1 && config.start_row == 0, "palette or start row");
        for (const uint8_t byte : config.reserved) require(byte == 0, "reserved bytes");
        for (int i = btlm::NUM_TILES; i < 16; ++i)
            require(config.rows[i] == 0 && config.row_bytes[i] == 0, "tiles past the last");
        for (int i = 0; i < btlm::NUM_TILES; ++i) {
            require(config.rows[i] <= btlm::TILE_ROWS && config.row_bytes[i] <= btlm::TILE_BYTES, "size");
            all.tile[i] = Tile();
            all.tile[i].rows = config.rows[i];
            all.tile[i].row_bytes = config.row_bytes[i];
        }
        all.configured = true;
    }

    static void release() { registers() = Registers(); }

    template <int N>
    static void zero() {
        std::memset(tile(N).bytes, 0, sizeof tile(N).bytes);
    }

    template <int N>
    static void load(const void* rows, int64_t stride) {
        Tile& to = tile(N);
        zero<N>();
        for (int row = 0; row < to.rows; ++row)
            std::memcpy(to.bytes[row], static_cast<const uint8_t*>(rows) + row * stride, static_cast<size_t>(to.row_bytes));
    }

    template <int N>
    static void store(void* rows, int64_t stride) {
        const Tile& from = tile(N);
        for (int row = 0; row < from.rows; ++row)
            std::memcpy(static_cast<uint8_t*>(rows) + row * stride, from.bytes[row], static_cast<size_t>(from.row_bytes));
    }

    template <int SUMS, int LEFT, int RIGHT>
    static void multiply_signed_unsigned() {
        multiply<int8_t, uint8_t>(tile(SUMS), tile(LEFT), tile(RIGHT));
    }

    template <int SUMS, int LEFT, int RIGHT>
    static void multiply_unsigned_signed() {
        multiply<uint8_t, int8_t>(tile(SUMS), tile(LEFT), tile(RIGHT));
    }

    template <class L, class R>
    static void multiply(Tile& sums, const Tile& left, const Tile& right) {
        require(&sums != &left && &sums != &right && &left != &right, "one tile twice in a product");
        require(left.rows == sums.rows && left.row_bytes == 4 * right.rows && right.row_bytes == sums.row_bytes &&
                    left.row_bytes % 4 == 0 && sums.row_bytes % 4 == 0,
                "shapes of a product");
        for (int m = 0; m < sums.rows; ++m) {
            for (int n = 0; n < sums.row_bytes / 4; ++n) {
                uint32_t sum;  // 32 bits without saturation
                std::memcpy(&sum, sums.bytes[m] + 4 * n, 4);
                for (int k = 0; k < left.row_bytes; ++k)
                    sum += static_cast<uint32_t>(static_cast<L>(left.bytes[m][k]) *
                                                 static_cast<R>(right.bytes[k / 4][4 * n + k % 4]));
                std::memcpy(sums.bytes[m] + 4 * n, &sum, 4);
            }
        }
    }
};

}  // namespace
