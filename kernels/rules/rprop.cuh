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
        c[6] = __fsub_rn(c[3], 1.0f);
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmaf_rn(c[1], w, __fmul_rn(g, scale));
        if constexpr (EXACT)
            by_comparison(c, g, w, s);
        else
            by_saturation(c, g, w, s);
    }

  private:
    FORGE_DEVICE static void by_comparison(const float *c, float g, float &w, float *s) {
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

    // The same but that denormals count as zeros, as they do for a root, and that an infinite
    // gradient which turns becomes NaN: signs become zeros and ones by products that saturate.
    // Comparisons, selections and the logic of bits take a pipe of half the width of that of
    // products, and were a quarter of the rule's time.
    FORGE_DEVICE static void by_saturation(const float *c, float g, float &w, float *s) {
        constexpr float LARGE = 8.507059e37f; // 2^126
        // 0, ½ or 1; so −1, 0 or 1.
        const float sign = __fmaf_rn(saturated(g, LARGE, 0.5f), 2.0f, -1.0f);
        const float product = __fmul_rn(sign, s[0]);
        const float same = saturated(product, LARGE), opposite = saturated(product, -LARGE);
        const float keeps = __fsub_rn(1.0f, opposite);
        const float factor = __fmaf_rn(opposite, c[2], __fmaf_rn(same, c[6], keeps));
        const float begun = saturated(s[1], LARGE);
        const float before = __fadd_rn(s[1], __fmaf_rn(begun, -c[0], c[0]));
        s[1] = fmaxf(fminf(__fmul_rn(before, factor), c[5]), c[4]);
        s[0] = __fmul_rn(g, keeps);
        w = __fmaf_rn(__fmul_rn(sign, keeps), -s[1], w);
    }
};

} // namespace forge
