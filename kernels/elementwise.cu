// The rule over a gradient that is in memory: a panel of dW, an accumulator, what autograd has
// left, or zeros.
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

// A run of a gradient of this many bytes for each element; of two: fp16 or bf16.
template <int BYTES>
FORGE_DEVICE Values load_gradient(const void *gradient, const Place &place, bool fp16) {
    const Run<BYTES> run = load_run<BYTES>(gradient, place);
    if constexpr (BYTES == 4) {
        return values_of(run);
    } else {
        Values out = widen(run);
        if (fp16) {
#pragma unroll
            for (int i = 0; i < RUN; ++i)
                out.value[i] = widen_f16(run.word[i / 2] >> (16 * (i % 2)));
        }
        return out;
    }
}

// Look at a tile's gradient, and put it where `rewrite` finds it.
template <int BYTES, u32 PASSES, int THREADS, class Waiting>
FORGE_DEVICE Sight look(const Tile<THREADS> &tile, const void *gradient, u64 stride, bool fp16,
                        float grad_scale, Waiting &waiting) {
    Sight sight;
#pragma unroll
    for (u32 pass = 0; pass < PASSES; ++pass)
#pragma unroll
        for (u32 i = 0; i < STEPS; ++i) {
            Place place = tile.place(pass, i);
            place.at = (tile.row + tile.row_of(pass, i)) * stride + tile.col + tile.col_of(i);
            Values g{};
            if (gradient != nullptr)
                g = load_gradient<BYTES>(gradient, place, fp16);
            const float4 *halves = reinterpret_cast<const float4 *>(g.value);
            waiting[pass * STEPS + i][0][threadIdx.x] = halves[0];
            waiting[pass * STEPS + i][1][threadIdx.x] = halves[1];
            sight.add(g.value, grad_scale);
        }
    return sight;
}

} // namespace forge

using namespace forge;

// `gradient`: the region's first element, rows `stride` apart, of `dtype` (see load_factor); null:
// zeros.
extern "C" __global__ void __launch_bounds__(forge::ELEMENTWISE_THREADS, forge::ELEMENTWISE_BLOCKS)
    forge_elementwise(ShardArrays arrays, Shard shard, Region region, const void *gradient,
                      u64 stride, u32 dtype, const __grid_constant__ StepSource source,
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
    const float by = scalars.grad_scale;
    const Sight sight = dtype == 0
                            ? look<4, PASSES>(tile, gradient, stride, false, by, waiting)
                            : look<2, PASSES>(tile, gradient, stride, dtype == 2, by, waiting);
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
