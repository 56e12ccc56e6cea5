// Every kernel on every instruction path against the plain one, without Python, for the sanitizers and for emulators: see
// sanitize.sh. Arrays have exactly their size on the heap, so that a read past an end is seen.

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "operations.h"

using namespace btlm;

namespace {

int failures = 0, comparisons = 0;
std::mt19937 engine(1);

float draw() { return std::normal_distribution<float>(0.0f, 1.0f)(engine); }

std::vector<float> floats(int64_t n, float size = 1.0f) {
    std::vector<float> values(static_cast<size_t>(n));
    for (float& value : values) value = draw() * size;
    return values;
}

std::vector<uint8_t> bytes(int64_t n) {
    std::vector<uint8_t> values(static_cast<size_t>(n));
    for (uint8_t& value : values) value = static_cast<uint8_t>(engine());
    return values;
}

std::vector<uint16_t> halves(const std::vector<float>& values) {
    std::vector<uint16_t> result;
    for (const float value : values) {
        uint32_t word;
        std::memcpy(&word, &value, sizeof word);
        result.push_back(static_cast<uint16_t>(word >> 16));
    }
    return result;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void compare(const std::vector<float>& a, const std::vector<float>& b, float tolerance, const char* path, const char* what,
             int64_t x, int64_t y) {
    float most = 1e-30f, worst = 0;
    for (const float value : b) most = std::max(most, std::fabs(value));
    for (size_t i = 0; i < a.size(); ++i) {
        const bool finite = std::isfinite(a[i]) && std::isfinite(b[i]);
        worst = std::max(worst, finite ? std::fabs(a[i] - b[i]) / most : INFINITY);
    }
    ++comparisons;
    if (worst <= tolerance) return;
    ++failures;
    std::printf("%s: %s %lld %lld differs by %g\n", path, what, static_cast<long long>(x), static_cast<long long>(y),
                static_cast<double>(worst));
}

void expect(bool holds, const char* path, const char* what, int64_t x, int64_t y) {
    ++comparisons;
    if (holds) return;
    ++failures;
    std::printf("%s: %s %lld %lld\n", path, what, static_cast<long long>(x), static_cast<long long>(y));
}

// Makes an extreme of some tokens.
void spoil(std::vector<float>& x, int64_t tokens, int64_t columns) {
    const auto row = [&](int64_t t, float factor) {
        for (int64_t c = 0; c < columns; ++c) x[static_cast<size_t>(t * columns + c)] *= factor;
    };
    if (tokens > 2) row(1, 0.0f);
    if (tokens > 4) row(3, 1e-38f);
    if (tokens > 6) x[static_cast<size_t>(5 * columns)] = 1e4f;
}

struct Weights {
    std::vector<uint8_t> stored;
    std::vector<uint16_t> small, scale;
    std::vector<float> plain, bias;
    Matrix matrix;

    Weights(Dtype dtype, int64_t rows, int64_t columns, int group, bool input_major, bool has_bias) {
        const void* weight;
        if (btlm::packed(dtype)) {
            stored = bytes(rows * columns / (dtype == Dtype::int4 ? 2 : 1));
            scale = halves(floats(rows * (columns / group), 0.02f));
            weight = stored.data();
        } else if (dtype == Dtype::bfloat16) {
            small = halves(floats(rows * columns));
            weight = small.data();
        } else {
            plain = floats(rows * columns);
            weight = plain.data();
        }
        if (has_bias) bias = floats(rows);
        matrix = {dtype,   weight, scale.empty() ? nullptr : scale.data(), has_bias ? bias.data() : nullptr, rows,
                  columns, group,  input_major};
    }
};

void check_matrices(const Path* plain, const Path* path, int threads) {
    struct Case {
        Dtype dtype;
        int64_t rows, columns;
        int group;
        bool input_major;
    };
    std::vector<Case> cases;
    for (const Dtype dtype : {Dtype::int4, Dtype::int8})
        for (const int group : {16, 64, 128})
            for (const int64_t rows : {16, 48, 400}) cases.push_back({dtype, rows, 2 * group, group, false});
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::float32})
        for (const bool input_major : {false, true})
            for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{
                     {1, 1}, {16, 16}, {17, 15}, {37, 50}, {600, 33}, {31, 8}, {1090, 257}, {70, 600}})
                cases.push_back({dtype, rows, columns, 0, input_major});
    Operations ours(path, threads), theirs(plain, 1);
    for (const Case& c : cases) {
        const Weights one(c.dtype, c.rows, c.columns, c.group, c.input_major, c.rows % 3 != 0);
        const Weights two(c.dtype, c.rows, c.columns, c.group, c.input_major, true);
        for (const int64_t tokens : {1, 2, 3, 4, 5, 7, 8, 9, 13, 65, 70}) {
            std::vector<float> x = floats(tokens * c.columns);
            spoil(x, tokens, c.columns);
            const std::vector<float> before = floats(tokens * c.rows);
            for (const Matrix* gate : {static_cast<const Matrix*>(nullptr), &two.matrix}) {
                for (const bool add : {false, true}) {
                    std::vector<float> a = before, b = before;
                    ours.linear(one.matrix, gate, x.data(), c.columns, tokens, {a.data(), c.rows, add});
                    theirs.linear(one.matrix, gate, x.data(), c.columns, tokens, {b.data(), c.rows, add});
                    compare(a, b, 1e-5f, path->name, "linear", c.rows, tokens);
                    std::vector<float> last(before.end() - c.rows, before.end());  // the last token alone: the same bits
                    ours.linear(one.matrix, gate, x.data() + (tokens - 1) * c.columns, c.columns, 1,
                                {last.data(), c.rows, add});
                    expect(std::memcmp(last.data(), a.data() + (tokens - 1) * c.rows, last.size() * sizeof(float)) == 0,
                           path->name, "a token alone", c.rows, tokens);
                }
            }
        }
        if (!c.input_major) {
            const std::vector<int64_t> ids = {0, c.rows - 1, c.rows / 2};
            std::vector<float> a(static_cast<size_t>(3 * c.columns)), b = a;
            ours.embed(one.matrix, ids.data(), 3, 2.5f, a.data());
            theirs.embed(one.matrix, ids.data(), 3, 2.5f, b.data());
            compare(a, b, 1e-6f, path->name, "embed", c.rows, c.columns);
        }
    }
    for (const int64_t columns : {1, 15, 16, 17, 80, 257}) {
        const std::vector<float> x = floats(19 * columns, 4.0f), weight = floats(columns), bias = floats(columns);
        std::vector<float> a(x.size()), b(x.size());
        ours.layer_norm(x.data(), weight.data(), bias.data(), 1e-5f, 19, columns, a.data());
        theirs.layer_norm(x.data(), weight.data(), bias.data(), 1e-5f, 19, columns, b.data());
        compare(a, b, 1e-4f, path->name, "layer_norm", 19, columns);
    }
    for (const int64_t size : {0, 1, 255, 256, (1 << 20) + 256, (3 << 20) + 512}) {
        const std::vector<uint8_t> values = bytes(size);
        expect(ours.sum_bytes(values.data(), size) == theirs.sum_bytes(values.data(), size), path->name, "sum_bytes", size,
               0);
    }
}

