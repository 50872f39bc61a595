// What rules compute with, beside sums and products.
#pragma once
#include "instructions.cuh"

namespace forge {

FORGE_DEVICE float quotient(float numerator, float divisor) {
    return __fmul_rn(numerator, fast_reciprocal(divisor));
}

} // namespace forge
