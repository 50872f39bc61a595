// How factors, weights and states are stored: src/format in CUDA. The roundings into bf16 and its
// halves give the CPU's bits; the q8 codes keep its bounds (see src/format/q8.rs) to within 1e-4 of
// them, with the fast root and reciprocal.
#pragma once
#include "instructions.cuh"
#include "prelude.cuh"
#include "q8.cuh"

namespace forge {
namespace formats {

// --- bf16: src/format/bf16.rs ---

constexpr u32 INFINITY_BITS = 0x7F800000u, LARGEST_BF16 = 0x7F7F0000u;

FORGE_DEVICE float widen_bf16(u32 bits) { return bits_to_float(bits << 16); }

// Nearest, ties to even; overflow goes to infinity, NaN stays NaN.
FORGE_DEVICE u32 narrow_bf16(float value) {
    const u32 bits = float_to_bits(value);
    const u32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7FFFFFFFu) > INFINITY_BITS ? (bits >> 16) | 0x40u : rounded;
}

// Up in magnitude with probability (lower 16 bits) / 65536. A finite value never becomes infinite.
FORGE_DEVICE u32 narrow_bf16(float value, u32 draw) {
    const u32 bits = float_to_bits(value);
    const u32 magnitude = bits & 0x7FFFFFFFu;
    const u32 finite = min(magnitude + draw, LARGEST_BF16 | 0xFFFFu) >> 16;
    const u32 special = magnitude > INFINITY_BITS ? (magnitude >> 16) | 0x40u : INFINITY_BITS >> 16;
    return (magnitude >= INFINITY_BITS ? special : finite) | ((bits >> 16) & 0x8000u);
}

// Pairs of neighbours, the first in the lower half.
FORGE_DEVICE float2 widen_bf16x2(u32 pair) {
    return make_float2(bits_to_float(pair << 16), bits_to_float(pair & 0xFFFF0000u));
}
// Adds 16 random bits below each bf16 and cuts; 0 for `one` in place of 1 only cuts.
FORGE_DEVICE u32 narrow_bf16x2_stochastic(float x, float y, u32 draws, u32 one) {
    return __byte_perm(add_half(float_to_bits(x), draws, one),
                       add_half(float_to_bits(y), draws, one << 8), 0x7632);
}
// Adding bits must not turn the largest finite numbers into infinities, nor a NaN into a zero: so
// not where one of some values is that large or not finite. `magnitudes`: their sum, which is no
// smaller than the largest.
FORGE_DEVICE bool roundable(float magnitudes) { return magnitudes <= 3.3e38f; }

// The fp32 of a bf16 and the 16 bits below it, and back: together all 32 bits. The bf16 is the fp32
// rounded to nearest, ties away from zero.
FORGE_DEVICE float join_halves(u32 upper_lower) {
    return bits_to_float(upper_lower - ((upper_lower & 0x8000u) << 1));
}
FORGE_DEVICE float join_halves(u32 upper, u32 lower) { return join_halves(upper << 16 | lower); }
FORGE_DEVICE u32 upper_half(float value) {
    const u32 bits = float_to_bits(value);
    return ((bits >> 16) + ((bits >> 15) & 1u)) & 0xFFFFu;
}
FORGE_DEVICE u32 lower_half(float value) { return float_to_bits(value) & 0xFFFFu; }
// Of two fp32's bits.
FORGE_DEVICE u32 upper_halves(u32 x, u32 y) {
    return __byte_perm(x + 0x8000u, y + 0x8000u, 0x7632);
}

// --- factors: 0 fp32, 1 bf16, 2 fp16 ---

template <int DTYPE> struct FactorBits {
    using Type = u16;
};
template <> struct FactorBits<0> {
    using Type = float;
};

template <int DTYPE> FORGE_DEVICE float load_factor(const void *data, u64 at) {
    if constexpr (DTYPE == 0)
        return static_cast<const float *>(data)[at];
    if constexpr (DTYPE == 1)
        return widen_bf16(static_cast<const u16 *>(data)[at]);
    return widen_f16(static_cast<const u16 *>(data)[at]);
}
template <int DTYPE> FORGE_DEVICE void store_factor(void *data, u64 at, float value) {
    if constexpr (DTYPE == 0)
        static_cast<float *>(data)[at] = value;
    if constexpr (DTYPE == 1)
        static_cast<u16 *>(data)[at] = static_cast<u16>(narrow_bf16(value));
    if constexpr (DTYPE == 2)
        static_cast<u16 *>(data)[at] = static_cast<u16>(narrow_f16(value));
}

// --- q8 ---

// A block's constants, from the largest |value| of it, NaN left out. ROOT: values are roots
// already.
template <bool SIGNED, bool ROOT = false, bool STOCHASTIC = false> struct Q8Block {
    float scale;  // as stored
    float factor; // from a root to its position among the codes
    float most;   // of a value, before its root is taken

    // `unit`: of the values, for the scale.
    FORGE_DEVICE Q8Block(float largest, float unit) {
        // What overflowed counts as the largest number: 0 · ∞ would be NaN.
        most = largest = fminf(largest, ROOT && !SIGNED ? LARGEST_ROOT : LARGEST);
        if (!SIGNED && !ROOT)
            largest = fast_sqrt(largest);
        factor = q8_encode_factor<SIGNED, STOCHASTIC>(largest);
        scale = q8_stored_scale(largest, unit);
    }

    // `draw` of 16 bits decides where rounding is stochastic.
    FORGE_DEVICE u32 encode(float value, u32 draw) const {
        // Also for a NaN, as in the fused kernel.
        value = copysignf(fminf(fabsf(value), most), value);
        if (!SIGNED && !ROOT)
            value = fast_sqrt(value);
        const u32 code = STOCHASTIC ? q8_encode_stochastic<SIGNED>(value, factor, draw) >> 16
                                    : q8_encode<SIGNED>(value, factor);
        return code & 0xFFu;
    }
};

} // namespace formats
} // namespace forge
