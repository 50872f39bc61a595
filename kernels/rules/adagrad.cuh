// Adagrad: src/rule/adagrad.rs in CUDA.
#pragma once
#include "arithmetic.cuh"

namespace forge {

struct Adagrad {
    static constexpr int STATES = 1;
    static constexpr bool CODED = false;

    // Once for each step, in fp64. `hyper`: lr, weight decay, decay of lr, first sum, ε.
    FORGE_DEVICE static void constants(double step, double, const double *hyper, float *c) {
        c[0] = static_cast<float>(-hyper[0] / (1.0 + (step - 1.0) * hyper[2]));
        c[1] = static_cast<float>(hyper[1]);
        c[2] = static_cast<float>(hyper[3]);
        c[3] = static_cast<float>(hyper[4]);
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmaf_rn(c[1], w, __fmul_rn(g, scale));
        // States begin as zeros, and stay so where the first steps were skipped.
        s[0] = __fmaf_rn(g, g, s[0] == 0.0f ? c[2] : s[0]);
        w = __fmaf_rn(c[0], quotient(g, __fadd_rn(root(s[0]), c[3])), w);
    }
};

} // namespace forge
