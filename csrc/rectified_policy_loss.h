// The rectified clipped policy loss of single tokens, for rectified_policy_loss and the fused op. The formulas are
// those of repo_fast/ops/loss.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace repo_fast {

enum class Reduction { sequence_mean, token_mean, sum };

struct Objective {
    float multiplier;
    bool rectify;
    bool mixed;  // the surrogate: one clipped term of the mixed advantages, not one each
    double clip_low;
    double clip_high;
    double kl_coefficient;
    Reduction reduction;
    std::optional<double> denominator;
};

// A response's weights of the two streams, and d loss / d (a token's loss), before importance weights.
struct Sequence {
    float reward_weight;
    float cost_weight;
    float share;
};

// What the loss knows about T tokens besides their log-probabilities: arrays [T], of which only the N valid tokens are
// read.
struct PolicyTokens {
    const float* old_log_probs;  // null: on-policy
    const float* reward_advantages;
    const float* cost_advantages;
    const std::int64_t* sequence_ids;
    const float* ref_log_probs;       // null: no penalty
    const float* importance_weights;  // null: 1
    const std::int64_t* tokens;       // [N] the valid ones; null: all
    std::int64_t N;
    Objective objective;
    std::vector<Sequence> sequences;  // [S], of weigh_sequences
};

// The loss of one token without its entropy term, its derivative in the log-probability, its factor in the whole loss,
// whether clipping bit, and (ratio - 1) - log ratio.
struct TokenLoss {
    float loss;
    float slope;
    float factor;
    bool clipped;
    float divergence;
};

// Sums over valid tokens.
struct LossTotals {
    double loss = 0.0;
    std::int64_t clipped = 0;
    double divergence = 0.0;

    void add(const TokenLoss& token) {
        loss += static_cast<double>(token.loss) * token.factor;
        clipped += token.clipped;
        divergence += token.divergence;
    }
};

// The weights of the S responses, given their violations. Throws std::invalid_argument, its message starting with `op`,
// if a valid token's sequence id is outside [0, S).
std::vector<Sequence> weigh_sequences(const std::string& op, const PolicyTokens& tokens, const float* violations,
                                      std::int64_t S);

// Share of the responses with a violation > 0 among those that are not -infinity, to which the constraint applies: 0 for
// none at all, NaN if one is not known.
double unsafe_fraction(const float* violations, std::int64_t S);

TokenLoss token_loss(const PolicyTokens& tokens, std::int64_t t, float log_prob);

// Loss of given log-probabilities [T]; writes d loss / d log_probs at the valid tokens of gradient [T].
LossTotals rectified_policy_loss(const PolicyTokens& tokens, const float* log_probs, float* gradient);

}  // namespace repo_fast
