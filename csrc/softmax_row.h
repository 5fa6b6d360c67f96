// The vectorised passes over one row of logits, compiled once for each instruction set.
#pragma once

#include <cstdint>

#if defined(__GNUC__) && defined(__x86_64__)
#define REPO_FAST_X86
#endif

namespace repo_fast {

using Bfloat16 = std::uint16_t;  // the upper half of a float's bits

// What becomes of a row's elements: z, or, with a cap, cap * tanh(z / cap); over the temperature.
struct LogitScale {
    float inverse_temperature;
    float cap;  // 0: none
};

// Sums over a row z of V logits without its target, whose part in them is for the caller to add: on a row that is sure
// of its target, what the others add would be lost beside the target's 1. With t_j = (z_j - maximum) / temperature, where
// all z are those under the cap:
struct RowSums {
    float maximum;    // of the whole row, target included
    double others;    // sum of exp(t_j), j != target
    double weighted;  // sum of exp(t_j) * t_j, j != target; 0 where it was not asked for
    float target;            // the target's z
    float target_steepness;  // 1 - tanh^2 there; 1 without a cap
};

template <typename Element>
struct RowFunctions {
    using Sums = RowSums(Element* row, std::int64_t V, std::int64_t target, float target_logit,
                         const LogitScale& scale);
    using Gradient = void(Element* row, std::int64_t V, std::int64_t target, float maximum, const LogitScale& scale,
                          float constant, float linear, float at_target);

    // Overwrite row[target] by what stands for no logit; its own is passed beside the row. The same bits but for
    // `weighted`.
    Sums* sums;
    Sums* weighted_sums;
    // After either: row[j] = exp(t_j) * constant, times 1 - tanh^2(z_j / cap) with a cap, but row[target] = at_target.
    // `linear` is not looked at.
    Gradient* gradient;
    // With exp(t_j) * (constant + linear * t_j) instead.
    Gradient* linear_gradient;
};

struct RowKernels {
    const char* name;  // of the instruction set
    RowFunctions<float> float32;
    RowFunctions<Bfloat16> bfloat16;
    RowFunctions<float> capped_float32;
    RowFunctions<Bfloat16> capped_bfloat16;
    float (*dot)(const Bfloat16* left, const Bfloat16* right, std::int64_t D);  // in float32
};

extern const RowKernels baseline_kernels;
#ifdef REPO_FAST_X86
extern const RowKernels avx2_kernels;
extern const RowKernels avx512_kernels;
extern const RowKernels avx512_bf16_kernels;
#endif

}  // namespace repo_fast
