#include "prompt_violations.h"

#include <cmath>
#include <unordered_map>

namespace repo_fast {
namespace {

struct Mean {
    double sum = 0.0;
    std::int64_t count = 0;

    void add(float cost) {
        if (cost != does_not_apply) {
            sum += cost;
            ++count;
        }
    }
    float value() const { return count ? static_cast<float>(sum / static_cast<double>(count)) : does_not_apply; }
};

}  // namespace

void prompt_violations(const float* costs, const std::int64_t* prompt_ids, std::int64_t S, Scope scope, float threshold,
                       float* violations) {
    std::unordered_map<std::int64_t, Mean> means;
    // For the batch all responses answer the same prompt.
    const auto key = [=](std::int64_t s) { return scope == Scope::batch ? 0 : prompt_ids[s]; };
    if (scope != Scope::response) {
        for (std::int64_t s = 0; s < S; ++s) {
            means[key(s)].add(costs[s]);
        }
    }
    for (std::int64_t s = 0; s < S; ++s) {
        const float mean = scope == Scope::response ? costs[s] : means[key(s)].value();
        violations[s] = costs[s] == does_not_apply && !std::isnan(mean) ? does_not_apply : mean - threshold;
    }
}

}  // namespace repo_fast
