// Layer normalization of one row.
#pragma once

#include "elements.h"

namespace {

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n, float* out) {
    const float count = static_cast<float>(n);
    F sum = lanes::zero();
    for (int64_t i = 0; i < n; i += LANES) sum = lanes::add(sum, load_some(x + i, n - i));
    const F mean = lanes::set(lanes::reduce_add(sum) / count);
    F squares = lanes::zero();
    for (int64_t i = 0; i < n; i += LANES) {
        F centred = lanes::sub(load_some(x + i, n - i), mean);
        if (n - i < LANES) {
            float part[LANES] = {};
            store_some(part, centred, n - i);
            centred = lanes::load(part);
        }
        squares = lanes::fma(centred, centred, squares);
    }
    const F scale = lanes::set(1.0f / std::sqrt(lanes::reduce_add(squares) / count + eps));
    for (int64_t i = 0; i < n; i += LANES) {
        const F normal = lanes::mul(lanes::sub(load_some(x + i, n - i), mean), scale);
        store_some(out + i, lanes::fma(normal, load_some(weight + i, n - i), load_some(bias + i, n - i)), n - i);
    }
}

}  // namespace
