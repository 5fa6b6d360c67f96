// Threads for the loops over rows, started for each loop. OpenMP's, which would share PyTorch's pool, took as long
// within the noise of two busy cores (512 x 32001 logits), and need a library that compilers on macOS do not bring.
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
    std::vector<std::thread> others;
    std::int64_t part = 1;
    for (; part < parts; ++part) {
        try {
            others.emplace_back([&, part] { function(items * part / parts, items * (part + 1) / parts); });
        } catch (const std::system_error&) {  // no thread to be had: the rest is done here
            break;
        }
    }
    function(0, items / parts);
    if (part < parts) {
        function(items * part / parts, items);
    }
    for (std::thread& other : others) {
        other.join();
    }
}

}  // namespace repo_fast
