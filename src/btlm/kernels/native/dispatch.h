// The instruction sets of this build that the processor can run.
#pragma once

#include <vector>

#include "kernels.h"

namespace btlm {

// Fastest first; the last one is plain C++. On Linux this asks for the permission to use AMX's tiles, once per process.
std::vector<const Path*> available_paths();

// Slow paths for tests: AVX-512 and plain C++ with kernels on tiles that are emulated.
std::vector<const Path*> emulated_paths();

}  // namespace btlm
