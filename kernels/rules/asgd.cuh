// ASGD: src/rule/asgd.rs in CUDA.
#pragma once
#include "arithmetic.cuh"

namespace forge {

struct Asgd {
    static constexpr int STATES = 1;
    static constexpr bool CODED = false;

    // Once for each step, in fp64. `hyper`: lr, weight decay, λ, α, t₀.
    FORGE_DEVICE static void constants(double step, double, const double *hyper, float *c) {
        const double before = step - 1.0;
        const double eta = hyper[0] / pow(1.0 + hyper[2] * hyper[0] * before, hyper[3]);
        c[0] = static_cast<float>(-eta);
        c[1] = static_cast<float>(hyper[1]);
        c[2] = static_cast<float>(1.0 - hyper[2] * eta);
        c[3] = static_cast<float>(1.0 / fmax(before - hyper[4], 1.0));
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmaf_rn(c[1], w, __fmul_rn(g, scale));
        w = __fmaf_rn(c[0], g, __fmul_rn(w, c[2]));
        s[0] = __fmaf_rn(c[3], __fsub_rn(w, s[0]), s[0]);
    }
};

} // namespace forge
