// What the linear ops do with a chunk of logits between the matrix products: softmax statistics of each row, then,
// where a gradient is wanted, the row overwritten by it. Rows are independent, and each is worked on by one thread.
//
// For 512 rows of 32001 logits, D = 1024, in ms of one Zen 4 core: statistics 8, and with the gradient 13 to 14, beside
// three matrix products of 530 in bfloat16 and 1300 in float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>

#include "instruction_set.h"
#include "parallel.h"
#include "softmax_row.h"

namespace repo_fast {

// What all chunks of one call share: T tokens, of which N have a target.
struct LinearRows {
    const std::int64_t* targets;  // [T]
    const std::int64_t* tokens;   // [N] the token of each valid row; null: row i is token i
    const Bfloat16* weight;       // [V, D]; null where the logits are float32
    std::int64_t weight_stride;
    std::int64_t N;
    std::int64_t V;
    std::int64_t D;
    LogitScale scale;
    int threads;
};

// Logits [rows, V] of valid rows start to start + rows, and their hidden states [rows, D] if the logits are bfloat16.
// Where `kept` is given, that is where the logits are, and `logits` is memory for their gradient.
template <typename Element>
struct Chunk {
    Element* logits;
    std::int64_t stride;
    const Bfloat16* hidden;
    std::int64_t hidden_stride;
    std::int64_t start;
    std::int64_t rows;
    const Element* kept;  // null: the logits are in `logits`
    std::int64_t kept_stride;
};

// Statistics of a row's softmax, in double: they are few.
struct SoftmaxRow {
    float maximum;
    float target_steepness;
    double others;  // sum of exp(t_j), j != target; t, `maximum` and `target_steepness` as in RowSums
    double total;   // with the target
    double log_total;
    double log_prob;  // of the target, never positive
    double entropy;   // 0 where it was not asked for
};

// Derivatives of the loss in a row's log-probability and entropy. The latter may be other than 0 only where the entropy
// was asked for.
struct Slopes {
    double log_prob;
    double entropy;
};

template <typename Element>
const RowFunctions<Element>& row_functions(bool capped) {
    const RowKernels& kernels = row_kernels();
    if constexpr (std::is_same_v<Element, float>) {
        return capped ? kernels.capped_float32 : kernels.float32;
    } else {
        return capped ? kernels.capped_bfloat16 : kernels.bfloat16;
    }
}

// bfloat16 logits are off by up to 2^-9 of their size, which clip ranges see: the target's is taken from its own dot
// product. It takes part in maximum and sum, else log-probabilities would come out positive.
template <typename Element>
SoftmaxRow softmax_row(const LinearRows& linear, const Chunk<Element>& chunk, std::int64_t i, std::int64_t target,
                       bool want_entropy) {
    Element* row = chunk.logits + i * chunk.stride;
    float target_logit;
    if constexpr (std::is_same_v<Element, float>) {
        target_logit = row[target];
    } else {
        target_logit = row_kernels().dot(chunk.hidden + i * chunk.hidden_stride,
                                         linear.weight + target * linear.weight_stride, linear.D);
    }
    const RowFunctions<Element>& functions = row_functions<Element>(linear.scale.cap != 0.0f);
    const RowSums sums = (want_entropy ? functions.weighted_sums : functions.sums)(
        row, linear.V, target, target_logit, linear.scale);
    // Finite, so that what has the probability 0 adds 0 to the entropy.
    const double t = std::max((sums.target - sums.maximum) * linear.scale.inverse_temperature,
                              std::numeric_limits<float>::lowest());
    const double target_exp = std::exp(t);
    // The maximum's 1 is either target_exp or within the others: this is never below log 1.
    const double log_total = std::log1p(sums.others + (target_exp - 1.0));
    const double total = sums.others + target_exp;
    const double entropy = want_entropy ? log_total - (sums.weighted + target_exp * t) / total : 0.0;
    return {sums.maximum, sums.target_steepness, sums.others, total, log_total, t - log_total, entropy};
}

// Overwrites the row by d loss / d logit_j = (a [j = target] - p_j (a + b (log p_j + H))) / temperature, times
// 1 - tanh^2(logit_j / cap) with a cap.
template <typename Element>
void overwrite_by_gradient(const LinearRows& linear, const Chunk<Element>& chunk, std::int64_t i, std::int64_t target,
                           const SoftmaxRow& row, const Slopes& slopes) {
    const double a = slopes.log_prob * linear.scale.inverse_temperature;
    const double b = slopes.entropy * linear.scale.inverse_temperature;
    double at_target = a * row.others / row.total;
    double constant = -a / row.total;
    if (b != 0.0) {
        at_target -= b * std::exp(row.log_prob) * (row.log_prob + row.entropy);
        constant -= b * (row.entropy - row.log_total) / row.total;
    }
    at_target *= row.target_steepness;
    const RowFunctions<Element>& functions = row_functions<Element>(linear.scale.cap != 0.0f);
    (b == 0.0 ? functions.gradient : functions.linear_gradient)(
        chunk.logits + i * chunk.stride, linear.V, target, row.maximum, linear.scale,
        static_cast<float>(constant), static_cast<float>(-b / row.total), static_cast<float>(at_target));
}

// Calls slopes_of(i, t, row) -> std::optional<Slopes> for each row of the chunk: valid row i, token t. Called from
// several threads at once. Rows without slopes are afterwards what they were.
template <typename Element, typename Function>
void for_each_row(const LinearRows& linear, const Chunk<Element>& chunk, bool want_entropy, Function&& slopes_of) {
    parallel_for(chunk.rows, linear.V, linear.threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t r = first; r < last; ++r) {
            const std::int64_t i = chunk.start + r;
            const std::int64_t t = linear.tokens ? linear.tokens[i] : i;
            const std::int64_t target = linear.targets[t];
            Element* logits = chunk.logits + r * chunk.stride;
            if (chunk.kept) {  // a row at a time: its copy is still in the cache when it is worked on
                std::memcpy(logits, chunk.kept + r * chunk.kept_stride, linear.V * sizeof(Element));
            }
            const Element before = logits[target];
            const SoftmaxRow row = softmax_row(linear, chunk, r, target, want_entropy);
            if (const std::optional<Slopes> slopes = slopes_of(i, t, row)) {
                overwrite_by_gradient(linear, chunk, r, target, row, *slopes);
            } else {
                logits[target] = before;
            }
        }
    });
}

}  // namespace repo_fast
