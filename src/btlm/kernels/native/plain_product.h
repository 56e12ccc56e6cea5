// Products with bf16 and fp32 weights, computed in fp32.
#pragma once

#include "elements.h"

namespace {

// sums[t][c] += x[t][k] * weight[k][c] with k ascending, for `width` columns of an input-major matrix.
template <class T>
void by_inputs(const T* weight, int64_t stride, const float* x, int64_t x_stride, int64_t tokens, int64_t inputs,
               int64_t width, int64_t sum_stride, float* sums) {
    constexpr int DEPTH = 8;  // inputs added per visit of a sum
    for (int64_t k = 0; k < inputs; k += DEPTH) {
        const int depth = static_cast<int>(inputs - k < DEPTH ? inputs - k : DEPTH);
        for (int64_t c = 0; c < width; c += LANES) {
            F w[DEPTH];
            for (int i = 0; i < DEPTH; ++i)
                w[i] = i < depth ? load_some(weight + (k + i) * stride + c, width - c) : lanes::zero();
            for (int64_t t = 0; t < tokens; ++t) {
                float* sum = sums + t * sum_stride + c;
                const float* in = x + t * x_stride + k;
                F total = lanes::load(sum);
                if (depth == DEPTH) {
                    BTLM_UNROLL for (int i = 0; i < DEPTH; ++i) total = lanes::fma(lanes::set(in[i]), w[i], total);
                } else {
                    for (int i = 0; i < depth; ++i) total = lanes::fma(lanes::set(in[i]), w[i], total);
                }
                lanes::store(sum, total);
            }
        }
    }
}

// sums[t][r] = x[t] . weight[r], for `width` rows of a row-major matrix.
template <class T>
void by_rows(const T* weight, const float* x, int64_t x_stride, int64_t tokens, int64_t inputs, int64_t width,
             int64_t sum_stride, float* sums) {
    constexpr int TILE = 4;
    for (int64_t r = 0; r < width; ++r) {
        const T* row = weight + r * inputs;
        for (int64_t t = 0; t < tokens; t += TILE) {
            const int count = static_cast<int>(tokens - t < TILE ? tokens - t : TILE);
            F total[TILE] = {lanes::zero(), lanes::zero(), lanes::zero(), lanes::zero()};
            for (int64_t k = 0; k < inputs; k += LANES) {
                const F w = load_some(row + k, inputs - k);
                for (int i = 0; i < count; ++i)
                    total[i] = lanes::fma(w, load_some(x + (t + i) * x_stride + k, inputs - k), total[i]);
            }
            for (int i = 0; i < count; ++i) sums[(t + i) * sum_stride + r] = lanes::reduce_add(total[i]);
        }
    }
}

template <class T>
void partial_sums(const Matrix& m, const float* x, int64_t x_stride, int64_t tokens, int64_t row, int64_t width,
                  float* sums) {
    const auto* weight = static_cast<const T*>(m.weight);
    const int64_t stride = PLAIN_TILE / tokens / LANES * LANES;
    if (m.input_major) {
        std::memset(sums, 0, static_cast<size_t>(PLAIN_TILE) * sizeof *sums);
        by_inputs(weight + row, m.rows, x, x_stride, tokens, m.columns, width, stride, sums);
    } else {
        by_rows(weight + row * m.columns, x, x_stride, tokens, m.columns, width, stride, sums);
    }
}

void multiply_plain(const Matrix& m, const Matrix* gate, const float* x, int64_t x_stride, int64_t tokens, Output to,
                    int64_t first, int64_t last, float* scratch) {
    constexpr int64_t TOKENS = 64;
    const auto compute = [&](const Matrix& source, int64_t token, int64_t count, int64_t row, int64_t width, float* sums) {
        const auto function = source.dtype == Dtype::float32 ? partial_sums<float> : partial_sums<uint16_t>;
        function(source, x + token * x_stride, x_stride, count, row, width, sums);
    };
    for (int64_t token = 0; token < tokens; token += TOKENS) {
        const int64_t count = tokens - token < TOKENS ? tokens - token : TOKENS;
        const int64_t widest = PLAIN_TILE / count / LANES * LANES;
        for (int64_t row = first; row < last; row += widest) {
            const int64_t width = last - row < widest ? last - row : widest;
            compute(m, token, count, row, width, scratch);
            if (gate != nullptr) compute(*gate, token, count, row, width, scratch + PLAIN_TILE);
            for (int64_t t = 0; t < count; ++t) {
                for (int64_t c = 0; c < width; c += LANES) {
                    const int64_t n = width - c;
                    const auto value = [&](const Matrix& source, const float* sums) {
                        const F sum = load_some(sums + t * widest + c, n);
                        return source.bias == nullptr ? sum : lanes::add(sum, load_some(source.bias + row + c, n));
                    };
                    F product = value(m, scratch);
                    if (gate != nullptr) product = lanes::mul(product, silu(value(*gate, scratch + PLAIN_TILE)));
                    float* out = to.out + (token + t) * to.stride + row + c;
                    if (to.add) product = lanes::add(product, load_some(out, n));
                    store_some(out, product, n);
                }
            }
        }
    }
}

}  // namespace
