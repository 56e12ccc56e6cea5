#include "dispatch.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace btlm {

#ifdef BTLM_X86
extern const Path path_avx512, path_avx2;
#endif
#ifdef BTLM_NEON
extern const Path path_neon;
#endif
extern const Path path_plain;

std::vector<const Path*> available_paths() {
    std::vector<const Path*> paths;
#ifdef BTLM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        paths.push_back(&path_avx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) paths.push_back(&path_avx2);
#endif
#ifdef BTLM_NEON
#ifdef __linux__
    if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) paths.push_back(&path_neon);
#else
    paths.push_back(&path_neon);  // all Apple processors since the A13 have the instructions
#endif
#endif
    paths.push_back(&path_plain);
    return paths;
}

}  // namespace btlm
