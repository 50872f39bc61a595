// What the fused kernel tells of its tiles: the guard's sums of squares, each block's tally, and
// the report that the last block makes of all.
#pragma once
#include "epilogue.cuh"
#include "launch.cuh"
#include "report.cuh"
#include "squares.cuh"

namespace forge {

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
            ordinary += sum_of_squares<false>(values[i]);
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
            const float scaled = sum_of_squares<true>(values[i]);
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

#if FORGE_GROUP
FORGE_DEVICE RoundKeys keys_of(const Params &p, const RoundKeys &of_all, const TilePlace &tile) {
    RoundKeys keys = of_all;
    const u32 parameter = p.weights[tile.weight].parameter;
#pragma unroll
    for (u32 round = 0; round < PHILOX_ROUNDS; ++round)
        keys.key[round][1] = second_key(parameter, round);
    return keys;
}
#else
FORGE_DEVICE const RoundKeys &keys_of(const Params &, const RoundKeys &of_all, const TilePlace &) {
    return of_all;
}
#endif

// After a tile of a group: each warp's part of what it tells, at a place of its own. There are four
// for every 64 columns of 128 rows; the tile tells of itself in its first.
template <int COLS>
FORGE_DEVICE void tell(const Params &p, const TilePlace &tile, double sum, bool bad) {
    if (p.partials == nullptr)
        return;
    const u32 warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
    const u32 across = p.whole_cols * (TILE_COLS / 64) + p.narrow_cols;
    const u32 row = tile.weight * (p.rows / TILE_ROWS) + tile.row / TILE_ROWS;
    if (lane < COLS / 64) {
        const u32 one = lane == 0 && warp == 0 ? 1 : 0;
        p.partials[4 * (row * across + tile.col / 64 + lane) + warp] = {lane == 0 ? sum : 0.0,
                                                                        bad ? one : 0, one};
    }
}

// Sums the lanes of all warps, always in the same order, and leaves the consumer's partial. Whether
// it is the last one of all blocks to do so, told to the first warp.
FORGE_DEVICE bool publish(const Params &p, u32 consumer, Tally &tally, double sum) {
    const u32 thread = threadIdx.x % 128;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
    if (thread % 32 == 0)
        tally.sums[thread / 32] = sum;
    named_barrier_sync(OWN + consumer, 128);
    u32 before = 0;
    const u32 all = gridDim.x * CONSUMERS;
    if (thread == 0) {
        sum = (tally.sums[0] + tally.sums[1]) + (tally.sums[2] + tally.sums[3]);
        p.partials[blockIdx.x * CONSUMERS + consumer] = {sum, tally.nonfinite, tally.tiles};
        // Wraps around to 0 with the last one. Its order: the partial before, others' behind.
        before = atomic_increment(p.counter, all - 1);
    }
    return thread < 32 && __shfl_sync(0xFFFFFFFFu, before, 0) == all - 1;
}

// After a consumer's tiles: its tally, and from the last consumer of all the report.
FORGE_DEVICE void report(const Params &p, u32 consumer, Tally &tally, double lane_sum) {
    if (p.reports[0] == nullptr && p.reports[1] == nullptr)
        return;
    if (!publish(p, consumer, tally, lane_sum))
        return;
    __syncwarp();
    double sum = 0.0;
    u32 nonfinite = 0, tiles = 0;
    const u32 lane = threadIdx.x % 32;
    for (u32 i = lane; i < gridDim.x * CONSUMERS; i += 32) {
        const volatile TilePartial &partial = p.partials[i];
        sum += partial.sum_of_squares;
        nonfinite += partial.nonfinite;
        tiles += partial.tiles;
    }
    nonfinite = __reduce_add_sync(0xFFFFFFFFu, nonfinite);
    tiles = __reduce_add_sync(0xFFFFFFFFu, tiles);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
    if (lane != 0)
        return;
    for (int i = 0; i < 2; ++i) {
        if (p.reports[i] == nullptr)
            continue;
        if constexpr (MODE == Mode::Norm) {
            *static_cast<Norm *>(p.reports[i]) = norm_of(sum, nonfinite, p.method);
        } else {
            *static_cast<Report *>(p.reports[i]) = {sizeof(Report), 0, tiles, nonfinite, sum};
        }
    }
}

} // namespace forge
