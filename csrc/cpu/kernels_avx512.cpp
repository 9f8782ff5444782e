// The kernels for AVX-512 F, BW, DQ and VL (Skylake-X, Zen 4 and later).
#if defined(__x86_64__)
#define FUSED_BOTTLENECK_ISA isa_avx512
#define FUSED_BOTTLENECK_VECTOR_BYTES 64
#define FUSED_BOTTLENECK_TARGET "avx2,f16c,fma,avx512f,avx512bw,avx512dq,avx512vl"
#include "kernels_impl.h"
#endif
