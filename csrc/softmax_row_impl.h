// The passes over one row of logits, in vectors of REPO_FAST_VECTOR_BYTES (0: one float at a time), as the table
// REPO_FAST_KERNELS. Each softmax_row_*.cpp includes this once, for the instructions of REPO_FAST_TARGET.
//
// Design. Two reads of the row for its statistics, one read and one write for its gradient. The row, 64 or 128 KB at V
// = 32001, is in the L2 cache of its thread after the first. exp() is computed again for the gradient instead of being
// kept: that costs no memory. Vectors are those of GCC and Clang, whose operators and conversions become the
// instructions of the target: this is the only copy of the arithmetic. Within one instruction set a row's bits depend
// on nothing but the row: not on the op, the threads, or what lies beside it.
//
// 256 rows of 32001 logits, statistics and gradient, in ms on one Zen 4 core:
//                 baseline   avx2   avx512   avx512_bf16
//     float32         20.9    7.8      6.0           5.8
//     bfloat16        32.2   11.6      7.3           6.4
//
// Nothing here may be shared with other translation units: an inline function of the standard library, compiled for
// AVX-512, could be the copy that the linker keeps for everyone. Hence no <algorithm>, no <cmath>, and all names
// internal.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "softmax_row.h"

#ifdef REPO_FAST_BFLOAT16_INSTRUCTIONS
#include <immintrin.h>
#endif

#define REPO_FAST_PRAGMA_OF(text) _Pragma(#text)
#define REPO_FAST_PRAGMA(text) REPO_FAST_PRAGMA_OF(text)
#if defined(REPO_FAST_TARGET) && defined(__clang__)
REPO_FAST_PRAGMA(clang attribute push(__attribute__((target(REPO_FAST_TARGET))), apply_to = function))
#elif defined(REPO_FAST_TARGET)
REPO_FAST_PRAGMA(GCC target(REPO_FAST_TARGET))
#endif

namespace repo_fast {
namespace {

#if REPO_FAST_VECTOR_BYTES
constexpr std::int64_t lanes = REPO_FAST_VECTOR_BYTES / 4;
using Floats = float __attribute__((vector_size(REPO_FAST_VECTOR_BYTES)));
using Words = std::uint32_t __attribute__((vector_size(REPO_FAST_VECTOR_BYTES)));
using Halves = std::uint16_t __attribute__((vector_size(REPO_FAST_VECTOR_BYTES / 2)));

inline Words widen(Halves x) { return __builtin_convertvector(x, Words); }
inline Halves narrow(Words x) { return __builtin_convertvector(x, Halves); }
inline float lane(Floats x, std::int64_t i) { return x[i]; }
#else
constexpr std::int64_t lanes = 1;
using Floats = float;
using Words = std::uint32_t;
using Halves = std::uint16_t;

inline Words widen(Halves x) { return x; }
inline Halves narrow(Words x) { return static_cast<Halves>(x); }
inline float lane(Floats x, std::int64_t) { return x; }
#endif

// Vectors between two additions of partial sums in double: keeps float32 sums of a long row short.
constexpr std::int64_t block = 64 * lanes;

constexpr float infinity = std::numeric_limits<float>::infinity();

// What stands for no logit in a row, at the target and beyond the end. tanh would make a logit of -infinity: with a cap
// it is the lowest finite bfloat16, which no product comes to but by overflow.
template <bool capped>
constexpr float absent = capped ? -3.3895313892515355e38f : -infinity;

template <typename To, typename From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps their number");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

inline Floats broadcast(float x) { return x + Floats{}; }

inline Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

inline Floats load(const Bfloat16* p) {
    Halves x;
    std::memcpy(&x, p, sizeof(x));
    return bits<Floats>(widen(x) << 16);
}

inline float widened(Bfloat16 x) { return bits<float>(std::uint32_t{x} << 16); }

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof(x)); }

