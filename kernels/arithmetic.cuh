// What rules compute with, beside sums and products.
#pragma once
#include "instructions.cuh"

namespace forge {

// FORGE_EXACT, for fp32 factors that are not split, whose products are exact in the same sense
// (kernels/exact.cu): IEEE's, so that every element gets the bits that the CPU backend gives it.
#if FORGE_EXACT
constexpr bool EXACT = true;
FORGE_DEVICE float root(float x) { return __fsqrt_rn(x); }
FORGE_DEVICE float quotient(float numerator, float divisor) {
    return __fdiv_rn(numerator, divisor);
}
#else
constexpr bool EXACT = false;
FORGE_DEVICE float root(float x) { return fast_sqrt(x); }
FORGE_DEVICE float quotient(float numerator, float divisor) {
    return __fmul_rn(numerator, fast_reciprocal(divisor));
}
#endif

} // namespace forge
