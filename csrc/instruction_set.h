// The choice of the instruction set that the passes over rows run on, at run time.
#pragma once

#include <string>
#include <vector>

#include "softmax_row.h"

namespace repo_fast {

// Names of the instruction sets that this machine can run, the best one last.
std::vector<std::string> instruction_sets();

// The passes of the set in use: the best one, until `set_instruction_set` picks another.
const RowKernels& row_kernels();

// Picks one of `instruction_sets()`; throws std::invalid_argument for any other name. For tests and measurements:
// another set gives other bits.
void set_instruction_set(const std::string& name);

}  // namespace repo_fast