#ifdef REPO_FAST_BFLOAT16_INSTRUCTIONS
inline void store(Bfloat16* p, Floats x) {  // numbers below 2^-126 become 0
    const auto rounded = _mm512_cvtneps_pbh(x);
    std::memcpy(p, &rounded, sizeof(rounded));
}
#else
inline void store(Bfloat16* p, Floats x) {  // to the nearest, ties to even
    const Words u = bits<Words>(x);
    const Words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const Halves half = narrow(x == x ? rounded : (u >> 16) | 0x40);
    std::memcpy(p, &half, sizeof(half));
}
#endif

inline void set(float* p, float x) { *p = x; }
inline void set(Bfloat16* p, float x) {
    Bfloat16 vector[lanes];
    store(vector, broadcast(x));
    *p = vector[0];
}

inline float sum_of_lanes(Floats x) {
    float total = 0.0f;
    for (std::int64_t i = 0; i < lanes; ++i) {
        total += lane(x, i);
    }
    return total;
}

// A vector of `count` < lanes elements, then what stands for none: reads and writes nothing beyond the row.
template <bool capped, typename Element>
struct Tail {
    Element elements[lanes];

    Tail(const Element* row, std::int64_t count) {
        store(elements, broadcast(absent<capped>));
        std::memcpy(elements, row, count * sizeof(Element));
    }
};

template <bool capped, typename Element, typename Function>
inline void for_each_vector(const Element* row, std::int64_t size, Function&& function) {
    std::int64_t j = 0;
    for (; j + lanes <= size; j += lanes) {
        function(load(row + j));
    }
    if (j < size) {
        function(load(Tail<capped, Element>(row + j, size - j).elements));
    }
}

template <bool capped, typename Element, typename Function>
inline void transform(Element* row, std::int64_t size, Function&& function) {
    std::int64_t j = 0;
    for (; j + lanes <= size; j += lanes) {
        store(row + j, function(load(row + j)));
    }
    if (j < size) {
        Tail<capped, Element> tail(row + j, size - j);
        store(tail.elements, function(load(tail.elements)));
        std::memcpy(row + j, tail.elements, (size - j) * sizeof(Element));
    }
}

// exp(lowest) is the smallest normal number: anything less counts as 0.
constexpr float lowest = -87.33654f;

// (z - maximum) / temperature, but never below `lowest`, so that exp(t) * t is 0 and not NaN for z = -infinity.
// The difference comes first: it is exactly 0 at the maximum. NaN stays: it is not less than anything.
inline Floats shift(Floats z, float maximum, float inverse_temperature) {
    const Floats t = (z - maximum) * inverse_temperature;
    return broadcast(lowest) > t ? broadcast(lowest) : t;
}

