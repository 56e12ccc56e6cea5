// One row of a table of embeddings, times a factor.
#pragma once

#include "elements.h"

namespace {

template <class T>
void embed_plain(const T* table, const Matrix& m, int64_t row, float factor, float* out) {
    const T* weight = table + row * m.columns;
    for (int64_t i = 0; i < m.columns; i += LANES)
        store_some(out + i, lanes::mul(load_some(weight + i, m.columns - i), lanes::set(factor)), m.columns - i);
}

void embed(const Matrix& m, int64_t row, float factor, float* out) {
    if (m.dtype == Dtype::float32) return embed_plain(static_cast<const float*>(m.weight), m, row, factor, out);
    if (m.dtype == Dtype::bfloat16) return embed_plain(static_cast<const uint16_t*>(m.weight), m, row, factor, out);
    const int64_t block = row / LANES, lane = row % LANES;
    const uint16_t* scale = m.scale + block * (m.columns / m.group) * LANES + lane;
    const bool q4 = m.dtype == Dtype::int4;
    const auto* weight = static_cast<const uint8_t*>(m.weight) + block * m.columns * (q4 ? 8 : 16) + lane * 4;
    for (int64_t c = 0; c < m.columns; ++c) {
        const float s = from_bf16(scale[c / m.group * LANES]) * factor;
        if (q4) {
            const int byte = weight[c / 8 * 64 + c % 4];
            out[c] = static_cast<float>((c % 8 < 4 ? byte & 15 : byte >> 4) - 8) * s;
        } else {
            out[c] = static_cast<float>(weight[c / 4 * 64 + c % 4] - 128) * s;
        }
    }
}

}  // namespace
