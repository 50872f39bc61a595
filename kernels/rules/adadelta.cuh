// Adadelta: src/rule/adadelta.rs in CUDA.
#pragma once
#include "arithmetic.cuh"

namespace forge {

struct Adadelta {
    static constexpr int STATES = 2;
    static constexpr bool CODED = false;

    // Once for each step, in fp64. `hyper`: lr, weight decay, ρ, ε.
    FORGE_DEVICE static void constants(double, double, const double *hyper, float *c) {
        c[0] = static_cast<float>(-hyper[0]);
        c[1] = static_cast<float>(hyper[1]);
        c[2] = static_cast<float>(hyper[2]);
        c[3] = static_cast<float>(1.0 - hyper[2]);
        c[4] = static_cast<float>(hyper[3]);
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmaf_rn(c[1], w, __fmul_rn(g, scale));
        s[0] = __fmaf_rn(__fmul_rn(c[3], g), g, __fmul_rn(c[2], s[0]));
        const float above = root(__fadd_rn(s[1], c[4])), below = root(__fadd_rn(s[0], c[4]));
        const float delta = __fmul_rn(quotient(above, below), g);
        s[1] = __fmaf_rn(__fmul_rn(c[3], delta), delta, __fmul_rn(c[2], s[1]));
        w = __fmaf_rn(c[0], delta, w);
    }
};

} // namespace forge
