// RMSprop: src/rule/rmsprop.rs in CUDA.
#pragma once
#include "arithmetic.cuh"

namespace forge {

struct RmsProp {
    static constexpr bool MOMENTUM = (FORGE_RULE_FLAGS & 4u) != 0;
    static constexpr bool CENTERED = (FORGE_RULE_FLAGS & 16u) != 0;
    static constexpr int STATES = 1 + MOMENTUM + CENTERED;
    static constexpr bool CODED = false;

    // Once for each step, in fp64. `hyper`: lr, weight decay, α, ε, momentum.
    FORGE_DEVICE static void constants(double, double, const double *hyper, float *c) {
        c[0] = static_cast<float>(-hyper[0]);
        c[1] = static_cast<float>(hyper[1]);
        c[2] = static_cast<float>(hyper[2]);
        c[3] = static_cast<float>(1.0 - hyper[2]);
        c[4] = static_cast<float>(hyper[3]);
        c[5] = static_cast<float>(hyper[4]);
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmaf_rn(c[1], w, __fmul_rn(g, scale));
        s[0] = __fmaf_rn(__fmul_rn(c[3], g), g, __fmul_rn(c[2], s[0]));
        float variance = s[0];
        if (CENTERED) {
            float &average = s[MOMENTUM ? 2 : 1];
            average = __fmaf_rn(c[3], __fsub_rn(g, average), average);
            variance = fmaxf(__fmaf_rn(-average, average, variance), 0.0f);
        }
        float direction = quotient(g, __fadd_rn(root(variance), c[4]));
        if (MOMENTUM) {
            direction = __fmaf_rn(c[5], s[1], direction);
            s[1] = direction;
        }
        w = __fmaf_rn(c[0], direction, w);
    }
};

} // namespace forge
