// The products of the fused kernel of 8.0: a tile of dW in the registers of four warps.
//
// Factors of 16 bits are multiplied as they are. fp32 ones are split as they are read, into a bf16
// and what it leaves over as another; of their four products the three that matter are summed
// (bf16×3). What is left out of x·y is at most 3·2⁻¹⁶ of it.
#pragma once
#include "formats.cuh"
#include "launch_sm80.cuh"
#include "mma.cuh"

namespace forge {

constexpr bool SPLIT = FORGE_FACTOR == 0;
constexpr int THREADS = 128;
constexpr u32 ELEMENT = SPLIT ? 4 : 2, PER_UNIT = 16 / ELEMENT;            // bytes; in 16 of them
constexpr u32 ROWS = FORGE_TILE_ROWS, COLS = 128, DEPTH = SPLIT ? 16 : 32; // tokens of a stage
constexpr int STAGES = ROWS == 128 ? 4 : 3;
// Warps: 2 below each other, 2 beside; a warp's part is ROWS/2 × 64, of which mma makes 16 × 8 at a
// time. The larger the part, the fewer bytes of shared memory for each product: reading them takes
// about as long as multiplying.
constexpr u32 WARP_ROWS = ROWS / 2, WARP_COLS = COLS / 2;
constexpr int DOWN = WARP_ROWS / 16, ACROSS = WARP_COLS / 8;
constexpr u32 DY_BYTES = DEPTH * ROWS * ELEMENT; // of a stage; X's part is behind it
constexpr u32 STAGE_BYTES = DY_BYTES + DEPTH * COLS * ELEMENT;
// Of the tile's rows in shared memory: the four rows that half a warp stores to meet no bank twice.
constexpr u32 PITCH = COLS + 8;
constexpr u32 FACTOR_BYTES = STAGES * STAGE_BYTES, TILE_BYTES = ROWS * PITCH * 4;

using Accumulators = float[DOWN][ACROSS][4];

// What a block multiplies.
struct Product {
    const Problem &problem;
    const FactorPair *segments;
};

// Where 16 bytes of a factor lie in a stage: token `depth`, features from PER_UNIT·unit on. Units
// of neighbouring tokens are exchanged, so that eight rows of a matrix meet no bank twice, nor
// eight fp32 of each of tokens 0, 2, 4 and 6.
template <u32 FEATURES> FORGE_DEVICE u32 unit_offset(u32 depth, u32 unit) {
    return depth * FEATURES * ELEMENT + (unit ^ (SPLIT ? depth & 6u : depth & 7u)) * 16;
}

// A thread's part of a factor: 16 bytes of the same features for each STEP-th token. What a stage
// needs of addresses is one addition: instructions, not bytes, are what the products wait for.
template <u32 FEATURES> struct Copies {
    static constexpr u32 UNITS = FEATURES / PER_UNIT, STEP = THREADS / UNITS, COUNT = DEPTH / STEP;
    static_assert(COUNT * STEP == DEPTH && UNITS * STEP == THREADS, "whole stages");

    const u8 *next; // its first token of the next stage
    u64 step;       // bytes to the next of them
    u32 bytes;      // how many of 16 exist

    FORGE_DEVICE void start(const u8 *data, u64 stride, u64 first, u64 features) {
        const u64 feature = first + threadIdx.x % UNITS * PER_UNIT;
        bytes = 0;
        if (feature < features)
            bytes = ELEMENT * static_cast<u32>(min(features - feature, u64{PER_UNIT}));
        next = data + ((bytes > 0 ? feature : 0) + threadIdx.x / UNITS * stride) * ELEMENT;
        step = STEP * stride * ELEMENT;
    }

    // Into a stage, of which the segment still has `tokens`. Copies of no bytes read nothing.
    template <bool WHOLE> FORGE_DEVICE void load(u32 stage, u32 tokens) {
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
            const u32 depth = threadIdx.x / UNITS + i * STEP;
            copy_async(stage + unit_offset<FEATURES>(depth, threadIdx.x % UNITS), next,
                       WHOLE || depth < tokens ? bytes : 0u);
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
        x.load<WHOLE>(stage + DY_BYTES, tokens);
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

#if FORGE_FACTOR == 0

// --- fp32 factors ---

struct Halves {
    u32 high, low; // two neighbours' bf16 each
};
FORGE_DEVICE Halves split(float x, float y) {
    const u32 high = narrow_bf16x2(x, y);
    const float2 taken = formats::widen_bf16x2(high);
    return {high, narrow_bf16x2(__fsub_rn(x, taken.x), __fsub_rn(y, taken.y))};
}

// Where a lane finds its elements in a stage: those that the fragments of mma give it.
struct SplitReader {
    u32 a, b; // of feature lane/4 of the warp's first, token 2·(lane%4)

    FORGE_DEVICE SplitReader() {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        a = offset<ROWS>(warp / 2 * WARP_ROWS + lane / 4, lane % 4 * 2);
        b = DY_BYTES + offset<COLS>(warp % 2 * WARP_COLS + lane / 4, lane % 4 * 2);
    }

    FORGE_DEVICE void multiply(u32 stage, Accumulators &acc) const {
        Halves x[ACROSS][2];
#pragma unroll
        for (u32 j = 0; j < ACROSS; ++j)
#pragma unroll
            for (u32 k = 0; k < 2; ++k)
                x[j][k] = pair<COLS>(stage + b, j * 8, k * 8);
#pragma unroll
        for (u32 i = 0; i < DOWN; ++i) {
            u32 high[4], low[4];
#pragma unroll
            for (u32 k = 0; k < 4; ++k) {
                const Halves part = pair<ROWS>(stage + a, i * 16 + k % 2 * 8, k / 2 * 8);
                high[k] = part.high;
                low[k] = part.low;
            }
#pragma unroll
            for (int j = 0; j < ACROSS; ++j) {
                mma(acc[i][j], low, x[j][0].high, x[j][1].high);
                mma(acc[i][j], high, x[j][0].low, x[j][1].low);
                mma(acc[i][j], high, x[j][0].high, x[j][1].high);
            }
        }
    }

  private:
    template <u32 FEATURES> FORGE_DEVICE static u32 offset(u32 feature, u32 token) {
        return unit_offset<FEATURES>(token, feature / 4) + feature % 4 * 4;
    }
    // The feature `features` further on, of the tokens `tokens` further on and next to it. Eight
    // features are two units, which the exchange of units makes an exclusive or.
    template <u32 FEATURES> FORGE_DEVICE static Halves pair(u32 first, u32 features, u32 tokens) {
        const u32 at = (first ^ (features % 32 * 4)) + features / 32 * 128;
        constexpr u32 TOKEN = FEATURES * ELEMENT;
        return split(shared_load_f32(at + tokens * TOKEN),
                     shared_load_f32(at + (tokens + 1) * TOKEN));
    }
};

#else

// --- 16-bit factors ---

// Those of 16 tokens.
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
        b = DY_BYTES +
            unit_offset<COLS>(matrix % 2 * 8 + in_matrix, warp % 2 * (WARP_COLS / 8) + matrix / 2);
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

#endif

// dW of the tile at (row, col); its factors' shared memory is free then.
FORGE_DEVICE void multiply(const Product &p, u32 shared, u64 row, u64 col, Accumulators &acc) {
    static_assert(SPLIT || DEPTH == 32, "two fragments of 16 tokens");
    Feed feed(p, row, col);
    const u32 end = shared + STAGES * STAGE_BYTES;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage)
        feed.load(shared + stage * STAGE_BYTES);
    u32 stage = shared, free = end - STAGE_BYTES;
    const auto advance = [&] {
        free = stage;
        stage = stage + STAGE_BYTES == end ? shared : stage + STAGE_BYTES;
    };
    // All parts of the stage have come, and all have done with the one before it.
    const auto wait = [] {
        copies_wait<STAGES - 2>();
        __syncthreads();
    };
#if FORGE_FACTOR == 0
    const SplitReader reader;
#pragma unroll 1
    for (u32 left = feed.stages(); left > 0; --left, advance()) {
        wait();
        feed.load(free);
        reader.multiply(stage, acc);
    }
#else
    const Reader reader;
    Fragments first, second;
    wait();
    reader.load(stage, 0, first);
#pragma unroll 1
    for (u32 left = feed.stages(); left > 0; --left) {
        reader.load(stage, 16, second);
        feed.load(free);
        multiply(first, acc);
        advance();
        wait();
        // Behind the last stage what lies there, which nobody multiplies.
        reader.load(stage, 0, first);
        multiply(second, acc);
    }
#endif
    copies_wait<0>();
    __syncthreads();
}

} // namespace forge
