// All kernels of one instruction set. A source file per instruction set includes its lanes, then this file.
#pragma once

#include "attention.h"
#include "cache_write.h"
#include "elements.h"
#include "embedding.h"
#include "layer_norm.h"
#include "memory_read.h"
#include "packed_product.h"
#include "plain_product.h"

namespace {

constexpr Path PATH = {lanes::NAME,    lanes::MAX_TOKENS, quantize,   multiply_packed, arrange, multiply_plain,
                       multiply_chunk, add_chunks,        layer_norm, embed,           append,  attend,
                       sum_bytes,      nullptr};

}  // namespace
