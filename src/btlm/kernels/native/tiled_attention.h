// Attention over a packed cache on tiles: 16 queries, 64 keys.
#pragma once

#include "attention.h"
#include "tiled_product.h"

namespace {

// The keys and the values of a page as rows of tiles, four dimensions of 16 keys and four tokens of 16 dimensions: where the
// cache has them in 8 bits, and unpacked where it has 4.
template <int BITS>
struct Page {
    const uint8_t *keys, *values;  // [width/4][KEY_BLOCK][4], [KEY_BLOCK/4][width][4]
    alignas(64) uint8_t unpacked[2][BITS == 4 ? KEY_BLOCK * MAX_HEAD_DIM : 1];

    // Prefetches the page that begins at `next`.
    void open(const Cache& cache, int64_t at, int64_t next) {
        const int64_t row = cache.width * BITS / 8, bytes = KEY_BLOCK * row, ahead = (next - at) * row;
        keys = static_cast<const uint8_t*>(cache.keys) + at * row;
        values = static_cast<const uint8_t*>(cache.values) + at * row;
        for (int64_t line = 0; line < bytes; line += 64) {
            fetch(keys + line + ahead);
            fetch(values + line + ahead);
        }
        if constexpr (BITS == 4) {
            unpack(keys, bytes, KEY_BLOCK * 4, unpacked[0]);
            unpack(values, bytes, cache.width * 4, unpacked[1]);
            keys = unpacked[0];
            values = unpacked[1];
        }
    }

    // Unpacks pieces of `piece` bytes to two such pieces each.
    static void unpack(const uint8_t* from, int64_t bytes, int64_t piece, uint8_t* to) {
        for (int64_t first = 0; first < bytes; first += piece)
            for (int64_t at = first; at < first + piece; at += 64)
                unpack_line(from + at, to + first + at, to + first + at + piece);
    }
};

// Attends with queries `first` to n of a tile, all within TILE_ROWS from `begin` on; see attend_pages.
template <class Tiles, int BITS>
void attend_rows(const Cache& cache, const Page<BITS>& page, int64_t at, int64_t key, int64_t position, float slope,
                 int64_t begin, int64_t first, int64_t n, Query* tile) {
    constexpr int BLOCKS = KEY_BLOCK / LANES;
    alignas(64) int32_t sums[TILE_ROWS][KEY_BLOCK];
    const int64_t quads = cache.width / 4, rows = key_rows(static_cast<int>(quads));
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    Tiles::template zero<2>();
    Tiles::template zero<3>();
    for (int64_t quad = 0; quad < quads; quad += rows) {
        const uint8_t* keys = page.keys + quad * KEY_BLOCK * 4;
        Tiles::template load<4>(tile[begin].bytes + quad * 4, sizeof(Query));
        Tiles::template load<5>(keys, KEY_BLOCK * 4);
        Tiles::template multiply_signed_unsigned<0, 4, 5>();
        Tiles::template load<5>(keys + TILE_BYTES, KEY_BLOCK * 4);
        Tiles::template multiply_signed_unsigned<1, 4, 5>();
        Tiles::template load<5>(keys + 2 * TILE_BYTES, KEY_BLOCK * 4);
        Tiles::template multiply_signed_unsigned<2, 4, 5>();
        Tiles::template load<5>(keys + 3 * TILE_BYTES, KEY_BLOCK * 4);
        Tiles::template multiply_signed_unsigned<3, 4, 5>();
    }
    Tiles::template store<0>(sums[0], sizeof sums[0]);
    Tiles::template store<1>(sums[0] + LANES, sizeof sums[0]);
    Tiles::template store<2>(sums[0] + 2 * LANES, sizeof sums[0]);
    Tiles::template store<3>(sums[0] + 3 * LANES, sizeof sums[0]);

    Weighted weighted[TILE_ROWS];
    for (int64_t i = first; i < n; ++i) {
        Query& q = tile[i];
        I products[BLOCKS];
        for (int s = 0; s < BLOCKS; ++s)
            products[s] = lanes::add(lanes::iload(sums[i - begin] + s * LANES), lanes::iset(q.offset));
        weighted[i - begin] = weigh<BITS>(cache, products, at, key, position + i, slope, q);
    }

    // Rows of other queries hold what was there before, and so do their sums, which nobody reads.
    alignas(64) int32_t of_high[TILE_ROWS][LANES], of_low[TILE_ROWS][LANES];
    Tiles::template load<6>(weighted[0].high, sizeof(Weighted));
    Tiles::template load<7>(weighted[0].low, sizeof(Weighted));
    for (int64_t d = 0; d < cache.width; d += LANES) {
        Tiles::template zero<0>();
        Tiles::template zero<1>();
        Tiles::template load<3>(page.values + d * 4, cache.width * 4);
        Tiles::template multiply_unsigned_signed<0, 6, 3>();
        Tiles::template multiply_unsigned_signed<1, 7, 3>();
        Tiles::template store<0>(of_high, sizeof of_high[0]);
        Tiles::template store<1>(of_low, sizeof of_low[0]);
        for (int64_t i = first; i < n; ++i) {
            const Weighted& w = weighted[i - begin];
            add_to_total(w, lanes::add(lanes::iload(of_high[i - begin]), w.high_start),
                         lanes::add(lanes::iload(of_low[i - begin]), w.low_start), tile[i].total + d);
        }
    }
}

template <class Tiles, int BITS>
void attend_bits(const Cache& cache, int64_t slot, int64_t head, int64_t first, int64_t count, const float* queries,
                 int64_t query_stride, float slope, float scale, float* out, int64_t out_stride) {
    const Configured<Tiles> tiles(ATTENTION_TILES.of[cache.width / LANES - 1]);
    attend_pages(cache, slot, head, first, count, queries, query_stride, scale, out, out_stride,
                 [&](int64_t at, int64_t next, int64_t key, int64_t position, int64_t from, int64_t n, Query* tile) {
                     Page<BITS> page;
                     page.open(cache, at, next);
                     for (int64_t begin = from / TILE_ROWS * TILE_ROWS; begin < n; begin += TILE_ROWS) {
                         const int64_t end = begin + TILE_ROWS < n ? begin + TILE_ROWS : n;
                         attend_rows<Tiles, BITS>(cache, page, at, key, position, slope, begin, begin > from ? begin : from,
                                                  end, tile);
                     }
                 });
}

// For a cache in int4 or int8.
template <class Tiles>
void attend_tiled(const Cache& cache, int64_t slot, int64_t head, int64_t first, int64_t count, const float* queries,
                  int64_t query_stride, float slope, float scale, float* out, int64_t out_stride) {
    const auto attend = cache.dtype == Dtype::int4 ? attend_bits<Tiles, 4> : attend_bits<Tiles, 8>;
    attend(cache, slot, head, first, count, queries, query_stride, slope, scale, out, out_stride);
}

}  // namespace
