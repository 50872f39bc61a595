// What the fused kernel tells of its tiles: the guard's sums of squares, each block's tally, and
// the report that the last block makes of all.
#pragma once
#include "epilogue.cuh"
#include "launch.cuh"
#include "report.cuh"

namespace forge {

// Σ of a lane's dW² and whether one of them is not finite.
struct Squares {
    double sum = 0.0;
    bool bad = false;
};

// `values`: dW, or a part of it. Bad is what is not finite, or would not be after grad_scale. For
// q8, values whose squares would overflow then are cut to what does not.
template <int N>
FORGE_DEVICE void add_squares(Squares &squares, float (&values)[N], float grad_scale) {
    const float sum = sum_of_squares(values);
    const float limit = fabsf(grad_scale) <= 1.0f ? 3.4e38f : 3.4e38f / (grad_scale * grad_scale);
    if (sum <= limit) {
        squares.sum += sum;
        return;
    }
    // Something that is not finite, or squares that overflow fp32, or a scale that does it.
    const float scaled = sum_of_squares(values, SQUARE_SCALE);
    squares.sum += static_cast<double>(scaled) / (static_cast<double>(SQUARE_SCALE) * SQUARE_SCALE);
    squares.bad = squares.bad || !(scaled <= 3.4e38f);
#pragma unroll
    for (int i = 0; i < N; ++i)
        squares.bad = squares.bad || !(fabsf(values[i] * grad_scale) <= LARGEST);
    if constexpr (any_q8()) {
        // 0 · ∞ within a block would be NaN.
        const float most = 1e19f / fmaxf(1.0f, fabsf(grad_scale));
#pragma unroll
        for (int i = 0; i < N; ++i)
            values[i] = fminf(fmaxf(values[i], -most), most);
    }
}

// Adds a tile to the tally: each warp's lanes to that warp's sum, always by the same thread.
FORGE_DEVICE void add_to(Tally &tally, u32 warp, double sum, bool finite) {
    const bool small = __all_sync(0xFFFFFFFFu, sum <= 1e30);
    float narrow = static_cast<float>(sum);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        if (small)
            narrow += __shfl_down_sync(0xFFFFFFFFu, narrow, distance);
        else
            sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
    }
    if (threadIdx.x % 32 == 0)
        tally.sums[warp] += small ? narrow : sum;
    if (threadIdx.x % 128 == 0 && !finite)
        ++tally.nonfinite;
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
