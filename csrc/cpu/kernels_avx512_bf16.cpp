// The products of bfloat16 matrices for AVX-512 with BF16 (Cooper Lake, Zen 4 and later).
#if defined(__x86_64__)
#define FUSED_BOTTLENECK_ISA isa_avx512_bf16
#define FUSED_BOTTLENECK_VECTOR_BYTES 64
#define FUSED_BOTTLENECK_TARGET "avx2,f16c,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#include "kernels.h"
#include "target.h"

// After the target is set:
#include "simd.h"
#include "loops.h"
#include "pairs_impl.h"
#include "products_impl.h"
FB_END_TARGET
#endif
