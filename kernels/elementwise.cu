// The rule over an fp32 gradient that is in memory: a panel of dW, an accumulator, or zeros.
#include "elementwise.cuh"

namespace forge {

constexpr int ELEMENTWISE_THREADS = 256;
constexpr int loaded_bytes() { // of an element
    int bytes = FORGE_WEIGHT_FORMAT == W_BF16 ? 2 : 4;
    for (int i = 0; i < N_STATES; ++i)
        bytes += STATE_FORMAT[i] == F32 ? 4 : 2;
    return bytes;
}
// Blocks that share an SM: three where the registers suffice, for more loads in flight.
constexpr bool FEW_REGISTERS =
    VECTOR && loaded_bytes() <= 6 && FORGE_STATE_STOCHASTIC == 0 && !CODES;
constexpr int ELEMENTWISE_BLOCKS = FEW_REGISTERS ? 3 : 2;

} // namespace forge

using namespace forge;

// `gradient`: the region's first element, rows `stride` apart; null: zeros.
extern "C" __global__ void __launch_bounds__(forge::ELEMENTWISE_THREADS, forge::ELEMENTWISE_BLOCKS)
    forge_elementwise(ShardArrays arrays, Shard shard, Region region, const float *gradient,
                      u64 stride, const __grid_constant__ StepSource source,
                      TilePartial *partials) {
    constexpr int THREADS = ELEMENTWISE_THREADS;
    constexpr u32 PASSES = TILE_ROWS / Tile<THREADS>::BOTH_ROWS;
    // The tile's gradient waits here for its turn; each thread reads only what it wrote.
    __shared__ float4 waiting[PASSES * STEPS][2][THREADS];
    __shared__ double sums[THREADS / 32];
    __shared__ StepScalars scalars;
    if (threadIdx.x == 0)
        scalars = source.device != nullptr ? *source.device : source.value;
    __syncthreads();

    const u64 tiles_across = (region.cols + TILE_COLS - 1) / TILE_COLS;
    const Tile<THREADS> tile(shard, region, blockIdx.x / tiles_across * TILE_ROWS,
                             blockIdx.x % tiles_across * TILE_COLS);
    Sight sight;
#pragma unroll
    for (u32 pass = 0; pass < PASSES; ++pass)
#pragma unroll
        for (u32 i = 0; i < STEPS; ++i) {
            Place place = tile.place(pass, i);
            place.at = (tile.row + tile.row_of(pass, i)) * stride + tile.col + tile.col_of(i);
            Run<4> run{};
            if (gradient != nullptr)
                run = load_run<4>(gradient, place);
            const Values g = values_of(run);
            const float4 *halves = reinterpret_cast<const float4 *>(g.value);
            waiting[pass * STEPS + i][0][threadIdx.x] = halves[0];
            waiting[pass * STEPS + i][1][threadIdx.x] = halves[1];
            sight.add(g.value, scalars.grad_scale);
        }
    TilePartial *partial = partials != nullptr ? partials + blockIdx.x : nullptr;
    if (judge<THREADS>(sight, sums, partial))
        return;
    rewrite<1>(
        arrays, tile, scalars, PASSES, [](u32) { return false; },
        [&](u32 pass, u32 i) {
            const float4 a = waiting[pass * STEPS + i][0][threadIdx.x],
                         b = waiting[pass * STEPS + i][1][threadIdx.x];
            return Values{{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
        });
}
