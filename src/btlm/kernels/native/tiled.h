// The kernels on tiles. A source file includes its lanes, its tiles, then this file.
#pragma once

#include "tiled_attention.h"
#include "tiled_product.h"

namespace {

template <class Tiles>
constexpr Tiled TILED = {quantize_tiled, multiply_tiled<Tiles>, attend_tiled<Tiles>};

}  // namespace
