// dW = dYᵀ·X by mma.sync, consumed where it is produced: the update, an addition to a buffer, or
// its norm. For every card since compute capability 8.0.
//
// A block multiplies a tile of dW in registers, puts it into the shared memory that its factors
// had, and applies the rule from there, 64 rows at a time, as the element-wise kernel does: the
// same code, so the same bits. Two blocks share a multiprocessor: while one multiplies, the other
// waits for its weights and states.
//
// Deterministic: each element of dW sums its tokens in order in one accumulator.
#include "elementwise.cuh"
#include "mma.cuh"

#ifndef FORGE_GROUP
#define FORGE_GROUP 0
#endif

namespace forge {

enum class Mode { Update = 0, Accumulate = 1, Norm = 2 };
constexpr Mode MODE = static_cast<Mode>(FORGE_MODE);
constexpr bool ADDS = FORGE_ACCUMULATOR != 0;

constexpr u32 ROWS = FORGE_TILE_ROWS, COLS = 128, DEPTH = 32; // of a tile; tokens of a stage
constexpr int STAGES = 3;
// Warps: 2 below each other, 4 beside; a warp's part is ROWS/2 × 32.
constexpr int DOWN = ROWS / 2 / 16, ACROSS = 32 / 8;
constexpr u32 STAGE_BYTES = DEPTH * (ROWS + COLS) * 2;
// Of the tile's rows in shared memory: the four rows that half a warp stores to meet no bank twice.
constexpr u32 PITCH = COLS + 8;
constexpr u32 FACTOR_BYTES = STAGES * STAGE_BYTES, TILE_BYTES = ROWS * PITCH * 4;
// Dynamic shared memory is the larger of the two; backend::cuda::sm80 computes the same.
static_assert(FACTOR_BYTES <= 48 * 1024 && TILE_BYTES <= 68 * 1024, "two blocks on an SM");

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
// those of all, but for the id in the key. 4096 bytes: what every driver takes by value.
struct Params {
    StepScalars step;
    u32 n_problems;
    // Problems, then all their segments, so that either may be many.
    u64 pool[(4096 - sizeof(StepScalars) - sizeof(u32)) / sizeof(u64)];

    // Whose block this is. First blocks ascend.
    FORGE_DEVICE const Problem &problem() const {
        const Problem *at = reinterpret_cast<const Problem *>(pool);
        u32 index = 0;
        while (index + 1 < n_problems && at[index + 1].first_block <= blockIdx.x)
            ++index;
        return at[index];
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
static_assert(sizeof(Params) == 4096 && sizeof(Problem) == 128, "backend::cuda::group's");
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
    FORGE_DEVICE void load(u32 stage, u32 tokens) {
        const u32 depth = threadIdx.x / UNITS;
        const u32 target = stage + unit_offset<FEATURES>(depth, threadIdx.x % UNITS);
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
            copy_async(target + i * STEP * FEATURES * 2, next,
                       depth + i * STEP < tokens ? bytes : 0u);
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
        if (tokens > 0) {
            dy.load(stage, tokens);
            x.load(stage + DEPTH * ROWS * 2, tokens);
            tokens = tokens > DEPTH ? tokens - DEPTH : 0;
            if (tokens == 0 && ++segment < p.problem.n_segments)
                open();
        }
        copies_commit();
    }
    // Of all segments.
    FORGE_DEVICE u32 stages() const {
        u32 count = 0;
        for (u32 i = 0; i < p.problem.n_segments; ++i)
            count += (static_cast<u32>(p.segments[i].tokens) + (DEPTH - 1)) / DEPTH;
        return count;
    }
};

// Where a lane finds its rows of the matrices in a stage. The next 16 features are two units on,
// which the exchange makes an exclusive or; the next 16 tokens are a constant away.
struct Fragments {
    u32 a, b;

