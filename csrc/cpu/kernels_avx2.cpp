// The kernels for AVX2 with F16C and FMA (Haswell, Zen and later).
#if defined(__x86_64__)
#define FUSED_BOTTLENECK_ISA isa_avx2
#define FUSED_BOTTLENECK_VECTOR_BYTES 32
#define FUSED_BOTTLENECK_TARGET "avx2,f16c,fma"
#include "kernels_impl.h"
#endif
