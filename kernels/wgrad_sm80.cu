// dW = dYᵀ·X by mma.sync, consumed where it is produced: the update, an addition to a buffer, or
// its norm. For every card since compute capability 8.0.
//
// A block of four warps multiplies a tile of dW in registers, looks there whether it is finite, puts
// it into the shared memory that its factors had, and applies the rule from there with the
// element-wise kernel's code: so with its bits. Two blocks share a multiprocessor: while one
// multiplies, the other waits for its weights and states.
//
// Deterministic: each element of dW sums its tokens in order in one accumulator.
#include "elementwise.cuh"
#include "mma.cuh"
#include "mode.cuh"

#ifndef FORGE_GROUP
#define FORGE_GROUP 0
#endif

namespace forge {

constexpr bool ADDS = FORGE_ACCUMULATOR != 0;

constexpr int THREADS = 128;
constexpr u32 ROWS = FORGE_TILE_ROWS, COLS = 128, DEPTH = 32; // of a tile; tokens of a stage
constexpr int STAGES = ROWS == 128 ? 4 : 3;
// Warps: 2 below each other, 2 beside; a warp's part is ROWS/2 × 64, of which mma makes 16 × 8 at a
// time. The larger the part, the fewer bytes of shared memory for each product: reading them takes
// about as long as multiplying.
constexpr u32 WARP_ROWS = ROWS / 2, WARP_COLS = COLS / 2;
constexpr int DOWN = WARP_ROWS / 16, ACROSS = WARP_COLS / 8;
constexpr u32 STAGE_BYTES = DEPTH * (ROWS + COLS) * 2;
// Of the tile's rows in shared memory: the four rows that half a warp stores to meet no bank twice.
constexpr u32 PITCH = COLS + 8;
constexpr u32 FACTOR_BYTES = STAGES * STAGE_BYTES, TILE_BYTES = ROWS * PITCH * 4;
// Dynamic shared memory is the larger of the two; backend::cuda::sm80 computes the same.
static_assert(FACTOR_BYTES <= 64 * 1024 && TILE_BYTES <= 68 * 1024, "two blocks on an SM");
// What is checked and skipped as one.
constexpr u32 PARTS = ROWS / TILE_ROWS;

// Blocks that share a multiprocessor, where its shared memory suffices.
constexpr int BLOCKS = ROWS == 128 ? 2 : 3;

using Accumulators = float[DOWN][ACROSS][4];

struct FactorPair {
    const u16 *dy, *x;
    u64 dy_stride, x_stride; // elements from one token to the next
    u64 tokens;
};

// A weight and what becomes of it; backend::cuda::sm80 fills it.
struct Problem {
    ShardArrays arrays;
    Shard shard;
    float *accumulator;    // [rows, cols], or null
    TilePartial *partials; // one for each 64 × 128, row by row; null: not wanted
    u16 group;             // tiles below each other that are worked on together, for the L2's sake
    u16 n_segments;
    // In a grouped launch, for this weight: its first block and segment, and its parameter's id.
    u32 first_block, first_segment, parameter;
};

#if FORGE_GROUP
// Many weights, too small to fill a GPU one by one; backend::cuda::group fills it. The scalars are
// those of all, but for the id in the key. As many bytes as drivers take by value since CUDA 12.1.
struct Params {
    StepScalars step;
    u32 n_problems;
    // Problems, then all their segments, so that either may be many.
    u64 pool[(32760 - sizeof(StepScalars) - sizeof(u32)) / sizeof(u64)];

    // Whose block this is. First blocks ascend.
    FORGE_DEVICE const Problem &problem() const {
        const Problem *at = reinterpret_cast<const Problem *>(pool);
        u32 first = 0, end = n_problems;
        while (end - first > 1) {
            const u32 middle = (first + end) / 2;
            (at[middle].first_block <= blockIdx.x ? first : end) = middle;
        }
        return at[first];
    }
    FORGE_DEVICE static u32 block_of(const Problem &problem) {
        return blockIdx.x - problem.first_block;
    }
    FORGE_DEVICE const FactorPair *segments_of(const Problem &problem) const {
        const u64 *behind = pool + n_problems * (sizeof(Problem) / sizeof(u64));
        return reinterpret_cast<const FactorPair *>(behind) + problem.first_segment;
    }
    FORGE_DEVICE StepScalars scalars(const Problem &problem) const {
        StepScalars out = step;
        out.key[1] = problem.parameter;
        return out;
    }
};
static_assert(sizeof(Params) == 32760 && sizeof(Problem) == 128, "backend::cuda::group's");
#else
constexpr u32 MOST_SEGMENTS = 32;

struct Params {
    Problem only;
    StepSource step;
    FactorPair segments[MOST_SEGMENTS];

