// RAdam: src/rule/radam.rs in CUDA.
#pragma once
#include "arithmetic.cuh"

namespace forge {

struct RAdam {
    static constexpr bool DECOUPLED = (FORGE_RULE_FLAGS & 32u) != 0;
    static constexpr int STATES = 2;
    static constexpr bool CODED = false;

    // Once for each step, in fp64. `hyper`: lr, weight decay, β₁, β₂, ε.
    FORGE_DEVICE static void constants(double step, double, const double *hyper, float *c) {
        const double bias1 = 1.0 - pow(hyper[2], step), power2 = pow(hyper[3], step);
        const double bias2 = 1.0 - power2, limit = 2.0 / (1.0 - hyper[3]) - 1.0;
        const double rho = limit - 2.0 * step * power2 / bias2;
        const bool adaptive = rho > 5.0;
        const double rectified =
            sqrt((rho - 4.0) * (rho - 2.0) * limit / ((limit - 4.0) * (limit - 2.0) * rho));
        c[0] = static_cast<float>(-hyper[0] / bias1 * (adaptive ? rectified * sqrt(bias2) : 1.0));
        c[1] = DECOUPLED ? 0.0f : static_cast<float>(hyper[1]);
        c[2] = DECOUPLED ? static_cast<float>(1.0 - hyper[0] * hyper[1]) : 1.0f;
        c[3] = static_cast<float>(1.0 - hyper[2]);
        c[4] = static_cast<float>(hyper[3]);
        c[5] = static_cast<float>(1.0 - hyper[3]);
        c[6] = adaptive ? 1.0f : 0.0f;
        c[7] = static_cast<float>(hyper[4]);
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmaf_rn(c[1], w, __fmul_rn(g, scale));
        s[0] = __fmaf_rn(c[3], __fsub_rn(g, s[0]), s[0]);
        s[1] = __fmaf_rn(__fmul_rn(c[5], g), g, __fmul_rn(c[4], s[1]));
        const float divisor = c[6] != 0.0f ? __fadd_rn(root(s[1]), c[7]) : 1.0f;
        w = __fmaf_rn(w, c[2], quotient(__fmul_rn(c[0], s[0]), divisor));
    }
};

} // namespace forge
