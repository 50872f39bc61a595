// The PTX instructions of every architecture that CUDA C++ has no name for; ptx.cuh has those of
// sm_90, mma.cuh those that multiply since sm_80. tests/emulated has the same in plain C++.
#pragma once
#include "prelude.cuh"

namespace forge {

// Approximate to 1-2 ulp and without the slow paths of IEEE division and root: an update's last
// bits are far below its weight's. Denormal inputs count as zero, so a divisor needs an epsilon, as
// rules have.
FORGE_DEVICE float fast_sqrt(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FORGE_DEVICE float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x · by + from, cut to 0..1; denormals count as zeros, and NaN gives 0.
FORGE_DEVICE float saturated(float x, float by, float from = 0.0f) {
    float y;
    asm("fma.rn.ftz.sat.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(x), "f"(by), "f"(from));
    return y;
}

// fp16.
FORGE_DEVICE float widen_f16(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<u16>(bits)));
    return value;
}
FORGE_DEVICE u32 narrow_f16(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Two fp32 to bf16, to nearest, ties to even: the first to the lower half.
FORGE_DEVICE u32 narrow_bf16x2(float x, float y) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}
// Adds to `value` one of the two 16-bit halves of `halves`: byte 0 of `which` selects the lower
// one, byte 1 the upper one. One instruction.
FORGE_DEVICE u32 add_half(u32 value, u32 halves, u32 which) {
    u32 sum;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(halves), "r"(which), "r"(value));
    return sum;
}

FORGE_DEVICE u32 shared_address(const void *pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

} // namespace forge
