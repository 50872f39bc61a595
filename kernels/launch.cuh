// A launch of the fused kernel: how tiles and shared memory are cut, its parameters, and the order
// in which a block goes through tiles and rings.
#pragma once
#include "arrays.cuh"
#include "philox.cuh"
#include "ptx.cuh"

#ifndef FORGE_GROUP
#define FORGE_GROUP 0
#endif

namespace forge {

// A launch is of one weight, or of many of one shape and one place in the global matrix, each of
// which is too small to fill a GPU. They lie below each other then, as if they were one.
constexpr bool GROUPED = FORGE_GROUP != 0;

// A tile's rows are two accumulators of 64.
constexpr int HALVES = 2, TILE_ROWS = 64 * HALVES;
constexpr int TILE_COLS = FORGE_TILE_COLS, TILE_TOKENS = FORGE_TILE_TOKENS;
constexpr int STAGES = FORGE_STAGES;
// Warpgroups that take turns: the registers are enough for two.
constexpr int CONSUMERS = 2;
// Blocks that work on tiles below each other in step and share the loads of X: each loads some of
// the tokens for both. The L2's two halves exchange less then, and that exchange is what saturates
// first.
constexpr int CLUSTER = FORGE_CLUSTER;
constexpr int THREADS = 128 * (CONSUMERS + 1);

// One TMA box of a factor: TILE_TOKENS tokens × 64 features, 128-byte swizzle.
constexpr u32 ATOM_BYTES = TILE_TOKENS * 128;
constexpr u32 STAGE_A = HALVES * ATOM_BYTES;
constexpr u32 STAGE_BYTES = STAGE_A + TILE_COLS / 64 * ATOM_BYTES;

constexpr int COL_CHUNKS = TILE_COLS / CHUNK_COLS;
// Where a chunk is no wider, there are narrow tiles besides: 64 columns, for what whole tiles leave
// over at the right edge of W and in the last wave of blocks.
constexpr int NARROW_COLS = 64, NARROW_PER_TILE = TILE_COLS / NARROW_COLS;
constexpr bool NARROW = CHUNK_COLS <= NARROW_COLS;
constexpr int NARROW_CHUNKS = NARROW ? NARROW_COLS / CHUNK_COLS : COL_CHUNKS;
constexpr int CHUNKS = 2 * HALVES * COL_CHUNKS;
// Named barriers: whose turn it is to multiply, and one for each consumer's own threads.
constexpr u32 TURN = 1, OWN = TURN + CONSUMERS;

// Dynamic shared memory, from a 1024-byte boundary: stages, slots of both rings, barriers.
constexpr u32 SLOTS_AT = STAGES * STAGE_BYTES;
constexpr u32 SCALES_AT = SLOTS_AT + CONSUMERS * SLOTS * SLOT_BYTES;
constexpr u32 BARRIERS_AT = SCALES_AT + CONSUMERS * SLOTS * SLOT_SCALE_BYTES;
constexpr int N_BARRIERS = 2 * STAGES + 2 * CONSUMERS * SLOTS;
// A copy of the step's scalars where they come from device memory.
struct Scalars {
    StepScalars step;
    RoundKeys keys;
};
// What a consumer knows of its tiles: Σ dW² of each warp's part, and how many were not finite.
struct Tally {
    double sums[4];
    u32 nonfinite, tiles;
};
constexpr u32 TALLIES_AT = BARRIERS_AT + 8 * N_BARRIERS;
constexpr u32 SCALARS_AT = TALLIES_AT + sizeof(Tally) * CONSUMERS;
// backend::cuda::sm90 computes the same.
constexpr u32 SHARED_BYTES = SCALARS_AT + sizeof(Scalars);
static_assert(SHARED_BYTES <= 227 * 1024 && (!any_q8() || TILE_COLS == 128),
              "policy.rs keeps to this");

// Where a weight of a group has its maps: those of arrays, of q8 states' scales, of dY and of X.
constexpr int arrays_before(int array) {
    int count = 0;
    for (int i = 0; i < array; ++i)
        count += array_spec(i).bytes > 0 ? 1 : 0;
    return count;
}
constexpr int scales_before(int state) {
    int count = arrays_before(N_ARRAYS);
    for (int i = 0; i < state; ++i)
        count += is_q8(i) ? 1 : 0;
    return count;
}
constexpr int MAP_DY = 2 * scales_before(3), MAP_X = MAP_DY + 1, MAPS = MAP_X + 1;

// A weight of a group; kernels/group_maps.cu makes it.
struct alignas(128) GroupWeight {
    TensorMap maps[MAPS];
    u32 parameter; // its id: the second word of the Philox key
};

struct Params {
#if FORGE_GROUP
    const GroupWeight *weights;
#else
    // Of each streamed array two: its rows 0..7 and its rows 8..15 of every 16. backend::cuda::sm90
    // makes them.
    TensorMap arrays[N_ARRAYS][2];
    // Of the scales of q8 states [ceil(cols/128)][rows], likewise.
    TensorMap scales[3][2];
    TensorMap dy[FORGE_MAX_SEGMENTS];
    TensorMap x[FORGE_MAX_SEGMENTS];
#endif
    u32 token_blocks[FORGE_MAX_SEGMENTS]; // of TILE_TOKENS
    u32 n_segments;
    u32 rows;    // of W
    u32 tiles_m; // below each other, of all weights
    // See Walk. Whole tiles beside each other and how many places of them there are; columns of
    // narrow tiles right of them; how many places there are in all.
    u32 whole_cols, whole_places, narrow_cols, places;
    u32 group_m;     // rows of places that are walked together, for reuse in the L2
    u64 first_index; // global index of W's first element here
    u64 global_cols; // stride of the global index
    StepSource step;
    RoundKeys keys; // Philox's, of `step`
    // Where the report goes (the norm in Mode::Norm), null: nowhere. The last block writes it, from
    // a partial of each consumer; `counter` tells which block that is, and is 0 before and after.
    void *reports[2];
    TilePartial *partials;
    u32 *counter;
    u32 method;    // of a norm
    u32 draw_high; // upper word of the numbers of all Philox calls, if FORGE_DRAWS_ALIGNED
};

struct TilePlace {
    u32 row, col; // of W
    bool narrow;
    u32 weight; // of a group
};

#if FORGE_GROUP
template <int ARRAY>
FORGE_DEVICE const TensorMap *array_map(const Params &p, const TilePlace &tile, u32 row8) {
    return &p.weights[tile.weight].maps[2 * arrays_before(ARRAY) + row8];
}
template <int STATE>
FORGE_DEVICE const TensorMap *scale_map(const Params &p, const TilePlace &tile, u32 row8) {
    return &p.weights[tile.weight].maps[2 * scales_before(STATE) + row8];
}
FORGE_DEVICE const TensorMap *dy_map(const Params &p, const TilePlace &tile, u32) {
    return &p.weights[tile.weight].maps[MAP_DY];
}
FORGE_DEVICE const TensorMap *x_map(const Params &p, const TilePlace &tile, u32) {
    return &p.weights[tile.weight].maps[MAP_X];
}
// Maps that another kernel has written are to be fetched again, where an older one was at their
// place; by the thread that uses them.
template <int FIRST, int END> FORGE_DEVICE void fetch_maps(const Params &p, const TilePlace &tile) {
#pragma unroll
    for (int i = FIRST; i < END; ++i)
        tensor_map_acquire(&p.weights[tile.weight].maps[i]);
}
FORGE_DEVICE void fetch_factor_maps(const Params &p, const TilePlace &tile) {
    fetch_maps<MAP_DY, MAPS>(p, tile);
}
FORGE_DEVICE void fetch_array_maps(const Params &p, const TilePlace &tile) {
    fetch_maps<0, MAP_DY>(p, tile);
}
#else
template <int ARRAY>
FORGE_DEVICE const TensorMap *array_map(const Params &p, const TilePlace &, u32 row8) {
    return &p.arrays[ARRAY][row8];
}
template <int STATE>
FORGE_DEVICE const TensorMap *scale_map(const Params &p, const TilePlace &, u32 row8) {
    return &p.scales[STATE][row8];
}
FORGE_DEVICE const TensorMap *dy_map(const Params &p, const TilePlace &, u32 segment) {
    return &p.dy[segment];
}
FORGE_DEVICE const TensorMap *x_map(const Params &p, const TilePlace &, u32 segment) {
    return &p.x[segment];
}
FORGE_DEVICE void fetch_factor_maps(const Params &, const TilePlace &) {}
FORGE_DEVICE void fetch_array_maps(const Params &, const TilePlace &) {}
#endif

// What a block walks through: every `step`-th place from `first` on. A place is a tile, or with
// clusters CLUSTER tiles below each other, one for each block; the last of them may lie outside W.
// Places of whole tiles come first, `whole_places` of them; if there are more, they are cut into
// narrow ones, and these come next; last the narrow ones at the right edge.
struct Walk {
    u32 first, step, places, rows_of_places;
    FORGE_DEVICE explicit Walk(const Params &p)
        : first(blockIdx.x / CLUSTER), step(gridDim.x / CLUSTER), places(p.places),
          rows_of_places((p.tiles_m + CLUSTER - 1) / CLUSTER) {}

