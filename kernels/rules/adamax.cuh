// Adamax: src/rule/adamax.rs in CUDA.
#pragma once
#include "arithmetic.cuh"

namespace forge {

struct Adamax {
    static constexpr int STATES = 2;
    static constexpr bool CODED = false;

    // Once for each step, in fp64. `hyper`: lr, weight decay, β₁, β₂, ε.
    FORGE_DEVICE static void constants(double step, double, const double *hyper, float *c) {
        c[0] = static_cast<float>(-hyper[0] / (1.0 - pow(hyper[2], step)));
        c[1] = static_cast<float>(hyper[1]);
        c[2] = static_cast<float>(1.0 - hyper[2]);
        c[3] = static_cast<float>(hyper[3]);
        c[4] = static_cast<float>(hyper[4]);
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmaf_rn(c[1], w, __fmul_rn(g, scale));
        s[0] = __fmaf_rn(c[2], __fsub_rn(g, s[0]), s[0]);
        s[1] = fmaxf(__fmul_rn(c[3], s[1]), __fadd_rn(fabsf(g), c[4]));
        w = __fmaf_rn(c[0], quotient(s[0], s[1]), w);
    }
};

} // namespace forge
