// The rule over an fp32 gradient that is in memory: a panel of dW, an accumulator, or zeros.
#include "elementwise.cuh"

using namespace forge;

// `gradient`: the region's first element, rows `stride` apart; null: zeros.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    forge_elementwise(ShardArrays arrays, Shard shard, Region region, const float *gradient,
                      u64 stride, const __grid_constant__ StepSource source,
                      TilePartial *partials) {
    // The tile's gradient waits here for its turn; each thread reads only what it wrote.
    __shared__ float4 waiting[PASSES][2][THREADS];
    __shared__ double sums[THREADS / 32];
    __shared__ StepScalars scalars;
    if (threadIdx.x == 0)
        scalars = source.device != nullptr ? *source.device : source.value;
    __syncthreads();

    const u64 tiles_across = (region.cols + TILE_COLS - 1) / TILE_COLS;
    const Tile tile(region, blockIdx.x / tiles_across * TILE_ROWS,
                    blockIdx.x % tiles_across * TILE_COLS);
    const auto look = [&](int pass) {
        Place place = tile.place(shard, region, pass);
        place.at = tile.row_of(pass) * stride + tile.col;
        Run<float> run{};
        if (gradient != nullptr)
            run = load_run<float>(gradient, place);
        const float4 *halves = reinterpret_cast<const float4 *>(run.value);
        waiting[pass][0][threadIdx.x] = halves[0];
        waiting[pass][1][threadIdx.x] = halves[1];
        return run;
    };
    const auto take = [&](int pass) {
        const float4 a = waiting[pass][0][threadIdx.x], b = waiting[pass][1][threadIdx.x];
        return Run<float>{{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    };
    TilePartial *partial = partials != nullptr ? partials + blockIdx.x : nullptr;
    apply_rule(arrays, shard, region, tile, scalars, sums, partial, look, take);
}