    FORGE_DEVICE Fragments() {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const u32 matrix = lane / 8, in_matrix = lane % 8;
        // Matrices: rows 0..7 and 8..15 of tokens 0..7, then of tokens 8..15.
        a = unit_offset<ROWS>(matrix / 2 * 8 + in_matrix, warp / 4 * (ROWS / 16) + matrix % 2);
        // Matrices: tokens 0..7 and 8..15 of columns 0..7, then of columns 8..15.
        b = DEPTH * ROWS * 2 +
            unit_offset<COLS>(matrix % 2 * 8 + in_matrix, warp % 4 * 4 + matrix / 2);
    }
};

FORGE_DEVICE void multiply_stage(u32 stage, const Fragments &at, float (&acc)[DOWN][ACROSS][4]) {
    const u32 first_a = stage + at.a, first_b = stage + at.b;
#pragma unroll
    for (u32 k = 0; k < DEPTH; k += 16) {
        u32 a[DOWN][4], b[ACROSS / 2][4];
#pragma unroll
        for (u32 i = 0; i < DOWN; ++i)
            load_transposed((first_a ^ i * 32) + k * ROWS * 2, a[i]);
#pragma unroll
        for (u32 j = 0; j < ACROSS / 2; ++j)
            load_transposed((first_b ^ j * 32) + k * COLS * 2, b[j]);
#pragma unroll
        for (int i = 0; i < DOWN; ++i)
#pragma unroll
            for (int j = 0; j < ACROSS; ++j)
                mma(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
}

// dW of the tile at (row, col), into `tile` of shared memory, where its factors were.
FORGE_DEVICE void multiply(const Product &p, u32 shared, float *tile, u64 row, u64 col) {
    float acc[DOWN][ACROSS][4] = {};
    Feed feed(p, row, col);
    const Fragments fragments;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage)
        feed.load(shared + stage * STAGE_BYTES);
    const u32 end = shared + STAGES * STAGE_BYTES;
    u32 stage = shared, free = end - STAGE_BYTES;
#pragma unroll 1
    for (u32 left = feed.stages(); left > 0; --left) {
        copies_wait<STAGES - 2>();
        // All parts of this stage have come, and all have done with the one before it.
        __syncthreads();
        feed.load(free);
        multiply_stage(stage, fragments, acc);
        free = stage;
        stage = stage + STAGE_BYTES == end ? shared : stage + STAGE_BYTES;
    }
    copies_wait<0>();
    __syncthreads();
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 first_row = warp / 4 * (ROWS / 2) + lane / 4;
    const u32 first_col = warp % 4 * 32 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < DOWN; ++i)
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) {
            float *at = tile + (first_row + i * 16) * PITCH + first_col + j * 8;
            *reinterpret_cast<float2 *>(at) = make_float2(acc[i][j][0], acc[i][j][1]);
            *reinterpret_cast<float2 *>(at + 8 * PITCH) = make_float2(acc[i][j][2], acc[i][j][3]);
        }
    __syncthreads();
}

// A tile of dW in shared memory, 64 rows of it: what the rule consumes. A thread looks at its own
// runs alone.
struct Part {
    const Problem &p;
    const Tile &tile;
    float *runs; // the thread's, in the first pass

    FORGE_DEVICE Part(const Problem &problem, const Tile &of, float *dw)
        : p(problem), tile(of), runs(dw + of.row_in_pass * PITCH + threadIdx.x % LANES * RUN) {}

    FORGE_DEVICE Run<float> take(int pass) const {
        const float4 *at = reinterpret_cast<const float4 *>(runs + pass * PASS_ROWS * PITCH);
        const float4 a = at[0], b = at[1];
        return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    }

    // With the buffer, whose sum goes where dW was: to the buffer itself, or for `take`. What is
    // not of the shard counts as zeros: there a factor's infinities met zeros.
    FORGE_DEVICE Run<float> look(int pass) const {
        Run<float> run = take(pass);
        const Place place = tile.place(p.shard, whole(), pass);
        if constexpr (ADDS) {
            const Run<float> before = load_run<float>(p.accumulator, place);
#pragma unroll
            for (int i = 0; i < RUN; ++i)
                run.value[i] = __fadd_rn(before.value[i], run.value[i]);
            if constexpr (MODE == Mode::Accumulate)
                store_run(p.accumulator, place, run);
            if constexpr (MODE == Mode::Update) {
                float4 *at = reinterpret_cast<float4 *>(runs + pass * PASS_ROWS * PITCH);
                at[0] = reinterpret_cast<const float4 *>(run.value)[0];
                at[1] = reinterpret_cast<const float4 *>(run.value)[1];
            }
        }
#pragma unroll
        for (u32 i = 0; i < RUN; ++i)
            if (VECTOR ? place.count == 0 : i >= place.count)
                run.value[i] = 0.0f;
        return run;
    }

    FORGE_DEVICE Region whole() const { return {0, 0, p.shard.rows, p.shard.cols}; }
};

// What becomes of a part of dW. `partial`: what it tells of itself, or null.
FORGE_DEVICE void consume(const Part &part, const StepScalars &step, double *sums,
                          TilePartial *partial) {
    const Problem &p = part.p;
    if constexpr (MODE == Mode::Update) {
        apply_rule(
            p.arrays, p.shard, part.whole(), part.tile, step, sums, partial,
            [&](int pass) { return part.look(pass); }, [&](int pass) { return part.take(pass); });
    } else {
        double squares = 0.0;
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const Run<float> run = part.look(pass);
#pragma unroll
            for (int i = 0; i < RUN; ++i)
                squares += static_cast<double>(run.value[i]) * static_cast<double>(run.value[i]);
        }
        if constexpr (MODE == Mode::Norm) {
            const double sum = block_sum<THREADS>(squares, sums);
            if (threadIdx.x == 0 && partial != nullptr)
                *partial = {sum, is_finite(sum) ? 0u : 1u, 0u};
        }
    }
}

} // namespace forge

using namespace forge;

extern "C" __global__ void __launch_bounds__(forge::THREADS, 2)
    forge_wgrad_sm80(const __grid_constant__ forge::Params params) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ double sums[THREADS / 32];
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

    float *dw = reinterpret_cast<float *>(shared);
    multiply({p, params.segments_of(p)}, shared_address(shared), dw, row, col);

#pragma unroll 1
    for (u32 first = 0; first < ROWS && row + first < p.shard.rows; first += TILE_ROWS) {
        const Tile tile({0, 0, p.shard.rows, p.shard.cols}, row + first, col);
        const u64 index = (row + first) / TILE_ROWS * tiles_across + col / TILE_COLS;
        TilePartial *partial = p.partials != nullptr ? p.partials + index : nullptr;
        consume(Part(p, tile, dw + first * PITCH), scalars, sums, partial);
    }
}
