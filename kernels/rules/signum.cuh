// Signum: src/rule/signum.rs in CUDA.
#pragma once
#include "arithmetic.cuh"

namespace forge {

struct Signum {
    static constexpr int STATES = 1;
    static constexpr bool CODED = false;

    // Once for each step, in fp64. `hyper`: lr, weight decay, momentum.
    FORGE_DEVICE static void constants(double, double, const double *hyper, float *c) {
        c[0] = static_cast<float>(hyper[0]);
        c[1] = static_cast<float>(1.0 - hyper[0] * hyper[1]);
        c[2] = static_cast<float>(hyper[2]);
        c[3] = static_cast<float>(1.0 - hyper[2]);
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmul_rn(g, scale);
        s[0] = __fmaf_rn(c[2], s[0], __fmul_rn(c[3], g));
        const float step = s[0] == 0.0f ? 0.0f : copysignf(c[0], s[0]);
        w = __fsub_rn(__fmul_rn(w, c[1]), step);
    }
};

} // namespace forge
