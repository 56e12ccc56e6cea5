// AMX's tiles, by the instructions themselves: the intrinsics of GCC 12 do not tell the compiler what memory a tile is loaded
// from, so that it could delete the stores before a load.
#pragma once

#include "tile_config.h"

namespace {

struct AmxTiles {
    static void configure(const btlm::TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
    static void release() { asm volatile("tilerelease" : : : "memory"); }

    template <int N>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" : : "n"(N));
    }
    template <int N>
    static void load(const void* rows, int64_t stride) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "n"(N), "r"(rows), "r"(stride) : "memory");
    }
    template <int N>
    static void store(void* rows, int64_t stride) {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "n"(N), "r"(rows), "r"(stride) : "memory");
    }

    // sums[m][n] += the sum over k of left[m][k] * right[k / 4][4 * n + k % 4], in 32 bits.
    template <int SUMS, int LEFT, int RIGHT>
    static void multiply_signed_unsigned() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(SUMS), "n"(LEFT), "n"(RIGHT));
    }
    template <int SUMS, int LEFT, int RIGHT>
    static void multiply_unsigned_signed() {
        asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "n"(SUMS), "n"(LEFT), "n"(RIGHT));
    }
};

}  // namespace
