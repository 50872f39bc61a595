// Lion: src/rule/lion.rs in CUDA.
#pragma once
#include "arithmetic.cuh"

namespace forge {

struct Lion {
    static constexpr int STATES = 1;

    // Once for each step, in fp64. `hyper`: lr, weight decay, β₁, β₂.
    FORGE_DEVICE static void constants(double, double, const double *hyper, float *c) {
        c[0] = static_cast<float>(hyper[0]);
        c[1] = static_cast<float>(1.0 - hyper[0] * hyper[1]);
        c[2] = static_cast<float>(hyper[2]);
        c[3] = static_cast<float>(1.0 - hyper[2]);
        c[4] = static_cast<float>(hyper[3]);
        c[5] = static_cast<float>(1.0 - hyper[3]);
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmul_rn(g, scale);
        const float m = s[0];
        const float u = __fmaf_rn(c[2], m, __fmul_rn(c[3], g));
        // The paper's sign(0) is 0.
        const float step = u == 0.0f ? 0.0f : copysignf(c[0], u);
        w = __fsub_rn(__fmul_rn(w, c[1]), step);
        s[0] = __fmaf_rn(c[4], m, __fmul_rn(c[5], g));
    }
    static constexpr bool CODED = false;
};

} // namespace forge
