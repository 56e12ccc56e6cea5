#include "lanes_avx512.h"
//
#include "path.h"

namespace btlm {
extern const Path path_avx512;
const Path path_avx512 = PATH;
}  // namespace btlm
