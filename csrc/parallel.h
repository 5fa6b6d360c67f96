// Threads for the loops over rows. OpenMP's where the compiler has it: on Linux the extension then runs in PyTorch's own
// pool, whose threads, when they have just done a product, wait in a busy loop. Threads beside them would share their
// cores: 13.8 ms instead of 7.1 for 512 x 32001 logits in bfloat16 (two Zen 4 cores, no OMP_WAIT_POLICY). Elsewhere
// those of <thread>, started for each loop.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace repo_fast {

// Elements that are worth a thread: about 0.4 ms of work, some times what starting it costs.
constexpr std::int64_t elements_per_thread = 1 << 19;

// Calls function(first, last) on parts of 0 to `items`, each of `size` elements, on at most `threads` threads.
template <typename Function>
void parallel_for(std::int64_t items, std::int64_t size, int threads, Function&& function) {
    const std::int64_t worth = items * size / elements_per_thread;
    const std::int64_t parts = std::max<std::int64_t>(1, std::min({worth, items, std::int64_t{threads}}));
    const auto run = [&](std::int64_t part) { function(items * part / parts, items * (part + 1) / parts); };
    if (parts == 1) {
        run(0);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (std::int64_t part = 0; part < parts; ++part) {
        run(part);
    }
#else
    std::vector<std::thread> others;
    std::int64_t started = 1;
    for (; started < parts; ++started) {
        try {
            others.emplace_back(run, started);
        } catch (const std::system_error&) {  // no thread to be had: the rest is done here
            break;
        }
    }
    run(0);
    for (std::int64_t part = started; part < parts; ++part) {
        run(part);
    }
    for (std::thread& other : others) {
        other.join();
    }
#endif
}

}  // namespace repo_fast
