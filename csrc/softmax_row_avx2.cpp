// The passes over a row for x86 CPUs with AVX2 and FMA.
#include "softmax_row.h"

#ifdef REPO_FAST_X86
#define REPO_FAST_TARGET "avx2,fma"
#define REPO_FAST_VECTOR_BYTES 32
#define REPO_FAST_KERNELS avx2_kernels
#define REPO_FAST_NAME "avx2"
#include "softmax_row_impl.h"
#endif
