#include "lanes_avx512.h"
//
#include "tiles_emulated.h"
//
#include "tiled.h"

namespace btlm {
extern const Tiled tiled_emulated_avx512;
const Tiled tiled_emulated_avx512 = TILED<EmulatedTiles>;
}  // namespace btlm
