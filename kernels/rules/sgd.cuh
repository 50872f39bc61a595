// SGD: src/rule/sgd.rs in CUDA. FORGE_RULE_FLAGS says whether there is a momentum buffer.
#pragma once
#include "../prelude.cuh"

namespace forge {

template <u32 Flags>
struct SgdRule {
    static constexpr bool NESTEROV = (Flags & 2u) != 0;
    static constexpr bool MOMENTUM = (Flags & 4u) != 0;
    static constexpr int STATES = MOMENTUM ? 1 : 0;

    FORGE_DEVICE static void update(const float* c, float g, float& w, float* s) {
        g = __fmaf_rn(c[1], w, g);
        float direction = g;
        if (MOMENTUM) {
            const float buffer = __fmaf_rn(c[2], s[0], __fmul_rn(c[3], g));
            s[0] = buffer;
            direction = NESTEROV ? __fmaf_rn(c[4], buffer, g) : buffer;
        }
        w = __fmaf_rn(-c[0], direction, w);
    }
};

}  // namespace forge
