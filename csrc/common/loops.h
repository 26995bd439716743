// Tools of the CPU loops: function clones for wide vectors, loops in blocks, and threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>
#include <type_traits>
#include <vector>

#include "inline.h"

// Compiles a function once for each vector width. The loader picks the widest that the machine has,
// so one build is portable and fast.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && \
    !defined(__clang__)
#define MFLOW_CLONES \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MFLOW_CLONES
#endif

namespace mflow {

template <class To, class From>
MFLOW_INLINE To bit_cast(From from) {
    To to;
    static_assert(sizeof(to) == sizeof(from), "same size");
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// Calls run(length, begin) for blocks of constant length that cover `count` >= 4 values. The last
// block may overlap the one before it. For short rows this is faster than a loop of unknown length.
template <class Run>
MFLOW_INLINE void in_blocks(int64_t count, const Run& run) {
    using Four = std::integral_constant<int, 4>;
    using Eight = std::integral_constant<int, 8>;
    if (count >= 8) {
        for (int64_t i = 0; i < count - 8; i += 8) run(Eight{}, i);
        run(Eight{}, count - 8);
    } else {
        run(Four{}, 0);
        run(Four{}, count - 4);
    }
}

// Starting a thread takes about as long as processing this many elements, so no thread gets fewer.
constexpr int64_t kElementsPerThread = 1 << 16;

// Calls run(first, last) for consecutive ranges of `tasks`, one range for each thread. The result of
// a task must not depend on its range. If a call throws, for example because an allocation failed,
// the exception is thrown here after all threads have ended.
template <class Run>
void share_out(int64_t tasks, int64_t elements, int threads, const Run& run) {
    const int64_t useful = elements / kElementsPerThread;
    const int64_t shares = std::max<int64_t>(1, std::min({int64_t(threads), useful, tasks}));
    std::vector<std::exception_ptr> errors(shares);
    const auto run_shares = [&](int64_t share, int64_t end) noexcept {
        try {
            run(tasks * share / shares, tasks * end / shares);
        } catch (...) {
            errors[share] = std::current_exception();
        }
    };
    std::vector<std::thread> workers;
    workers.reserve(shares - 1);
    int64_t share = 1;
    try {
        for (; share < shares; ++share) workers.emplace_back(run_shares, share, share + 1);
    } catch (...) {
        // No more threads can be started, so this one does the rest.
    }
    run_shares(0, 1);
    if (share < shares) run_shares(share, shares);
    for (std::thread& worker : workers) worker.join();
    for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
    }
}

}  // namespace mflow
