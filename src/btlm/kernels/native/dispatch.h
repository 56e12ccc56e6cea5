// The instruction sets of this build that the processor can run.
#pragma once

#include <vector>

#include "kernels.h"

namespace btlm {

std::vector<const Path*> available_paths();  // fastest first; the last one is plain C++

}  // namespace btlm
