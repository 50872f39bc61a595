// 8-bit states: src/format/q8.rs in CUDA, within 1e-4 of its bounds, with the fast root and
// reciprocal. The fused kernel and the element-wise one share it, so that both give the same codes.
//
// Blocks whose largest entry is below fp32's normal range are stored as zeros.
#pragma once
#include "instructions.cuh"

namespace forge {

// 2^23: a byte put below it is exactly a float.
constexpr u32 BYTE_MAGIC = 0x4B000000u;
constexpr float BYTE_ZERO = 8388608.0f;
// 1.5 · 2^23: adding it rounds to an integer in the low bits, negative ones too.
constexpr float ROUND_MAGIC = 12582912.0f;
constexpr float SMALLEST_NORMAL = 1.1754944e-38f, LARGEST = 3.4028235e38f;
// The largest square root of a number.
constexpr float LARGEST_ROOT = 1.8446743e19f;

// From a scale to what one squared (signed) or one level (root) is worth. `by`: multiplies what is
// decoded.
template <bool SIGNED> FORGE_DEVICE float q8_decode_factor(float scale, float by) {
    return __fmul_rn(__fmul_rn(scale, SIGNED ? 1.0f / (127.0f * 127.0f) : 1.0f / 255.0f), by);
}

// `code_as_float`: BYTE_MAGIC with the code in its low byte. RAW, for a rule that takes coded
// states: the squared level, to be multiplied by `factor` yet, or the root of what is not negative.
template <bool SIGNED, bool RAW> FORGE_DEVICE float q8_decode(u32 code_as_float, float factor) {
    if constexpr (SIGNED) {
        const float level = __fsub_rn(bits_to_float(code_as_float), BYTE_ZERO + 128.0f);
        const float squared = __fmul_rn(level, fabsf(level));
        return RAW ? squared : __fmul_rn(squared, factor);
    } else {
        // level · factor: the product with a power of two that is taken away is exact.
        const float root =
            __fmaf_rn(bits_to_float(code_as_float), factor, __fmul_rn(-BYTE_ZERO, factor));
        return RAW ? root : __fmul_rn(root, root);
    }
}

// From the scale of a block, max |m| or max sqrt(v), to the factor of its encoding. Where a draw is
// added, the largest entry must not come out above the last code, though root and reciprocal are
// fast ones: one part in 2^19 less.
template <bool SIGNED, bool STOCHASTIC = false> FORGE_DEVICE float q8_encode_factor(float scale) {
    constexpr float MOST = (SIGNED ? 127.0f : 255.0f) * (STOCHASTIC ? 1.0f - 1.0f / 524288 : 1.0f);
    if (scale < SMALLEST_NORMAL)
        return 0.0f;
    return SIGNED ? __fmul_rn(MOST, fast_reciprocal(fast_sqrt(scale)))
                  : __fmul_rn(MOST, fast_reciprocal(scale));
}

FORGE_DEVICE float q8_stored_scale(float largest, float unit) {
    const float scale = fminf(__fmul_rn(largest, unit), LARGEST);
    return largest < SMALLEST_NORMAL || scale < SMALLEST_NORMAL ? 0.0f : scale;
}

// Of sqrt(v): 1 if it is not zero, since it divides. Any number above zero rounds up to 1.
FORGE_DEVICE float q8_least_code(float value) {
    return __fmaf_ru(value, 2.7105054e-20f, ROUND_MAGIC); // 2^-65
}

// The code nearest to m, or to sqrt(v), in the low byte.
template <bool SIGNED> FORGE_DEVICE u32 q8_encode(float value, float factor) {
    if constexpr (SIGNED) {
        const float signed_factor = copysignf(factor, value);
        return float_to_bits(
            __fmaf_rn(fast_sqrt(fabsf(value)), signed_factor, ROUND_MAGIC + 128.0f));
    } else {
        return float_to_bits(fmaxf(__fmaf_rn(value, factor, ROUND_MAGIC), q8_least_code(value)));
    }
}

// The same, up or down by a draw of 16 bits, with the code in the third byte.
//
// From 256 to 512 a float's last bit is worth 2^-15: its bits, doubled, are a number with 16 bits
// behind the point, to which a draw is added. Cut, that is floor(x + u).
template <bool SIGNED> FORGE_DEVICE u32 q8_encode_stochastic(float value, float factor, u32 draw) {
    float lifted;
    if constexpr (SIGNED)
        lifted = __fmaf_rn(fast_sqrt(fabsf(value)), copysignf(factor, value), 256.0f + 128.0f);
    else // Any number above zero gets 1 at least, since it divides.
        lifted = fmaxf(__fmaf_rn(value, factor, 256.0f), 256.0f + saturated(value, 1.2676506e30f));
    return (float_to_bits(lifted) << 1) + draw;
}

} // namespace forge
