// The row pass of fused_rectified_policy_loss: from a row's statistics straight to the gradient of the policy loss.
//
// The whole op, forward and backward, T 512, D 1024, V 32001 on two Zen 4 cores, in ms, beside its peers in one run
// (bench/results/2026-11-27-epyc-2-cores):
//                 three products   this op   torch.compile   cut-cross-entropy   plain PyTorch   Liger    TRL
//     bfloat16               276       278             287                 294             353     734   1091
//     float32                602       608             711                 728             785     916   1194
// It loses where the incoming gradient is not known in the forward: linear_log_probs computes the logits again, and its
// backward alone takes 259 ms in bfloat16, where torch.compile, which has kept them, takes 195. With logits_budget it
// keeps them too.
// Tried and rejected: huge pages for the large tensors, which took the page faults (66 MB: 35 ms -> 8) in a loop of
// their own, and nothing, or a tenth more time, around the products.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "linear_rows.h"
#include "rectified_policy_loss.h"

namespace repo_fast {

class FusedPolicyLoss {
public:
    // Log-probabilities and, unless null, entropies are written to arrays [T], at the tokens of each chunk. Entropies
    // must not be null where their coefficient is > 0.
    FusedPolicyLoss(LinearRows linear, PolicyTokens tokens, float entropy_coefficient, bool need_gradient,
                    float* log_probs, float* entropy)
        : linear_(linear),
          tokens_(std::move(tokens)),
          entropy_coefficient_(entropy_coefficient),
          need_gradient_(need_gradient),
          log_probs_(log_probs),
          entropy_(entropy),
          terms_(linear.N) {}

    // Overwrites the logits by the gradient of the loss, if that is needed.
    template <typename Element>
    void row_pass(const Chunk<Element>& chunk) {
        const auto slopes_of = [this](std::int64_t i, std::int64_t t, const SoftmaxRow& row) {
            log_probs_[t] = static_cast<float>(row.log_prob);
            if (entropy_) {
                entropy_[t] = static_cast<float>(row.entropy);
            }
            TokenLoss& term = terms_[i];
            term = token_loss(tokens_, t, log_probs_[t]);
            double entropy_slope = 0.0;
            if (entropy_coefficient_ > 0) {
                term.loss -= entropy_coefficient_ * entropy_[t];
                entropy_slope = -entropy_coefficient_ * term.factor;
            }
            const Slopes slopes{term.slope * term.factor, entropy_slope};
            return need_gradient_ ? std::optional<Slopes>(slopes) : std::nullopt;
        };
        for_each_row(linear_, chunk, entropy_ != nullptr, slopes_of);
    }

    // After all chunks. Adds row after row, whatever the threads and chunks were.
    LossTotals totals() const {
        LossTotals totals;
        for (const TokenLoss& term : terms_) {
            totals.add(term);
        }
        return totals;
    }

    const LinearRows& linear() const { return linear_; }

private:
    LinearRows linear_;
    PolicyTokens tokens_;
    float entropy_coefficient_;
    bool need_gradient_;
    float* log_probs_;
    float* entropy_;
    std::vector<TokenLoss> terms_;  // [N]
};

}  // namespace repo_fast
