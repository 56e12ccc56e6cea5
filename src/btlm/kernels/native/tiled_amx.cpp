#include "lanes_avx512.h"
//
#include "tiles_amx.h"
//
#include "tiled.h"

namespace btlm {
extern const Tiled tiled_amx;
const Tiled tiled_amx = TILED<AmxTiles>;
}  // namespace btlm