struct Store {
    static constexpr int64_t APART = 6;  // pages of the cache per page in use, so that there are several runs
    std::vector<uint8_t> keys, values;
    std::vector<uint16_t> key_scales, value_scales;
    std::vector<int32_t> table;
    Cache cache;

    Store(Dtype dtype, int64_t slots, int64_t heads, int64_t capacity, int64_t head_dim) {
        const int64_t width = (head_dim + LANES - 1) / LANES * LANES;
        const auto tokens = static_cast<size_t>(slots * heads * capacity * APART);
        keys.resize(tokens * static_cast<size_t>(width * bits(dtype) / 8));
        values.resize(keys.size());
        key_scales.resize(tokens);
        value_scales.resize(tokens);
        for (int64_t block = slots * capacity / KEY_BLOCK; block-- > 0;)  // apart, and the last ones first
            table.push_back(static_cast<int32_t>(block * APART));
        const int64_t pages = slots * capacity / KEY_BLOCK * APART;
        cache = {dtype, keys.data(), values.data(), key_scales.data(), value_scales.data(), table.data(), pages, slots, heads,
                 capacity, head_dim, width};
    }
};

void check_attention(const Path* plain, const Path* path, int threads) {
    Operations ours(path, threads), theirs(plain, 1);
    const std::vector<std::vector<Segment>> calls = {
        {{0, 0, 0, 63}},
        {{0, 0, 63, 1}},
        {{0, 0, 64, 1}, {1, 1, 0, 128}},
        {{0, 1, 0, 33}, {33, 0, 65, 32}},
        {{0, 0, 97, 31}, {31, 1, 33, 95}},  // to the end of the slots
        {{0, 0, 5, 3}},
    };
    for (const Dtype dtype : {Dtype::int4, Dtype::int8, Dtype::bfloat16, Dtype::float32}) {
        for (const auto& [heads, head_dim] :
             std::vector<std::pair<int64_t, int64_t>>{{2, 64}, {3, 20}, {1, 80}, {1, 128}, {2, 256}, {2, 1}, {1, 144}}) {
            Store a(dtype, 2, heads, 128, head_dim), b(dtype, 2, heads, 128, head_dim);
            std::vector<float> slopes;
            for (int64_t head = 0; head < heads; ++head) slopes.push_back(std::ldexp(1.0f, -static_cast<int>(head) - 1));
            for (const std::vector<Segment>& segments : calls) {
                const int64_t tokens = segments.back().row + segments.back().count;
                std::vector<float> qkv = floats(tokens * 3 * heads * head_dim);
                spoil(qkv, tokens, 3 * heads * head_dim);
                std::vector<float> x(static_cast<size_t>(tokens * heads * head_dim), NAN), y = x, z = x;
                const auto count = static_cast<int64_t>(segments.size());
                ours.attend(a.cache, qkv.data(), segments.data(), count, slopes.data(), 0.1f, x.data());
                theirs.attend(b.cache, qkv.data(), segments.data(), count, slopes.data(), 0.1f, y.data());
                compare(x, y, packed(dtype) ? 1e-4f : 1e-5f, path->name, "attend", head_dim, tokens);
                const bool stored = a.keys == b.keys && a.values == b.values && a.key_scales == b.key_scales &&
                                    a.value_scales == b.value_scales;
                expect(stored, path->name, "the cache after attend", head_dim, tokens);
                ours.attend(a.cache, qkv.data(), segments.data(), count, slopes.data(), 0.1f, z.data());
                expect(same(x, z), path->name, "attend again", head_dim, tokens);
            }
        }
    }
}