// exp(t) for lowest <= t <= 0, where `lowest` gives 0, 0 gives exactly 1, and NaN NaN. With t = n log 2 + r, |r| <=
// log(2) / 2: a polynomial of degree 6 in r with the least maximal relative error, 3e-9, times 2^n. The number added to
// round t / log 2 to the integer n leaves the bits of n + 127, 2^n's exponent, at the lower end of the sum.
inline Floats exp_from_shifted(Floats t) {
    constexpr float round_and_bias = 12582912.0f + 127.0f;  // 1.5 * 2^23
    const Floats biased = t * 1.44269504f + round_and_bias;
    const Floats n = biased - round_and_bias;
    const Floats r = (t - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts: the first product is exact
    Floats p = r * 0.0013814583653584123f + 0.008368724025785923f;
    p = p * r + 0.04166838899254799f;
    p = p * r + 0.1666652113199234f;
    p = p * r + 0.4999999403953552f;
    p = p * (r * r) + r + 1.0f;
    const Floats e = p * bits<Floats>(bits<Words>(biased) << 23);
    return t == lowest ? Floats{} : e;
}

struct Logits {
    Floats values;
    Floats steepness;  // of the values in the row's elements
};

// Logits from a row's elements: cap * tanh(z / cap) and 1 - tanh^2(z / cap), or z and 1.
template <bool capped>
inline Logits logits_of(Floats z, const LogitScale& scale) {
    if constexpr (!capped) {
        return {z, broadcast(1.0f)};
    } else {
        const Floats y = z * (1.0f / scale.cap);
        const Words sign = bits<Words>(y) & 0x80000000u;
        const Floats twice = bits<Floats>(bits<Words>(y) ^ sign) * -2.0f;
        const Floats e = exp_from_shifted(broadcast(lowest) > twice ? broadcast(lowest) : twice);
        const Floats share = 1.0f / (1.0f + e);
        // y + y^3 times a polynomial with the least maximal relative error, 1.5e-8, where 1 - e would lose digits.
        const Floats q = y * y;
        Floats p = q * 0.01724147f - 0.053045484f;
        p = p * q + 0.13325879f;
        p = p * q - 0.33333144f;
        const Floats outer = bits<Floats>(bits<Words>((1.0f - e) * share) | sign);
        const Floats tanh = twice > broadcast(-1.0f) ? p * (q * y) + y : outer;
        // Not 1 - tanh^2, whose digits are lost near the cap.
        return {z == broadcast(absent<true>) ? broadcast(-infinity) : tanh * scale.cap, 4.0f * e * share * share};
    }
}

template <bool with_weighted, bool capped, typename Element>
RowSums sums(Element* row, std::int64_t V, std::int64_t target, float target_logit, const LogitScale& scale) {
    set(row + target, absent<capped>);
    Floats largest = broadcast(target_logit);
    for_each_vector<capped>(row, V, [&](Floats z) { largest = z > largest ? z : largest; });
    float highest = lane(largest, 0);
    for (std::int64_t i = 1; i < lanes; ++i) {
        const float other = lane(largest, i);
        highest = other > highest ? other : highest;
    }
    if constexpr (capped) {
        // Where all are -infinity, what stands for no logit is the largest; beside it, any number is as low.
        highest = highest > 0.99f * absent<true> || highest != highest ? highest : 0.99f * absent<true>;
    }
    const Logits at_target = logits_of<capped>(broadcast(target_logit), scale);
    RowSums result{lane(logits_of<capped>(broadcast(highest), scale).values, 0), 0.0, 0.0, lane(at_target.values, 0),
                   lane(at_target.steepness, 0)};
    for (std::int64_t first = 0; first < V; first += block) {
        Floats others{};
        Floats weighted{};
        for_each_vector<capped>(row + first, V - first < block ? V - first : block, [&](Floats z) {
            const Floats t = shift(logits_of<capped>(z, scale).values, result.maximum, scale.inverse_temperature);
            const Floats e = exp_from_shifted(t);
            others += e;
            if constexpr (with_weighted) {
                weighted += e * t;
            }
        });
        result.others += sum_of_lanes(others);
        if constexpr (with_weighted) {
            result.weighted += sum_of_lanes(weighted);
        }
    }
    return result;
}

template <bool with_linear, bool capped, typename Element>
void gradient(Element* row, std::int64_t V, std::int64_t target, float maximum, const LogitScale& scale, float constant,
              float linear, float at_target) {
    transform<capped>(row, V, [=](Floats z) {
        const Logits logits = logits_of<capped>(z, scale);
        const Floats t = shift(logits.values, maximum, scale.inverse_temperature);
        Floats result = exp_from_shifted(t);
        if constexpr (with_linear) {
            result *= t * linear + constant;
        } else {
            result *= constant;
        }
        if constexpr (capped) {
            result *= logits.steepness;
        }
        return result;
    });
    set(row + target, at_target);
}

float dot(const Bfloat16* left, const Bfloat16* right, std::int64_t D) {
    Floats total{};
    std::int64_t d = 0;
    for (; d + lanes <= D; d += lanes) {
        total += load(left + d) * load(right + d);
    }
    float result = sum_of_lanes(total);
    for (; d < D; ++d) {
        result += widened(left[d]) * widened(right[d]);
    }
    return result;
}

template <bool capped, typename Element>
constexpr RowFunctions<Element> row_functions{&sums<false, capped, Element>, &sums<true, capped, Element>,
                                              &gradient<false, capped, Element>, &gradient<true, capped, Element>};

}  // namespace

const RowKernels REPO_FAST_KERNELS = {
    REPO_FAST_NAME,
    row_functions<false, float>,
    row_functions<false, Bfloat16>,
    row_functions<true, float>,
    row_functions<true, Bfloat16>,
    &dot,
};

}  // namespace repo_fast

#if defined(REPO_FAST_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
