#include "operations.h"

#include <algorithm>

namespace btlm {
namespace {

constexpr size_t LINE = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void* Scratch::get(size_t bytes) {
    if (memory.size() < bytes + LINE) memory = std::vector<unsigned char>(bytes + LINE);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (LINE - address % LINE) % LINE;
}

Operations::Operations(const Path* path, int threads)
    : path(path), team(threads), partial(static_cast<size_t>(threads)) {}

Activations Operations::quantized(const float* x, int64_t x_stride, int64_t tokens, int64_t columns, int group,
                                  bool tiled) {
    const int64_t width = tiled ? TILE_ROWS : path->max_tokens, panels = divide_up(tokens, width);
    const int64_t padded = tiled ? panels * width : tokens;
    const auto count = static_cast<size_t>(padded * columns), groups = static_cast<size_t>(padded * (columns / group));
    Activations into = {static_cast<int8_t*>(values.get(count)),
                        static_cast<float*>(scales.get(groups * sizeof(float))),
                        static_cast<int32_t*>(sums.get(groups * sizeof(int32_t))),
                        tokens, columns, group};
    const auto quantize = tiled ? path->tiled->quantize : path->quantize;
    const auto body = [&](int64_t first, int64_t last, int) {
        for (int64_t panel = first; panel < last; ++panel) quantize(x, x_stride, into, panel);
    };
    team.run(panels, 1, body);
    return into;
}

void Operations::linear(const Matrix& m, const Matrix* gate, const float* x, int64_t x_stride, int64_t tokens,
                        Output to) {
    if (packed(m.dtype)) return multiply_packed(m, gate, x, x_stride, tokens, to);
    multiply_plain(m, gate, x, x_stride, tokens, to);
}

void Operations::multiply_packed(const Matrix& m, const Matrix* gate, const float* x, int64_t x_stride, int64_t tokens,
                                 Output to) {
    const bool tiled = path->tiled != nullptr && Tiled::fits(m, tokens);
    const Activations activations = quantized(x, x_stride, tokens, m.columns, m.group, tiled);
    const auto multiply = tiled ? path->tiled->multiply_packed : path->multiply_packed;
    const int64_t blocks = m.rows / LANES;
    const int64_t grain = std::max<int64_t>(2, blocks / (threads() * 12) / 2 * 2);
    team.run(blocks, grain,
             [&](int64_t first, int64_t last, int) { multiply(m, gate, activations, to, first, last); });
}

void Operations::multiply_plain(const Matrix& m, const Matrix* gate, const float* x, int64_t x_stride, int64_t tokens,
                                Output to) {
    if (m.input_major) {
        const int64_t width = padded_inputs(m.columns);
        auto* arranged = static_cast<float*>(inputs.get(static_cast<size_t>(tokens * width) * sizeof(float)));
        team.run(divide_up(tokens, PLAIN_TOKENS), 1, [&](int64_t first, int64_t last, int) {
            for (int64_t t = first * PLAIN_TOKENS; t < std::min(last * PLAIN_TOKENS, tokens); t += PLAIN_TOKENS)
                path->arrange(x + t * x_stride, x_stride, std::min<int64_t>(PLAIN_TOKENS, tokens - t), m.columns,
                              arranged + t * width);
        });
        x = arranged;
        x_stride = width;
        if (tokens == 1) return multiply_chunks(m, gate, arranged, to);
    }
    // Tiles of few tokens read the rows of a piece again and again: 64 rows stay in the cache of a core.
    const int64_t most = m.input_major ? PLAIN_TILE : tokens < 4 ? 512 : 64;
    const int64_t widest = std::min(most, PLAIN_TILE / std::min<int64_t>(tokens, PLAIN_TOKENS));
    const int64_t pieces = divide_up(divide_up(m.rows, widest), threads()) * threads();
    const int64_t grain = divide_up(divide_up(m.rows, pieces), PLAIN_OUTPUTS) * PLAIN_OUTPUTS;
    constexpr size_t SCRATCH = 3 * PLAIN_TILE * sizeof(float);
    for (Scratch& scratch : partial) scratch.get(SCRATCH);
    team.run(m.rows, grain, [&](int64_t first, int64_t last, int member) {
        auto* scratch = static_cast<float*>(partial[static_cast<size_t>(member)].get(SCRATCH));
        path->multiply_plain(m, gate, x, x_stride, tokens, to, first, last, scratch);
    });
}

// One token waits for the weights, and whole rows are read from memory faster than parts of rows.
void Operations::multiply_chunks(const Matrix& m, const Matrix* gate, const float* x, Output to) {
    constexpr int64_t NARROWEST = 512;
    const int64_t chunks = plain_chunks(m.columns), stride = divide_up(m.rows, PLAIN_OUTPUTS) * PLAIN_OUTPUTS;
    const int64_t cuts = std::min(divide_up(m.rows, NARROWEST), divide_up(4 * threads(), chunks));
    const int64_t width = divide_up(divide_up(m.rows, cuts), PLAIN_OUTPUTS) * PLAIN_OUTPUTS;
    const int64_t matrices = gate != nullptr ? 2 : 1;
    auto* all = static_cast<float*>(sums.get(static_cast<size_t>(matrices * chunks * stride) * sizeof(float)));
    team.run(matrices * chunks * cuts, 1, [&](int64_t first, int64_t last, int) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t chunk = i / cuts, row = i % cuts * width;
            if (row >= m.rows) continue;  // the widths were rounded up
            path->multiply_chunk(chunk < chunks ? m : *gate, x, chunk % chunks, row, std::min(row + width, m.rows),
                                 all + chunk * stride + row);
        }
    });
    team.run(m.rows, divide_up(divide_up(m.rows, 2 * threads()), PLAIN_OUTPUTS) * PLAIN_OUTPUTS,
             [&](int64_t first, int64_t last, int) { path->add_chunks(m, gate, all, stride, to, first, last); });
}

