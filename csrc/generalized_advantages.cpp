#include "generalized_advantages.h"

namespace repo_fast {

void generalized_advantages(const float* rewards, const float* values, const std::int32_t* cu_seqlens,
                            std::size_t responses, double gamma, double lambda, float* advantages, float* returns) {
    const double decay = gamma * lambda;
    for (std::size_t s = 0; s < responses; ++s) {
        double advantage = 0.0;
        double next_value = 0.0;
        for (std::int64_t t = std::int64_t{cu_seqlens[s + 1]} - 1; t >= cu_seqlens[s]; --t) {
            const double value = values[t];
            advantage = rewards[t] + gamma * next_value - value + decay * advantage;
            advantages[t] = static_cast<float>(advantage);
            returns[t] = static_cast<float>(advantage + value);
            next_value = value;
        }
    }
}

}  // namespace repo_fast