    FORGE_DEVICE const Problem &problem() const { return only; }
    FORGE_DEVICE static u32 block_of(const Problem &) { return blockIdx.x; }
    FORGE_DEVICE const FactorPair *segments_of(const Problem &) const { return segments; }
    FORGE_DEVICE StepScalars scalars(const Problem &) const {
        return step.device != nullptr ? *step.device : step.value;
    }
};
#endif

// What a block multiplies.
struct Product {
    const Problem &problem;
    const FactorPair *segments;
};

// Where 16 bytes of a factor lie in a stage: token `depth`, features from 8·unit on. Units of
// neighbouring tokens are exchanged, so that eight rows of a matrix meet no bank twice.
template <u32 FEATURES> FORGE_DEVICE u32 unit_offset(u32 depth, u32 unit) {
    return depth * FEATURES * 2 + (unit ^ (depth & 7u)) * 16;
}

// A thread's part of a factor: 16 bytes of the same features for each STEP-th token. What a stage
// needs of addresses is one addition: instructions, not bytes, are what the products wait for.
template <u32 FEATURES> struct Copies {
    static constexpr u32 UNITS = FEATURES / 8, STEP = THREADS / UNITS, COUNT = DEPTH / STEP;
    static_assert(STEP % 8 == 0 && COUNT * STEP == DEPTH, "the same exchange for all of them");

    const u16 *next; // its first token of the next stage
    u64 step;        // elements to the next of them
    u32 bytes;       // how many of 16 exist

    FORGE_DEVICE void start(const u16 *data, u64 stride, u64 first, u64 features) {
        const u64 feature = first + threadIdx.x % UNITS * 8;
        bytes = feature < features ? 2 * static_cast<u32>(min(features - feature, u64{8})) : 0u;
        next = data + (bytes > 0 ? feature : 0) + threadIdx.x / UNITS * stride;
        step = STEP * stride;
    }

    // Into a stage, of which the segment still has `tokens`. Copies of no bytes read nothing.
    template <bool WHOLE> FORGE_DEVICE void load(u32 stage, u32 tokens) {
        const u32 depth = threadIdx.x / UNITS;
        const u32 target = stage + unit_offset<FEATURES>(depth, threadIdx.x % UNITS);
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
            copy_async(target + i * STEP * FEATURES * 2, next,
                       WHOLE || depth + i * STEP < tokens ? bytes : 0u);
            next += step;
        }
    }
};

// Stages of factors, through all segments.
struct Feed {
    const Product &p;
    u64 row, col; // of the tile
    u32 segment = 0;
    u32 tokens = 0; // left of it
    Copies<ROWS> dy;
    Copies<COLS> x;

    FORGE_DEVICE Feed(const Product &product, u64 tile_row, u64 tile_col)
        : p(product), row(tile_row), col(tile_col) {
        open();
    }
    FORGE_DEVICE void open() {
        const FactorPair &f = p.segments[segment];
        tokens = static_cast<u32>(f.tokens);
        dy.start(f.dy, f.dy_stride, row, p.problem.shard.rows);
        x.start(f.x, f.x_stride, col, p.problem.shard.cols);
    }
    // The next one into the memory at `stage`, if there is one; a group of copies in any case.
    FORGE_DEVICE void load(u32 stage) {
        if (tokens >= DEPTH)
            load_some<true>(stage);
        else if (tokens > 0)
            load_some<false>(stage);
        copies_commit();
    }
    template <bool WHOLE> FORGE_DEVICE void load_some(u32 stage) {
        dy.load<WHOLE>(stage, tokens);
        x.load<WHOLE>(stage + DEPTH * ROWS * 2, tokens);
        tokens = WHOLE ? tokens - DEPTH : 0;
        if (tokens == 0 && ++segment < p.problem.n_segments)
            open();
    }
    // Of all segments.
    FORGE_DEVICE u32 stages() const {
        u32 count = 0;
        for (u32 i = 0; i < p.problem.n_segments; ++i)
            count += (static_cast<u32>(p.segments[i].tokens) + (DEPTH - 1)) / DEPTH;
        return count;
    }
};

// The factors of 16 tokens.
struct Fragments {
    u32 a[DOWN][4], b[ACROSS / 2][4];
};

// Where a lane finds its rows of the matrices in a stage. The next 16 features are two units on,
// which the exchange makes an exclusive or; the next 16 tokens are a constant away.
struct Reader {
    u32 a, b;