// Jobs of every size, teams that come and go, and workers that are asleep, awake or late.
void check_threads() {
    for (const int size : {1, 2, 3, 8}) {
        Team team(size);
        for (int64_t job = 0; job < 3000; ++job) {
            const int64_t pieces = job % 23, grain = 1 + job % 3;
            std::vector<int> seen(static_cast<size_t>(pieces));
            int64_t sum[8] = {};
            team.run(pieces, grain, [&](int64_t first, int64_t last, int member) {
                for (int64_t i = first; i < last; ++i) {
                    ++seen[static_cast<size_t>(i)];
                    sum[member] += i;
                }
            });
            int64_t total = 0;
            for (const int64_t part : sum) total += part;
            bool once = total == pieces * (pieces - 1) / 2;
            for (const int times : seen) once = once && times == 1;
            expect(once, "threads", "pieces done once", size, job);
            if (job % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // workers fall asleep
        }
    }
    for (int i = 0; i < 200; ++i) {
        Team team(1 + i % 7);
        std::atomic<int> done{0};
        if (i % 2) team.run(5, 1, [&](int64_t, int64_t, int) { ++done; });
        expect(done == (i % 2 ? 5 : 0), "threads", "a short life", i, done);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const bool threads_only = argc > 1 && std::strcmp(argv[1], "threads") == 0;
    check_threads();
    const std::vector<const Path*> available = available_paths();
    std::vector<const Path*> paths = available;
    for (const Path* path : emulated_paths()) paths.push_back(path);
    for (const Path* path : paths) {
        if (threads_only && path != paths.front() && path->tiled == nullptr) continue;
        std::printf("%s\n", path->name);
        for (const int threads : {1, 3}) {
            if (threads_only && threads == 1) continue;
            check_matrices(available.back(), path, threads);
            check_attention(available.back(), path, threads);
        }
    }
    std::printf("%d comparisons, %d failures\n", comparisons, failures);
    return failures == 0 ? 0 : 1;
}
