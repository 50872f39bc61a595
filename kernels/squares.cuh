// The guard's look at a gradient: its sum of squares, and whether any of it is not finite.
#pragma once
#include "q8.cuh"

namespace forge {

// Σ value², or with SCALED Σ (SQUARE_SCALE · value)². Not finite if a value is not, or if squares
// overflow, which scaled ones cannot.
constexpr float SQUARE_SCALE = 8.4703295e-22f; // 2^-70
template <bool SCALED, int N> FORGE_DEVICE float sum_of_squares(const float (&values)[N]) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float x = SCALED ? __fmul_rn(values[i], SQUARE_SCALE) : values[i];
        sums[i % 4] = __fmaf_rn(x, x, sums[i % 4]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// What a thread has seen of a gradient: fp32 sums of a few values each, in fp64.
struct Sight {
    double squares = 0.0;
    bool bad = false; // a value is not finite, or would not be after grad_scale

    template <int N> FORGE_DEVICE void add(const float (&values)[N], float grad_scale) {
        // Up to the limit everything is finite, grad_scale included, and no square overflows.
        const float by = fabsf(grad_scale) <= 1.0f ? 1.0f : grad_scale * grad_scale;
        const float ordinary = sum_of_squares<false>(values);
        if (__builtin_expect(ordinary * by <= 3.4e38f, 1)) {
            squares += ordinary;
            return;
        }
        const float scaled = sum_of_squares<true>(values);
        squares += static_cast<double>(scaled) / (static_cast<double>(SQUARE_SCALE) * SQUARE_SCALE);
        bad = bad || !(scaled <= LARGEST);
#pragma unroll
        for (int i = 0; i < N; ++i)
            bad = bad || !(fabsf(__fmul_rn(values[i], grad_scale)) <= LARGEST);
    }
};

} // namespace forge
