#include "lanes_plain.h"
//
#include "path.h"

namespace btlm {
extern const Path path_plain;
const Path path_plain = PATH;
}  // namespace btlm
