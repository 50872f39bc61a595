// kernels/instructions.cuh in C++, in its place on the host. Roots and reciprocals are exact here,
// where a device's are off by 1-2 ulp; denormals are zeros as there.
#pragma once
#include "prelude.cuh"

namespace forge {

FORGE_DEVICE float without_denormals(float x) {
    return std::fpclassify(x) == FP_SUBNORMAL ? copysignf(0.0f, x) : x;
}
FORGE_DEVICE float fast_sqrt(float x) { return without_denormals(std::sqrt(without_denormals(x))); }
FORGE_DEVICE float fast_reciprocal(float x) {
    return without_denormals(1.0f / without_denormals(x));
}

FORGE_DEVICE float saturated(float x, float by, float from = 0.0f) {
    const float sum =
        std::fmaf(without_denormals(x), without_denormals(by), without_denormals(from));
    return sum > 0.0f ? min(without_denormals(sum), 1.0f) : 0.0f;
}

FORGE_DEVICE float widen_f16(u32 bits) {
    const u32 sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 0x3FFu;
    if (exponent == 0)
        return copysignf(static_cast<float>(fraction) * 0x1p-24f, bits_to_float(sign));
    return bits_to_float(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
}
// To nearest, ties to even.
FORGE_DEVICE u32 narrow_f16(float value) {
    const u32 sign = float_to_bits(value) >> 16 & 0x8000u;
    const float magnitude = fabsf(value);
    if (!(magnitude < 65520.0f))
        return sign | (magnitude != magnitude ? 0x7FFFu : 0x7C00u);
    // Its units are those of the exponent, or of denormals: the sum rounds to them.
    const int exponent = max(std::ilogb(max(magnitude, 0x1p-14f)), -14);
    const float units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
    return sign | (static_cast<u32>(units) + (static_cast<u32>(exponent + 14) << 10));
}

// To nearest, ties to even; a NaN is the instruction's own.
FORGE_DEVICE u32 nearest_bf16(float value) {
    const u32 bits = float_to_bits(value);
    return value != value ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}
FORGE_DEVICE u32 narrow_bf16x2(float x, float y) {
    return nearest_bf16(x) | nearest_bf16(y) << 16;
}
// Dot product of two 16-bit halves with the lower two bytes.
FORGE_DEVICE u32 add_half(u32 value, u32 halves, u32 which) {
    return value + (halves & 0xFFFFu) * (which & 0xFFu) + (halves >> 16) * (which >> 8 & 0xFFu);
}

FORGE_DEVICE u32 shared_address(const void *pointer) {
    return static_cast<u32>(static_cast<const unsigned char *>(pointer) - ::shared);
}

} // namespace forge