    FORGE_DEVICE Reader() {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const u32 matrix = lane / 8, in_matrix = lane % 8;
        // Matrices: rows 0..7 and 8..15 of tokens 0..7, then of tokens 8..15.
        a = unit_offset<ROWS>(matrix / 2 * 8 + in_matrix, warp / 2 * (WARP_ROWS / 8) + matrix % 2);
        // Matrices: tokens 0..7 and 8..15 of columns 0..7, then of columns 8..15.
        b = DEPTH * ROWS * 2 + unit_offset<COLS>(matrix % 2 * 8 + in_matrix,
                                                 warp % 2 * (WARP_COLS / 8) + matrix / 2);
    }

    // Tokens from `first` on.
    FORGE_DEVICE void load(u32 stage, u32 first, Fragments &to) const {
#pragma unroll
        for (u32 i = 0; i < DOWN; ++i)
            load_transposed(((stage + a) ^ i * 32) + first * ROWS * 2, to.a[i]);
#pragma unroll
        for (u32 j = 0; j < ACROSS / 2; ++j)
            load_transposed(((stage + b) ^ j * 32) + first * COLS * 2, to.b[j]);
    }
};

FORGE_DEVICE void multiply(const Fragments &f, Accumulators &acc) {
#pragma unroll
    for (int i = 0; i < DOWN; ++i)
#pragma unroll
        for (int j = 0; j < ACROSS; ++j)
            mma(acc[i][j], f.a[i], f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]);
}

// dW of the tile at (row, col); its factors' shared memory is free then.
FORGE_DEVICE void multiply(const Product &p, u32 shared, u64 row, u64 col, Accumulators &acc) {
    static_assert(DEPTH == 32, "two fragments of 16 tokens");
    Feed feed(p, row, col);
    const Reader reader;
    Fragments first, second;
    const u32 end = shared + STAGES * STAGE_BYTES;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage)
        feed.load(shared + stage * STAGE_BYTES);
    copies_wait<STAGES - 2>();
    __syncthreads();
    u32 stage = shared, free = end - STAGE_BYTES;
    reader.load(stage, 0, first);
#pragma unroll 1
    for (u32 left = feed.stages(); left > 0; --left) {
        reader.load(stage, 16, second);
        feed.load(free);
        multiply(first, acc);
        free = stage;
        stage = stage + STAGE_BYTES == end ? shared : stage + STAGE_BYTES;
        // All parts of the next stage have come, and all have done with this one.
        copies_wait<STAGES - 2>();
        __syncthreads();
        // Behind the last stage what lies there, which nobody multiplies.
        reader.load(stage, 0, first);
        multiply(second, acc);
    }
    copies_wait<0>();
    __syncthreads();
}

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
    const u32 at =
        spot_offset(part.row_of(pass, i), part.col_in_tile + part.col_of(i) + half * 4);
    return reinterpret_cast<float4 *>(tile + at);
}
FORGE_DEVICE Values take(float *tile, const Part &part, u32 pass, u32 i) {
    const float4 a = *run_in(tile, part, pass, i, 0), b = *run_in(tile, part, pass, i, 1);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

FORGE_DEVICE bool is_bad(double sum, bool bad) {
    return MODE == Mode::Norm ? !is_finite(sum) : bad;
}

// Of the parts of a tile, from registers: which are to be left alone, a bit for each. `partials`:
// the first part's, others `apart`; null: not wanted.
FORGE_DEVICE u32 judge(const Accumulators &acc, const StepScalars &step, u32 parts, double *sums,
                       u32 *flags, TilePartial *partials, u64 apart) {
    constexpr u32 WARPS = THREADS / 32 / PARTS; // of a part
    const u32 warp = threadIdx.x / 32;
    Sight sight;
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
        float values[ACROSS * 4];
#pragma unroll
        for (int j = 0; j < ACROSS * 4; ++j)
            values[j] = acc[i][j / 4][j % 4];
        sight.add(values, MODE == Mode::Norm ? 1.0f : step.grad_scale);
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
        any = is_bad(sum, any != 0) ? 1u : 0u;
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
                    sight.add(run.value, MODE == Mode::Norm ? 1.0f : step.grad_scale);
            }
        if constexpr (MODE != Mode::Accumulate) {
            TilePartial *partial = partials != nullptr ? partials + index * apart : nullptr;
            const bool bad = __syncthreads_or(sight.bad);
            const double sum = block_sum<THREADS>(sight.squares, sums);
            if (threadIdx.x == 0 && partial != nullptr)
                *partial = {sum, is_bad(sum, bad) ? 1u : 0u, 0u};
            skips |= static_cast<u32>(bad) << index;
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
        skips = judge(acc, step, parts, sums, flags, partials, apart);
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
