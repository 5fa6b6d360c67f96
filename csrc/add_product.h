// Sums of products in bfloat16, over chunks of rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace repo_fast {

// high + low += product, all of them bfloat16 bits. The pair holds 16 bits of the sum in the memory of one float32, but
// half of that memory is the sum rounded to bfloat16, which is what the caller is to return: no more float32 copy
// beside it. Bound by memory on any instruction set. The sum is infinite or NaN where float32's would be, if not always
// the same of the two.
inline void add_product(std::uint16_t* high, std::uint16_t* low, const std::uint16_t* product, std::int64_t size,
                        int threads) {
    const auto widen = [](std::uint16_t half) {
        const std::uint32_t bits = std::uint32_t{half} << 16;
        float number;
        std::memcpy(&number, &bits, sizeof(number));
        return number;
    };
    const auto round = [](float number) {  // to the nearest, ties to even
        std::uint32_t bits;
        std::memcpy(&bits, &number, sizeof(bits));
        const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return static_cast<std::uint16_t>(number == number ? rounded : (bits >> 16) | 0x40);
    };
    parallel_for(size, 1, threads, [=](std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) {
            const float sum = widen(high[i]) + (widen(low[i]) + widen(product[i]));
            high[i] = round(sum);
            low[i] = round(sum - widen(high[i]));
        }
    });
}

}  // namespace repo_fast
