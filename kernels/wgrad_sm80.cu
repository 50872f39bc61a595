// dW = dYᵀ·X by mma.sync, consumed where it is produced: the update, an addition to a buffer, or
// its norm. For every card since compute capability 8.0.
//
// A block of four warps multiplies a tile of dW in registers, looks there whether it is finite,
// puts it into the shared memory that its factors had, and applies the rule from there with the
// element-wise kernel's code: so with its bits. Two blocks or three share a multiprocessor: while
// one multiplies, the others wait for their weights and states.
//
// Deterministic: each element of dW sums its tokens in order in one accumulator.
#include "elementwise.cuh"
#include "mainloop_sm80.cuh"
#include "mode.cuh"

namespace forge {

constexpr bool ADDS = FORGE_ACCUMULATOR != 0;

// Dynamic shared memory is the larger of the two; backend::cuda::sm80 computes the same.
static_assert(FACTOR_BYTES <= 64 * 1024 && TILE_BYTES <= 68 * 1024, "two blocks on an SM");
// What is checked and skipped as one.
constexpr u32 PARTS = ROWS / TILE_ROWS;
// Blocks that share a multiprocessor, where its shared memory suffices.
constexpr int BLOCKS = ROWS == 128 ? 2 : 3;

// A lane's element of the tile: row and column of the first of two neighbours, k even.
struct Spot {
    u32 row, col;

    FORGE_DEVICE Spot(int i, int j, int k) {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        row = warp / 2 * WARP_ROWS + i * 16 + k / 2 * 8 + lane / 4;
        col = warp % 2 * WARP_COLS + j * 8 + lane % 4 * 2;
    }
};

// Places outside of the shard, where a factor's infinities met zeros.
FORGE_DEVICE void clear_outside(const Shard &shard, u64 row, u64 col, Accumulators &acc) {
    if (row + ROWS <= shard.rows && col + COLS <= shard.cols)
        return;
#pragma unroll
    for (int i = 0; i < DOWN; ++i)
#pragma unroll
        for (int j = 0; j < ACROSS; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Spot spot(i, j, k);
                if (row + spot.row >= shard.rows || col + spot.col + k % 2 >= shard.cols)
                    acc[i][j][k] = 0.0f;
            }
}

// Where an element is in the tile in shared memory. Units of 16 bytes are exchanged with their
// neighbours in every other group of columns, so that the 8 lanes that read 16 bytes at a time,
// every other unit of their runs, meet no bank twice.
FORGE_DEVICE u32 spot_offset(u32 row, u32 col) {
    return row * PITCH + (col ^ (col / (ONE_ROW ? 64 : 32) % 2 * 4));
}

FORGE_DEVICE void store_tile(const Accumulators &acc, float *tile) {
#pragma unroll
    for (int i = 0; i < DOWN; ++i)
#pragma unroll
        for (int j = 0; j < ACROSS; ++j)
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                const Spot spot(i, j, k);
                *reinterpret_cast<float2 *>(tile + spot_offset(spot.row, spot.col)) =
                    make_float2(acc[i][j][k], acc[i][j][k + 1]);
            }
}

using Part = Tile<THREADS>;
constexpr u32 PASSES = TILE_ROWS / Part::BOTH_ROWS; // of a part

// A thread's run of dW in the tile in shared memory.
FORGE_DEVICE float4 *run_in(float *tile, const Part &part, u32 pass, u32 i, u32 half) {
    const u32 at = spot_offset(part.row_of(pass, i), part.col_in_tile + part.col_of(i) + half * 4);
    return reinterpret_cast<float4 *>(tile + at);
}
FORGE_DEVICE Values take(float *tile, const Part &part, u32 pass, u32 i) {
    const float4 a = *run_in(tile, part, pass, i, 0), b = *run_in(tile, part, pass, i, 1);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

// A norm is of dW itself.
FORGE_DEVICE float seen_scale(const StepScalars &step) {
    return MODE == Mode::Norm ? 1.0f : step.grad_scale;
}

// Of the parts of a tile, from registers: which are to be left alone, a bit for each. `partials`:
// the first part's, others `apart`; null: not wanted.
FORGE_DEVICE u32 judge_registers(const Accumulators &acc, const StepScalars &step, u32 parts,
                                 double *sums, u32 *flags, TilePartial *partials, u64 apart) {
    constexpr u32 WARPS = THREADS / 32 / PARTS; // of a part
    const u32 warp = threadIdx.x / 32;
    Sight sight;
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
        float values[ACROSS * 4];
#pragma unroll
        for (int j = 0; j < ACROSS * 4; ++j)
            values[j] = acc[i][j / 4][j % 4];
        sight.add(values, seen_scale(step));
    }
    const bool bad = __any_sync(0xFFFFFFFFu, sight.bad);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        sight.squares += __shfl_down_sync(0xFFFFFFFFu, sight.squares, distance);
    if (threadIdx.x % 32 == 0) {
        sums[warp] = sight.squares;
        flags[warp] = bad ? 1u : 0u;
    }
    __syncthreads();
    u32 skips = 0;
#pragma unroll
    for (u32 part = 0; part < PARTS; ++part) {
        double sum = 0.0;
        u32 any = 0;
#pragma unroll
        for (u32 i = 0; i < WARPS; ++i) {
            sum += sums[part * WARPS + i];
            any |= flags[part * WARPS + i];
        }
        skips |= any << part;
        if (threadIdx.x == 0 && part < parts && partials != nullptr)
            partials[part * apart] = {sum, any, 0u};
    }
    return skips;
}

