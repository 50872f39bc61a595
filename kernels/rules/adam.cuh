// Adam and AdamW: src/rule/adam.rs in CUDA. One arithmetic; the constants tell them apart.
#pragma once
#include "prelude.cuh"

namespace forge {

template <bool Coupled>
struct AdamRule {
    static constexpr int STATES = 2;

    // Once for each step, in fp64. `hyper`: lr, weight decay, β₁, β₂, ε.
    FORGE_DEVICE static void constants(double step, const double* hyper, float* c) {
        const double lr = hyper[0], decay = hyper[1], beta1 = hyper[2], beta2 = hyper[3];
        const double bias1 = 1.0 - pow(beta1, step), bias2 = 1.0 - pow(beta2, step);
        c[0] = static_cast<float>(-lr / bias1);
        c[1] = static_cast<float>(Coupled ? decay : 0.0);
        c[2] = static_cast<float>(1.0 - lr * (Coupled ? 0.0 : decay));
        c[3] = static_cast<float>(1.0 - beta1);
        c[4] = static_cast<float>(beta2);
        c[5] = static_cast<float>(1.0 - beta2);
        c[6] = static_cast<float>(sqrt(bias2));
        c[7] = static_cast<float>(hyper[4]);
        c[8] = static_cast<float>(1.0 / sqrt(bias2));
    }

    FORGE_DEVICE static void update(const float* c, float g, float& w, float* s) {
        if (Coupled) g = __fmaf_rn(c[1], w, g);
        const float m = __fmaf_rn(c[3], __fsub_rn(g, s[0]), s[0]);
        const float v = __fmaf_rn(__fmul_rn(c[5], g), g, __fmul_rn(c[4], s[1]));
        s[0] = m;
        s[1] = v;
        // c[6] is sqrt(1 − β₂ᵗ); its reciprocal is folded in on the host as c[8].
        const float denominator = __fmaf_rn(fast_sqrt(v), c[8], c[7]);
        const float step = __fmul_rn(__fmul_rn(c[0], m), fast_reciprocal(denominator));
        w = __fmaf_rn(w, c[2], step);
    }
};

using Adam = AdamRule<true>;
using AdamW = AdamRule<false>;

}  // namespace forge
