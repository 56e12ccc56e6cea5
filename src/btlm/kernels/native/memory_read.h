// Reads memory as fast as the machine can: the limit for kernels that read weights or caches from memory.
#pragma once

#include "elements.h"

namespace {

int64_t sum_bytes(const uint8_t* p, int64_t n) {
    I sums[4] = {lanes::iset(0), lanes::iset(0), lanes::iset(0), lanes::iset(0)};
    for (int64_t i = 0; i + 256 <= n; i += 256)
        BTLM_UNROLL for (int s = 0; s < 4; ++s)
            sums[s] = lanes::dot_bytes(sums[s], lanes::load_bytes(p + i + s * 64), 0x01010101);
    int64_t total = 0;
    for (const I& sum : sums) total += lanes::reduce_add(sum);
    return total;
}

}  // namespace