// The same from shared memory, where the buffer is added first. The sum goes where dW was: to the
// buffer itself, or for `take`.
FORGE_DEVICE u32 add_and_judge(const Problem &p, const StepScalars &step, u64 row, u64 col,
                               u32 parts, float *tile, double *sums, TilePartial *partials,
                               u64 apart) {
    u32 skips = 0;
#pragma unroll 1
    for (u32 index = 0; index < parts; ++index) {
        const Part part(p.shard, {0, 0, p.shard.rows, p.shard.cols}, row + index * TILE_ROWS, col);
        float *dw = tile + index * TILE_ROWS * PITCH;
        Sight sight;
#pragma unroll
        for (u32 pass = 0; pass < PASSES; ++pass)
#pragma unroll
            for (u32 i = 0; i < STEPS; ++i) {
                const Place place = part.place(pass, i);
                const Values before = values_of(load_run<4>(p.accumulator, place));
                Values run = take(dw, part, pass, i);
#pragma unroll
                for (int k = 0; k < RUN; ++k)
                    run.value[k] = __fadd_rn(before.value[k], run.value[k]);
                if constexpr (MODE == Mode::Accumulate)
                    store_run(p.accumulator, place, run_of(run.value));
                if constexpr (MODE == Mode::Update) {
                    const float4 *halves = reinterpret_cast<const float4 *>(run.value);
                    *run_in(dw, part, pass, i, 0) = halves[0];
                    *run_in(dw, part, pass, i, 1) = halves[1];
                }
                if constexpr (MODE != Mode::Accumulate)
                    sight.add(run.value, seen_scale(step));
            }
        if constexpr (MODE != Mode::Accumulate) {
            TilePartial *partial = partials != nullptr ? partials + index * apart : nullptr;
            skips |= static_cast<u32>(judge<THREADS>(sight, sums, partial)) << index;
        }
    }
    return skips;
}

// What becomes of dW.
FORGE_DEVICE void consume(const Problem &p, const StepScalars &step, u64 row, u64 col,
                          const Accumulators &acc, float *tile, double *sums, u32 *flags) {
    const u64 apart = (p.shard.cols + TILE_COLS - 1) / TILE_COLS;
    const u64 left = p.shard.rows - row;
    const u32 rows = left < ROWS ? static_cast<u32>(left) : ROWS;
    const u32 parts = (rows + TILE_ROWS - 1) / TILE_ROWS;
    TilePartial *partials = nullptr;
    if (p.partials != nullptr)
        partials = p.partials + (row / TILE_ROWS * apart + col / TILE_COLS);

    if constexpr (ADDS || MODE != Mode::Norm)
        store_tile(acc, tile);
    u32 skips;
    if constexpr (ADDS) {
        __syncthreads();
        skips = add_and_judge(p, step, row, col, parts, tile, sums, partials, apart);
    } else {
        skips = judge_registers(acc, step, parts, sums, flags, partials, apart);
    }
    if constexpr (MODE == Mode::Update) {
        const Part part(p.shard, {0, 0, p.shard.rows, p.shard.cols}, row, col);
        rewrite<STEPS>(
            p.arrays, part, step, (rows + Part::BOTH_ROWS - 1) / Part::BOTH_ROWS,
            [&](u32 pass) { return (skips >> pass / PASSES & 1u) != 0; },
            [&](u32 pass, u32 i) { return take(tile, part, pass, i); });
    }
}

} // namespace forge

using namespace forge;

extern "C" __global__ void __launch_bounds__(forge::THREADS, forge::BLOCKS)
    forge_wgrad_sm80(const __grid_constant__ forge::Params params) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ double sums[THREADS / 32];
    __shared__ u32 flags[THREADS / 32];
    __shared__ StepScalars scalars;
    const Problem &p = params.problem();
    if (threadIdx.x == 0)
        scalars = params.scalars(p);

    const u32 block = params.block_of(p);
    const u64 tiles_down = (p.shard.rows + ROWS - 1) / ROWS;
    const u64 tiles_across = (p.shard.cols + COLS - 1) / COLS;
    // Down the rows of a group first.
    const u64 per_group = p.group * tiles_across;
    const u64 group = block / per_group, within = block % per_group;
    const u64 height = min(tiles_down - group * p.group, static_cast<u64>(p.group));
    const u64 row = (group * p.group + within % height) * ROWS, col = within / height * COLS;

    Accumulators acc = {};
    multiply({p, params.segments_of(p)}, shared_address(shared), row, col, acc);
    clear_outside(p.shard, row, col, acc);
    consume(p, scalars, row, col, acc, reinterpret_cast<float *>(shared), sums, flags);
}
