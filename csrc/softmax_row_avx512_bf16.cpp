// The passes over a row for x86 CPUs with AVX-512 F, BW, DQ, VL and BF16, which rounds to bfloat16 in one instruction.
#include "softmax_row.h"

#ifdef REPO_FAST_X86
#define REPO_FAST_TARGET "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define REPO_FAST_VECTOR_BYTES 64
#define REPO_FAST_BFLOAT16_INSTRUCTIONS
#define REPO_FAST_KERNELS avx512_bf16_kernels
#define REPO_FAST_NAME "avx512_bf16"
#include "softmax_row_impl.h"
#endif
