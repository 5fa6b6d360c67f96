// The passes over a row for any CPU: 128-bit vectors, or single floats where the compiler has no vector types.
#ifdef __GNUC__
#define REPO_FAST_VECTOR_BYTES 16
#else
#define REPO_FAST_VECTOR_BYTES 0
#endif
#define REPO_FAST_KERNELS baseline_kernels
#define REPO_FAST_NAME "baseline"
#include "softmax_row_impl.h"
