// Adam and AdamW: src/rule/adam.rs in CUDA. One arithmetic; the constants tell them apart.
#pragma once
#include "../prelude.cuh"

namespace forge {

template <bool Coupled>
struct AdamRule {
    static constexpr int STATES = 2;

    FORGE_DEVICE static void update(const float* c, float g, float& w, float* s) {
        if (Coupled) g = __fmaf_rn(c[1], w, g);
        const float m = __fmaf_rn(c[3], __fsub_rn(g, s[0]), s[0]);
        const float v = __fmaf_rn(__fmul_rn(c[5], g), g, __fmul_rn(c[4], s[1]));
        s[0] = m;
        s[1] = v;
        // c[6] is sqrt(1 − β₂ᵗ); its reciprocal is folded in on the host as c[8].
        const float denominator = __fmaf_rn(fast_sqrt(v), c[8], c[7]);
        const float step = __fmul_rn(__fmul_rn(c[0], m), fast_reciprocal(denominator));
        w = __fmaf_rn(w, c[2], step);
    }
};

using Adam = AdamRule<true>;
using AdamW = AdamRule<false>;

}  // namespace forge
