#include "instruction_set.h"

#include <atomic>
#include <stdexcept>

namespace repo_fast {
namespace {

std::vector<const RowKernels*> find_kernels() {
    std::vector<const RowKernels*> found{&baseline_kernels};
#ifdef REPO_FAST_X86  // the builtin also asks whether the operating system saves the registers
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2) found.push_back(&avx2_kernels);
    if (avx512) found.push_back(&avx512_kernels);
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16_kernels);
#endif
    return found;
}

const std::vector<const RowKernels*>& kernels() {
    static const std::vector<const RowKernels*> found = find_kernels();
    return found;
}

std::atomic<const RowKernels*>& chosen() {
    static std::atomic<const RowKernels*> choice{kernels().back()};
    return choice;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const RowKernels* table : kernels()) {
        names.emplace_back(table->name);
    }
    return names;
}

const RowKernels& row_kernels() { return *chosen().load(); }

void set_instruction_set(const std::string& name) {
    for (const RowKernels* table : kernels()) {
        if (name == table->name) {
            chosen() = table;
            return;
        }
    }
    std::string known;
    for (const RowKernels* table : kernels()) {
        known += std::string(known.empty() ? "" : ", ") + table->name;
    }
    throw std::invalid_argument("instruction set must be one of " + known + " on this CPU, got " + name);
}

}  // namespace repo_fast
