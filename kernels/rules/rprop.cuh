// Rprop: src/rule/rprop.rs in CUDA.
#pragma once
#include "arithmetic.cuh"

namespace forge {

struct Rprop {
    static constexpr int STATES = 2;
    static constexpr bool CODED = false;

    // Once for each step, in fp64. `hyper`: lr, weight decay, η₋, η₊, least and largest step.
    FORGE_DEVICE static void constants(double, double, const double *hyper, float *c) {
        for (int i = 0; i < 6; ++i)
            c[i] = static_cast<float>(hyper[i]);
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmaf_rn(c[1], w, __fmul_rn(g, scale));
        // Signs are compared, since the product may underflow; as bits, which takes fewer
        // predicates.
        const bool opposite = static_cast<i32>(float_to_bits(g) ^ float_to_bits(s[0])) < 0;
        const bool neither = fminf(fabsf(g), fabsf(s[0])) == 0.0f;
        const float factor = neither ? 1.0f : opposite ? c[2] : c[3];
        // States begin as zeros, and stay so where the first steps were skipped.
        const float before = s[1] == 0.0f ? c[0] : s[1];
        const float size = fmaxf(fminf(__fmul_rn(before, factor), c[5]), c[4]);
        s[0] = opposite && !neither ? 0.0f : g;
        s[1] = size;
        w = __fsub_rn(w, s[0] == 0.0f ? 0.0f : copysignf(size, s[0]));
    }
};

} // namespace forge
