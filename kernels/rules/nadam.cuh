// NAdam: src/rule/nadam.rs in CUDA.
#pragma once
#include "arithmetic.cuh"

namespace forge {

struct NAdam {
    static constexpr bool DECOUPLED = (FORGE_RULE_FLAGS & 32u) != 0;
    static constexpr int STATES = 2;
    static constexpr bool CODED = false;

    FORGE_DEVICE static double lack(const double *hyper, double step) {
        return 0.5 * pow(0.96, step * hyper[5]);
    }
    FORGE_DEVICE static double mu(const double *hyper, double step) {
        return hyper[2] * (1.0 - lack(hyper, step));
    }

    // Once for each step, in fp64. `hyper`: lr, weight decay, β₁, β₂, ε, momentum decay.
    FORGE_DEVICE static void constants(double step, double, const double *hyper, float *c) {
        double product = 1.0;
        // Below that nothing changes 1 − product any more.
        for (double t = 1.0; t <= step && product >= 1e-20; t += 1.0) {
            // From here on μ is β₁.
            if (lack(hyper, t) < 1e-17) {
                product *= pow(hyper[2], step - t + 1.0);
                break;
            }
            product *= mu(hyper, t);
        }
        const double now = mu(hyper, step), next = mu(hyper, step + 1.0);
        c[0] = static_cast<float>(-hyper[0] * (1.0 - now) / (1.0 - product));
        c[1] = DECOUPLED ? 0.0f : static_cast<float>(hyper[1]);
        c[2] = DECOUPLED ? static_cast<float>(1.0 - hyper[0] * hyper[1]) : 1.0f;
        c[3] = static_cast<float>(1.0 - hyper[2]);
        c[4] = static_cast<float>(hyper[3]);
        c[5] = static_cast<float>(1.0 - hyper[3]);
        c[6] = static_cast<float>(1.0 / sqrt(1.0 - pow(hyper[3], step)));
        c[7] = static_cast<float>(hyper[4]);
        c[8] = static_cast<float>(-hyper[0] * next / (1.0 - product * next));
    }

    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s) {
        g = __fmaf_rn(c[1], w, __fmul_rn(g, scale));
        s[0] = __fmaf_rn(c[3], __fsub_rn(g, s[0]), s[0]);
        s[1] = __fmaf_rn(__fmul_rn(c[5], g), g, __fmul_rn(c[4], s[1]));
        const float divisor = __fmaf_rn(root(s[1]), c[6], c[7]);
        const float step = __fmaf_rn(c[8], s[0], __fmul_rn(c[0], g));
        w = __fmaf_rn(w, c[2], quotient(step, divisor));
    }
};

} // namespace forge
