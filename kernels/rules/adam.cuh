// Adam and AdamW: src/rule/adam.rs in CUDA. One arithmetic; the constants tell them apart.
#pragma once
#include "arithmetic.cuh"

namespace forge {

template <bool Coupled> struct AdamRule {
    static constexpr bool AMSGRAD = (FORGE_RULE_FLAGS & 8u) != 0;
    static constexpr int STATES = AMSGRAD ? 3 : 2;

    // Once for each step, in fp64. `hyper`: lr, weight decay, β₁, β₂, ε. `grad_scale` has the sign
    // of `maximize`.
    FORGE_DEVICE static void constants(double step, double grad_scale, const double *hyper,
                                       float *c) {
        const double lr = hyper[0], decay = hyper[1], beta1 = hyper[2], beta2 = hyper[3],
                     eps = hyper[4];
        const double bias1 = 1.0 - pow(beta1, step), bias2 = 1.0 - pow(beta2, step);
        const double most = 3.4028234663852886e38;
        c[1] = static_cast<float>(Coupled ? decay : 0.0);
        c[2] = static_cast<float>(1.0 - lr * (Coupled ? 0.0 : decay));
        c[3] = static_cast<float>(1.0 - beta1);
        c[4] = static_cast<float>(beta2);
        c[5] = static_cast<float>(sqrt(1.0 - beta2));
        c[8] = static_cast<float>(fmax(-bias1 / (lr * sqrt(bias2)), -most));
        c[9] = static_cast<float>(sqrt(1.0 - beta2) * grad_scale);
        // −η/(1−β₁ᵗ) is in the divisor.
        c[10] = eps == 0.0 ? 0.0f : static_cast<float>(fmax(-bias1 / lr * eps, -most));
        // m = unit · (what the coded form returns).
        const double unit = (1.0 - beta1) / sqrt(1.0 - beta2);
        c[11] = static_cast<float>(beta1 / unit);
        c[12] = static_cast<float>(sqrt(beta2));
        c[13] = static_cast<float>(unit);
        c[14] = static_cast<float>(fmax(-bias1 / (lr * sqrt(bias2)) / unit, -most));
        c[15] = eps == 0.0 ? 0.0f : static_cast<float>(fmax(-bias1 / lr * eps / unit, -most));
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        const float intake = decay_and_intake(c, g, scale, w);
        s[0] = __fmaf_rn(c[3], __fmaf_rn(g, scale, -s[0]), s[0]);
        s[1] = __fmaf_rn(intake, intake, __fmul_rn(c[4], s[1]));
        const float square = AMSGRAD ? s[2] = fmaxf(s[2], s[1]) : s[1];
        step(w, c[2], s[0], __fmaf_rn(root(square), c[8], c[10]));
    }

    // Both states from codes: β₁m and √β₂·√v come, m and √v go, both m in units of
    // (1−β₁)/√(1−β₂), in which √(1−β₂)·g is what the gradient adds to it. Amsgrad's third comes and
    // goes as a root.
    static constexpr bool CODED = true;
    FORGE_DEVICE static float coded_factor(const float *c, int state) {
        return state == 2 ? 1.0f : c[11 + state];
    }
    FORGE_DEVICE static float coded_unit(const float *c, int state) {
        return state == 0 ? c[13] : 1.0f;
    }
    FORGE_DEVICE static void update_coded(const float *c, float g, float scale, float &w, float *s,
                                          const float *worth) {
        const float intake = decay_and_intake(c, g, scale, w);
        s[0] = __fmaf_rn(s[0], worth[0], intake);
        s[1] = root(__fmaf_rn(intake, intake, __fmul_rn(s[1], s[1])));
        const float divides = AMSGRAD ? s[2] = fmaxf(s[2], s[1]) : s[1];
        step(w, c[2], s[0], __fmaf_rn(divides, c[14], c[15]));
    }

  private:
    // √(1−β₂)·g. Coupled decay needs g scaled; without, the scale is in c[9], unless the CPU's bits
    // are wanted.
    FORGE_DEVICE static float decay_and_intake(const float *c, float &g, float &scale, float w) {
        if (Coupled || EXACT) {
            g = __fmaf_rn(c[1], w, __fmul_rn(g, scale));
            scale = 1.0f;
        }
        return __fmul_rn(g, c[Coupled || EXACT ? 5 : 9]);
    }
    FORGE_DEVICE static void step(float &w, float shrink, float m, float divisor) {
        w = __fmaf_rn(w, shrink, quotient(m, divisor));
    }
};

using Adam = AdamRule<true>;
using AdamW = AdamRule<false>;

} // namespace forge
