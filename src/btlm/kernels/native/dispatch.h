// The instruction paths of this build that the processor can run.
#pragma once

#include <vector>

#include "kernels.h"

namespace btlm {

std::vector<const Path*> available_paths();  // the fastest first; the last one is plain C++

}  // namespace btlm
