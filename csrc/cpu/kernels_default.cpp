// The kernels for the compiler's baseline: SSE2 on x86-64, NEON on aarch64.
#define FUSED_BOTTLENECK_ISA isa_default
#define FUSED_BOTTLENECK_VECTOR_BYTES 16
#include "kernels_impl.h"