    FORGE_DEVICE TilePlace tile(const Params &p, u32 place) const {
        const bool narrow = NARROW && place >= p.whole_places;
        u32 within_tile = 0;
        if (narrow) {
            const u32 index = place - p.whole_places;
            const u32 cut = (rows_of_places * p.whole_cols - p.whole_places) * NARROW_PER_TILE;
            if (index >= cut) {
                const u32 edge = index - cut;
                return placed(p, row(edge % rows_of_places),
                              p.whole_cols * TILE_COLS + edge / rows_of_places * NARROW_COLS, true);
            }
            place = p.whole_places + index / NARROW_PER_TILE;
            within_tile = index % NARROW_PER_TILE * NARROW_COLS;
        }
        // In groups of `group_m` rows of places, down the rows first, to the right and in the next
        // group back again: the columns of X where it turns are still in the L2.
        const u32 per_group = p.group_m * p.whole_cols;
        const u32 group = place / per_group, within = place % per_group;
        const u32 first_row = group * p.group_m;
        const u32 height = min(p.group_m, rows_of_places - first_row);
        const u32 m = first_row + within % height, n = within / height;
        return placed(p, row(m),
                      (group % 2 == 0 ? n : p.whole_cols - 1 - n) * TILE_COLS + within_tile,
                      narrow);
    }

  private:
    FORGE_DEVICE static TilePlace placed(const Params &p, u32 row, u32 col, bool narrow) {
        if constexpr (GROUPED)
            return {row % p.rows, col, narrow, row / p.rows};
        return {row, col, narrow, 0};
    }
    FORGE_DEVICE static u32 row(u32 place_row) {
        return (CLUSTER > 1 ? place_row * CLUSTER + cluster_rank() : place_row) * TILE_ROWS;
    }
};

// A place in a ring of N: index and the parity of its current round.
template <int N> struct Ring {
    u32 index = 0, parity = 0;
    FORGE_DEVICE void advance() {
        if (++index == N) {
            index = 0;
            parity ^= 1;
        }
    }
    FORGE_DEVICE void advance(u32 by) {
        const u32 to = index + by;
        parity ^= (to / N) & 1;
        index = to % N;
    }
};

} // namespace forge
