#include "rectified_policy_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "prompt_violations.h"

namespace repo_fast {
namespace {

constexpr float log_ratio_bound = 20.0f;  // keeps exp() far from float32's overflow

// NaN if either is, as torch.minimum.
float minimum(float a, float b) { return a < b || std::isnan(a) ? a : b; }

}  // namespace

std::vector<Sequence> weigh_sequences(const std::string& op, const PolicyTokens& tokens, const float* violations,
                                      std::int64_t S) {
    std::vector<std::int64_t> counts(S);
    for (std::int64_t i = 0; i < tokens.N; ++i) {
        const std::int64_t s = tokens.sequence_ids[tokens.tokens ? tokens.tokens[i] : i];
        if (s < 0 || s >= S) {
            throw std::invalid_argument(op + ": sequence_ids of the valid tokens must be in [0, S=" +
                                        std::to_string(S) + "), got " + std::to_string(s));
        }
        ++counts[s];
    }
    const Objective& objective = tokens.objective;
    const auto present = S - std::count(counts.begin(), counts.end(), 0);
    const double items = static_cast<double>(objective.reduction == Reduction::token_mean ? tokens.N : present);
    const double denominator = objective.denominator.value_or(items);
    const float multiplier = objective.multiplier;

    std::vector<Sequence> sequences(S);
    for (std::int64_t s = 0; s < S; ++s) {
        Sequence& sequence = sequences[s];
        if (std::isnan(violations[s])) {  // not known to be safe
            sequence.reward_weight = sequence.cost_weight = std::numeric_limits<float>::quiet_NaN();
        } else if (!(violations[s] > (objective.rectify ? 0.0f : does_not_apply))) {
            sequence.reward_weight = 1.0f;
            sequence.cost_weight = 0.0f;
        } else {
            sequence.reward_weight = 1.0f / (1.0f + multiplier);
            sequence.cost_weight = multiplier / (1.0f + multiplier);
        }
        switch (objective.reduction) {
            case Reduction::sum:
                sequence.share = 1.0f;
                break;
            case Reduction::token_mean:
                sequence.share = static_cast<float>(1.0 / denominator);
                break;
            case Reduction::sequence_mean:  // a response without valid tokens is never looked up
                sequence.share = static_cast<float>(1.0 / (static_cast<double>(counts[s]) * denominator));
                break;
        }
    }
    return sequences;
}

double unsafe_fraction(const float* violations, std::int64_t S) {
    double unsafe = 0.0;
    for (std::int64_t s = 0; s < S; ++s) {
        unsafe += std::isnan(violations[s]) ? std::numeric_limits<double>::quiet_NaN() : violations[s] > 0;
    }
    const auto applicable = S - std::count(violations, violations + S, does_not_apply);
    return unsafe / static_cast<double>(std::max<std::int64_t>(applicable, 1));
}

TokenLoss token_loss(const PolicyTokens& tokens, std::int64_t t, float log_prob) {
    const Objective& objective = tokens.objective;
    const Sequence& sequence = tokens.sequences[tokens.sequence_ids[t]];
    const float raw = log_prob - (tokens.old_log_probs ? tokens.old_log_probs[t] : log_prob);
    const float log_ratio = std::clamp(raw, -log_ratio_bound, log_ratio_bound);
    const float ratio = std::exp(log_ratio);
    const float bounded =
        std::clamp(ratio, static_cast<float>(1 - objective.clip_low), static_cast<float>(1 + objective.clip_high));
    TokenLoss result{};
    result.factor = sequence.share * (tokens.importance_weights ? tokens.importance_weights[t] : 1.0f);
    result.divergence = std::expm1(log_ratio) - log_ratio;

    // Weights that are zero are multiplied, never skipped: 0 * NaN shows up.
    const auto add_stream = [&](float weight, float advantage) {
        const float plain = ratio * advantage;
        const float limited = bounded * advantage;
        const bool bites = limited < plain;
        result.loss -= weight * minimum(plain, limited);
        result.slope -= weight * (bites ? 0.0f : plain);
        result.clipped |= bites && weight != 0.0f;
    };
    const float reward = tokens.reward_advantages[t];
    const float cost = tokens.cost_advantages[t];
    if (objective.mixed) {
        add_stream(1.0f, sequence.reward_weight * reward - sequence.cost_weight * cost);
    } else {
        add_stream(sequence.reward_weight, reward);
        add_stream(sequence.cost_weight, -cost);
    }
    if (std::abs(raw) > log_ratio_bound) {
        result.slope = 0.0f;
    }
    if (tokens.ref_log_probs) {
        const auto coefficient = static_cast<float>(objective.kl_coefficient);
        const float d = tokens.ref_log_probs[t] - log_prob;
        const float excess = std::expm1(d);
        result.loss += coefficient * (excess - d);
        result.slope -= coefficient * excess;
    }
    return result;
}

LossTotals rectified_policy_loss(const PolicyTokens& tokens, const float* log_probs, float* gradient) {
    LossTotals totals;
    for (std::int64_t i = 0; i < tokens.N; ++i) {
        const std::int64_t t = tokens.tokens ? tokens.tokens[i] : i;
        const TokenLoss token = token_loss(tokens, t, log_probs[t]);
        gradient[t] = token.slope * token.factor;
        totals.add(token);
    }
    return totals;
}

}  // namespace repo_fast
