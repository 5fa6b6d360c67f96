// How far each response's cost is above the threshold: its own, its prompt's mean, or the batch's mean.
#pragma once

#include <cstdint>
#include <limits>

namespace repo_fast {

// The cost of a response that the constraint does not apply to, and its violation.
constexpr float does_not_apply = -std::numeric_limits<float>::infinity();

enum class Scope { prompt, response, batch };

// costs, prompt_ids and violations are [S]. Costs are added in the order given, in double: all ranks that hold the same
// responses in the same order get the same bits. A NaN cost makes its mean NaN, and no other; one of -infinity does not
// apply and does not count, and its own violation is -infinity, unless the mean is NaN.
void prompt_violations(const float* costs, const std::int64_t* prompt_ids, std::int64_t S, Scope scope, float threshold,
                       float* violations);

}  // namespace repo_fast
