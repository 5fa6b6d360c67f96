// Generalized advantage estimation (arXiv 1506.02438) over packed responses, on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace repo_fast {

// For each response s, tokens cu_seqlens[s] to cu_seqlens[s+1] of the packed arrays, from its last token to its first:
//     delta_t      = rewards_t + gamma * values_{t+1} - values_t          (values past the end are 0: no bootstrap)
//     advantages_t = delta_t + gamma * lambda * advantages_{t+1}
//     returns_t    = advantages_t + values_t
// cu_seqlens has `responses` + 1 entries that rise from 0 to the number of tokens; the caller has checked that.
// The running sum is double: it costs nothing in a loop that waits for itself, and long responses lose no digits.
void generalized_advantages(const float* rewards, const float* values, const std::int32_t* cu_seqlens,
                            std::size_t responses, double gamma, double lambda, float* advantages, float* returns);

}  // namespace repo_fast
