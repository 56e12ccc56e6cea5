// The operations of the engine: each cuts its work into pieces for a team of threads, on one instruction set.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace btlm {

// Memory that grows on demand, aligned to cache lines.
class Scratch {
public:
    void* get(size_t bytes);

private:
    std::vector<unsigned char> memory;
};

class Operations {
public:
    Operations(const Path* path, int threads);

    // out = x . matrix + bias; with a gate out = (x . matrix + bias) * silu(x . gate + bias of the gate).
    void linear(const Matrix&, const Matrix* gate, const float* x, int64_t x_stride, int64_t tokens, Output);
    void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t tokens, int64_t columns,
                    float* out);
    void embed(const Matrix&, const int64_t* ids, int64_t tokens, float factor, float* out);
    // Appends the keys and values of `qkv` [tokens, 3 * heads * head_dim] to the cache, and attends.
    void attend(const Cache&, const float* qkv, const Segment* segments, int64_t count, const float* slopes, float scale,
                float* out);
    int64_t sum_bytes(const uint8_t* p, int64_t n);

    int threads() const { return team.size(); }

private:
    void multiply_packed(const Matrix&, const Matrix* gate, const float* x, int64_t x_stride, int64_t tokens, Output);
    void multiply_plain(const Matrix&, const Matrix* gate, const float* x, int64_t x_stride, int64_t tokens, Output);
    void multiply_chunks(const Matrix&, const Matrix* gate, const float* x, Output);
    Activations quantized(const float* x, int64_t x_stride, int64_t tokens, int64_t columns, int group, bool tiled);

    const Path* const path;
    Team team;
    Scratch values, scales, sums, inputs;
    std::vector<Scratch> partial;  // one per thread
};

}  // namespace btlm
