// What the fused kernel tells of its tiles: the guard's sums of squares, each block's tally, and
// the report that the last block makes of all.
#pragma once
#include "epilogue.cuh"
#include "launch.cuh"
#include "report.cuh"

namespace forge {

// Σ (scale · value)². Not finite if a value is not, or if squares overflow; with SQUARE_SCALE they
// cannot.
constexpr float SQUARE_SCALE = 8.4703295e-22f; // 2^-70
template <int N> FORGE_DEVICE float sum_of_squares(const float (&values)[N], float scale = 1.0f) {
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float x = __fmul_rn(values[i], scale);
        sums[i % 4] = __fmaf_rn(x, x, sums[i % 4]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// What a consumer's lane knows of its tiles.
struct LaneTally {
    double sum = 0.0; // of dW²

    // Looks at a lane's part of a tile, or of a chunk. True if it is not finite, or would not be
    // after grad_scale. For q8, values whose squares would overflow then are cut to what does not.
    // `counts`: false for a place below W, whose zeros may have met an infinity.
    template <int N, int REGISTERS>
    FORGE_DEVICE bool add(float (&values)[N][REGISTERS], float grad_scale, bool counts) {
        float ordinary = 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i)
            ordinary += sum_of_squares(values[i]);
        // Beyond the limit something is not finite, grad_scale included, or squares overflow,
        // before it or after.
        const float by = fabsf(grad_scale) <= 1.0f ? 1.0f : grad_scale * grad_scale;
        if (__builtin_expect(ordinary * by <= 3.4e38f, 1)) {
            sum += ordinary;
            return false;
        }
        bool bad = false;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float scaled = sum_of_squares(values[i], SQUARE_SCALE);
            if (counts)
                sum += static_cast<double>(scaled) /
                       (static_cast<double>(SQUARE_SCALE) * SQUARE_SCALE);
            bad = bad || !(scaled <= 3.4e38f);
#pragma unroll
            for (int k = 0; k < REGISTERS; ++k)
                bad = bad || !(fabsf(values[i][k] * grad_scale) <= LARGEST);
            if constexpr (any_q8()) {
                // 0 · ∞ within a block would be NaN.
                const float most = 1e19f / fmaxf(1.0f, fabsf(grad_scale));
#pragma unroll
                for (int k = 0; k < REGISTERS; ++k)
                    values[i][k] = fminf(fmaxf(values[i][k], -most), most);
            }
        }
        return bad;
    }
};

// The lanes' sums of a warp, always by the same one.
FORGE_DEVICE void keep_sum(Tally &tally, u32 warp, double sum) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
    if (threadIdx.x % 32 == 0)
        tally.sums[warp] = sum;
}

// After all tiles: this block's tallies, and in the last block the report of all.
FORGE_DEVICE void report(const Params &p, Tally *tallies) {
    if (p.reports[0] == nullptr && p.reports[1] == nullptr)
        return;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int c = 0; c < CONSUMERS; ++c) {
            const Tally &t = tallies[c];
            const double sum = (t.sums[0] + t.sums[1]) + (t.sums[2] + t.sums[3]);
            p.partials[blockIdx.x * CONSUMERS + c] = {sum, t.nonfinite, 0u};
        }
        __threadfence();
        // Wraps around to 0 in the last block.
        tallies[0].last = atomicInc(p.counter, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (tallies[0].last == 0 || threadIdx.x >= 32)
        return;
    __threadfence();
    double sum = 0.0;
    u32 nonfinite = 0;
    for (u32 i = threadIdx.x; i < gridDim.x * CONSUMERS; i += 32) {
        const volatile TilePartial &partial = p.partials[i];
        sum += partial.sum_of_squares;
        nonfinite += partial.nonfinite;
    }
    nonfinite = __reduce_add_sync(0xFFFFFFFFu, nonfinite);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
    if (threadIdx.x != 0)
        return;
    for (int i = 0; i < 2; ++i) {
        if (p.reports[i] == nullptr)
            continue;
        if constexpr (MODE == Mode::Norm) {
            *static_cast<Norm *>(p.reports[i]) = norm_of(sum, nonfinite, p.method);
        } else {
            const u64 tiles = static_cast<u64>(p.tiles_m) * p.tiles_n;
            *static_cast<Report *>(p.reports[i]) = {sizeof(Report), 0, tiles, nonfinite, sum};
        }
    }
}

} // namespace forge
