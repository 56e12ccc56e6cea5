// A team of threads that works on one job at a time, piece by piece.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace btlm {

class Team {
public:
    explicit Team(int size);  // throws std::system_error if the system does not give so many threads
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return static_cast<int>(workers.size()) + 1; }

    // Calls body(first, last, member) for ranges of at most `grain` pieces that together cover 0 to `pieces`, and returns when
    // all are done. The calling thread is member 0. Only one call at a time; `body` must not throw.
    template <class Body>
    void run(int64_t pieces, int64_t grain, const Body& body) {
        share(pieces, grain, [](const void* b, int64_t first, int64_t last, int member) {
            (*static_cast<const Body*>(b))(first, last, member);
        }, &body);
    }

private:
    using Call = void (*)(const void* body, int64_t first, int64_t last, int member);

    void share(int64_t pieces, int64_t grain, Call call, const void* body);
    void take_pieces(int member);
    void work(int member);
    void end();

    std::vector<std::thread> workers;

    // The job
    Call call = nullptr;
    const void* body = nullptr;
    int64_t pieces = 0, grain = 1;
    std::atomic<int64_t> next{0};

    // Number of workers in the job, plus CLOSED when no more may enter.
    static constexpr uint32_t CLOSED = 1u << 31;
    std::atomic<uint32_t> gate{CLOSED};
    std::atomic<uint64_t> jobs{0};  // number of jobs so far

    // Workers without a job look for one for a short time, then sleep.
    std::mutex sleep;
    std::condition_variable wake;
    std::atomic<int> asleep{0};
    std::atomic<bool> over{false};
};

}  // namespace btlm
