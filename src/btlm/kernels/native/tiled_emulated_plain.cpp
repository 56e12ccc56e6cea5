#include "lanes_plain.h"
//
#include "tiles_emulated.h"
//
#include "tiled.h"

namespace btlm {
extern const Tiled tiled_emulated_plain;
const Tiled tiled_emulated_plain = TILED<EmulatedTiles>;
}  // namespace btlm
