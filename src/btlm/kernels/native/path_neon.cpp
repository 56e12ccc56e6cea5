#include "lanes_neon.h"
//
#include "path.h"

namespace btlm {
extern const Path path_neon;
const Path path_neon = PATH;
}  // namespace btlm
