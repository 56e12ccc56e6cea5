#include "dispatch.h"

#ifdef BTLM_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace btlm {

#ifdef BTLM_X86
extern const Path path_avx512, path_avx2;
extern const Tiled tiled_emulated_avx512;
#endif
#ifdef BTLM_AMX
extern const Tiled tiled_amx;
#endif
#ifdef BTLM_NEON
extern const Path path_neon;
#endif
extern const Path path_plain;
extern const Tiled tiled_emulated_plain;

namespace {

Path with_tiles(const Path& path, const char* name, const Tiled& tiled) {
    Path result = path;
    result.name = name;
    result.tiled = &tiled;
    return result;
}

#ifdef BTLM_X86
bool has_avx512() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef BTLM_AMX
// Whether the processor has tiles and products of bytes, and the system keeps the tiles of threads apart.
bool has_tiles() {
    unsigned a, b, c, d;
    constexpr unsigned TILES = 1u << 24, BYTES = 1u << 25, OSXSAVE = 1u << 27, STATE = 3u << 17;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & TILES) == 0 || (d & BYTES) == 0) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & OSXSAVE) == 0) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & STATE) == STATE;
}

// Linux keeps the 8 KB of tiles only for processes that ask for them. It refuses where a thread has a stack for signals that is
// too small for them.
bool may_use_tiles() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static std::atomic<int> process{0};
    static std::atomic<bool> allowed{false};
    if (process.load() != getpid()) {  // the first call, or the first one after a fork
        allowed = has_tiles() && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
        process = getpid();
    }
    return allowed;
}
#endif

}  // namespace

std::vector<const Path*> available_paths() {
    std::vector<const Path*> paths;
#ifdef BTLM_X86
    if (has_avx512()) {
#ifdef BTLM_AMX
        static const Path path_amx = with_tiles(path_avx512, "amx", tiled_amx);
        if (may_use_tiles()) paths.push_back(&path_amx);
#endif
        paths.push_back(&path_avx512);
    }
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

std::vector<const Path*> emulated_paths() {
    std::vector<const Path*> paths;
#ifdef BTLM_X86
    static const Path over_avx512 = with_tiles(path_avx512, "amx-emulated", tiled_emulated_avx512);
    if (has_avx512()) paths.push_back(&over_avx512);
#endif
    static const Path over_plain = with_tiles(path_plain, "amx-emulated-plain", tiled_emulated_plain);
    paths.push_back(&over_plain);
    return paths;
}

}  // namespace btlm
