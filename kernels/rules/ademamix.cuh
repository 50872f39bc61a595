// AdEMAMix: src/rule/ademamix.rs in CUDA.
#pragma once
#include "arithmetic.cuh"

namespace forge {

struct AdEmaMix {
    static constexpr int STATES = 3;
    static constexpr bool CODED = false;

    // Once for each step, in fp64. `hyper`: lr, weight decay, β₁, β₂, β₃, ε, α, warm-up.
    FORGE_DEVICE static void constants(double step, double, const double *hyper, float *c) {
        const double done = step / hyper[7];
        double alpha = hyper[6], beta3 = hyper[4];
        // Without a warm-up `done` is infinite.
        if (done < 1.0) {
            alpha *= done;
            // The half-life of β₃ grows linearly. One of 0 cannot grow.
            if (hyper[2] != 0.0 && beta3 != 0.0) {
                const double first = log(hyper[2]), last = log(beta3);
                beta3 = fmin(exp(first * last / ((1.0 - done) * last + done * first)), beta3);
            }
        }
        c[0] = static_cast<float>(-hyper[0] / (1.0 - pow(hyper[2], step)));
        c[1] = static_cast<float>(-hyper[0] * alpha);
        c[2] = static_cast<float>(1.0 - hyper[0] * hyper[1]);
        c[3] = static_cast<float>(1.0 - hyper[2]);
        c[4] = static_cast<float>(hyper[3]);
        c[5] = static_cast<float>(1.0 - hyper[3]);
        c[6] = static_cast<float>(1.0 / sqrt(1.0 - pow(hyper[3], step)));
        c[7] = static_cast<float>(hyper[5]);
        c[8] = static_cast<float>(1.0 - beta3);
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmul_rn(g, scale);
        s[0] = __fmaf_rn(c[3], __fsub_rn(g, s[0]), s[0]);
        s[1] = __fmaf_rn(__fmul_rn(c[5], g), g, __fmul_rn(c[4], s[1]));
        s[2] = __fmaf_rn(c[8], __fsub_rn(g, s[2]), s[2]);
        const float divisor = __fmaf_rn(root(s[1]), c[6], c[7]);
        const float step = __fmaf_rn(c[1], s[2], __fmul_rn(c[0], s[0]));
        w = __fmaf_rn(w, c[2], quotient(step, divisor));
    }
};

} // namespace forge
