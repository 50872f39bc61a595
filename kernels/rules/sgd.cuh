// SGD: src/rule/sgd.rs in CUDA. FORGE_RULE_FLAGS says whether there is a momentum buffer.
#pragma once
#include "arithmetic.cuh"

namespace forge {

template <u32 Flags> struct SgdRule {
    static constexpr bool NESTEROV = (Flags & 2u) != 0;
    static constexpr bool MOMENTUM = (Flags & 4u) != 0;
    static constexpr int STATES = MOMENTUM ? 1 : 0;

    // Once for each step, in fp64. `hyper`: lr, weight decay, momentum, dampening.
    FORGE_DEVICE static void constants(double step, double, const double *hyper, float *c) {
        const bool first = !MOMENTUM || step == 1.0;
        c[0] = static_cast<float>(hyper[0]);
        c[1] = static_cast<float>(hyper[1]);
        c[2] = first ? 0.0f : static_cast<float>(hyper[2]);
        c[3] = first ? 1.0f : static_cast<float>(1.0 - hyper[3]);
        c[4] = static_cast<float>(hyper[2]);
        c[5] = NESTEROV ? 1.0f : 0.0f;
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmul_rn(g, scale);
        g = __fmaf_rn(c[1], w, g);
        float direction = g;
        if (MOMENTUM) {
            const float buffer = __fmaf_rn(c[2], s[0], __fmul_rn(c[3], g));
            s[0] = buffer;
            direction = NESTEROV ? __fmaf_rn(c[4], buffer, g) : buffer;
        }
        w = __fmaf_rn(-c[0], direction, w);
    }
    static constexpr bool CODED = false;
};

} // namespace forge
