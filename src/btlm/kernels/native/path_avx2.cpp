#include "lanes_avx2.h"
//
#include "path.h"

namespace btlm {
extern const Path path_avx2;
const Path path_avx2 = PATH;
}  // namespace btlm
