// The row passes of linear_log_probs and its backward.
#pragma once

#include "linear_rows.h"

namespace repo_fast {

// Writes log_probs and, unless null, entropy, both [T], at the tokens of the chunk.
template <typename Element>
void linear_log_probs(const LinearRows& linear, const Chunk<Element>& chunk, float* log_probs, float* entropy) {
    const auto write = [=](std::int64_t, std::int64_t t, const SoftmaxRow& row) -> std::optional<Slopes> {
        log_probs[t] = static_cast<float>(row.log_prob);
        if (entropy) {
            entropy[t] = static_cast<float>(row.entropy);
        }
        return std::nullopt;
    };
    for_each_row(linear, chunk, entropy != nullptr, write);
}

// Overwrites the logits by their gradient, given the incoming gradients [T]; null stands for 0.
template <typename Element>
void linear_log_probs_backward(const LinearRows& linear, const Chunk<Element>& chunk, const float* grad_log_probs,
                               const float* grad_entropy) {
    const auto slopes = [=](std::int64_t, std::int64_t t, const SoftmaxRow&) -> std::optional<Slopes> {
        return Slopes{grad_log_probs[t], grad_entropy ? grad_entropy[t] : 0.0f};
    };
    for_each_row(linear, chunk, grad_entropy != nullptr, slopes);
}

}  // namespace repo_fast