void Operations::layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t tokens,
                            int64_t columns, float* out) {
    team.run(tokens, 8, [&](int64_t first, int64_t last, int) {
        for (int64_t t = first; t < last; ++t)
            path->layer_norm(x + t * columns, weight, bias, eps, columns, out + t * columns);
    });
}

void Operations::embed(const Matrix& m, const int64_t* ids, int64_t tokens, float factor, float* out) {
    team.run(tokens, 32, [&](int64_t first, int64_t last, int) {
        for (int64_t t = first; t < last; ++t) path->embed(m, ids[t], factor, out + t * m.columns);
    });
}

void Operations::attend(const Cache& cache, const float* qkv, const Segment* segments, int64_t count,
                        const float* slopes, float scale, float* out) {
    const int64_t width = cache.heads * cache.head_dim, stride = 3 * width;
    struct Piece {
        const Segment* segment;
        int64_t first, count;
        bool append;
    };
    std::vector<Piece> pieces;
    const auto append = [&](const Segment& s, int64_t head, int64_t first, int64_t n) {
        for (int64_t t = first; t < first + n; ++t) {
            const float* key = qkv + (s.row + t) * stride + width + head * cache.head_dim;
            path->append(cache, s.slot, head, s.start + t, key, key + width);
        }
    };
    for (int64_t i = 0; i < count; ++i) {
        const Segment& s = segments[i];
        const bool whole = s.count <= QUERY_TILE;  // its only piece can append the keys that it reads
        if (!whole)
            team.run(cache.heads, 1, [&](int64_t first, int64_t last, int) {
                for (int64_t head = first; head < last; ++head) append(s, head, 0, s.count);
            });
        for (int64_t t = (s.count - 1) / QUERY_TILE * QUERY_TILE; t >= 0; t -= QUERY_TILE)  // those with most keys first
            pieces.push_back({&s, t, std::min<int64_t>(QUERY_TILE, s.count - t), whole});
    }
    const int64_t all = static_cast<int64_t>(pieces.size()) * cache.heads;
    team.run(all, std::max<int64_t>(1, all / (threads() * 8)), [&](int64_t first, int64_t last, int) {
        for (int64_t i = first; i < last; ++i) {
            const Piece& piece = pieces[static_cast<size_t>(i / cache.heads)];
            const Segment& s = *piece.segment;
            const int64_t head = i % cache.heads, row = s.row + piece.first;
            if (piece.append) append(s, head, piece.first, piece.count);
            const bool tiled = path->tiled != nullptr && packed(cache.dtype) && piece.count >= TILED_FROM;
            const auto attend = tiled ? path->tiled->attend : path->attend;
            attend(cache, s.slot, head, s.start + piece.first, piece.count,
                         qkv + row * stride + head * cache.head_dim, stride, slopes[head], scale,
                         out + row * width + head * cache.head_dim, width);
        }
    });
}

int64_t Operations::sum_bytes(const uint8_t* p, int64_t n) {
    constexpr int64_t PIECE = 1 << 20;
    std::vector<int64_t> totals(static_cast<size_t>(threads()), 0);
    team.run(divide_up(n, PIECE), 4, [&](int64_t first, int64_t last, int member) {
        const int64_t end = std::min(last * PIECE, n);
        for (int64_t at = first * PIECE; at < end; at += PIECE)
            totals[static_cast<size_t>(member)] += path->sum_bytes(p + at, std::min(PIECE, end - at));
    });
    int64_t total = 0;
    for (const int64_t part : totals) total += part;
    return total;
}

}  // namespace btlm
