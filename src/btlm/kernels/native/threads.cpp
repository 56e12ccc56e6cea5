#include "threads.h"

#include <algorithm>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace btlm {
namespace {

// About 50 microseconds: longer than the time between two kernels of a step, and too short to show on an idle machine.
constexpr int LOOKS = 1500;

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

}  // namespace

Team::Team(int size) {
    try {
        for (int member = 1; member < size; ++member) workers.emplace_back([this, member] { work(member); });
    } catch (...) {  // the system gives no more threads: end those that were started
        end();
        throw;
    }
}

Team::~Team() { end(); }

void Team::end() {
    {
        std::lock_guard<std::mutex> lock(sleep);
        over = true;
    }
    wake.notify_all();
    for (std::thread& worker : workers) worker.join();
}

void Team::share(int64_t count, int64_t most, Call function, const void* argument) {
    if (workers.empty() || count <= most) {
        for (int64_t first = 0; first < count; first += most) function(argument, first, std::min(first + most, count), 0);
        return;
    }
    call = function;
    body = argument;
    pieces = count;
    grain = most;
    next.store(0, std::memory_order_relaxed);
    for (uint32_t none = CLOSED; !gate.compare_exchange_weak(none, 0); none = CLOSED) relax();  // a late worker is leaving
    jobs.fetch_add(1);
    if (asleep.load() > 0) {
        std::lock_guard<std::mutex> awake(sleep);
        wake.notify_all();
    }
    take_pieces(0);
    gate.fetch_or(CLOSED);
    for (int looks = 0; gate.load(std::memory_order_acquire) != CLOSED; ++looks) {
        if (looks < LOOKS)
            relax();
        else
            std::this_thread::yield();
    }
}

void Team::take_pieces(int member) {
    for (;;) {
        const int64_t first = next.fetch_add(grain, std::memory_order_relaxed);
        if (first >= pieces) return;
        call(body, first, std::min(first + grain, pieces), member);
    }
}

void Team::work(int member) {
    uint64_t seen = 0;
    while (!over) {
        for (int looks = 0; jobs.load(std::memory_order_acquire) == seen && looks < LOOKS; ++looks) relax();
        if (jobs.load() == seen) {
            std::unique_lock<std::mutex> lock(sleep);
            asleep.fetch_add(1);
            wake.wait(lock, [&] { return over || jobs.load() != seen; });
            asleep.fetch_sub(1);
            if (over) return;
        }
        seen = jobs.load();
        if ((gate.fetch_add(1, std::memory_order_acq_rel) & CLOSED) == 0) take_pieces(member);
        gate.fetch_sub(1, std::memory_order_acq_rel);
    }
}

}  // namespace btlm
