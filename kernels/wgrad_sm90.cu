// dW = dYᵀ·X on Hopper, consumed where it is produced: the update, an addition to a buffer, or its
// norm, of each tile in the registers of the warpgroup that multiplied it.
//
// Persistent, ping-pong: of two consumer warpgroups one multiplies its tile while the other applies
// the rule to its own, so that tensor cores and memory work at the same time. A producer warpgroup
// feeds them: one warp loads factors (dY, X: tokens × features), and one warp for each consumer
// streams the arrays of its tile through a ring of slots: load, (rule, in place), store, reload.
//
// Deterministic: each element of dW sums its tokens in order in one accumulator, and no result
// depends on which block or warpgroup computed a tile.
#include "arrays.cuh"
#include "epilogue.cuh"
#include "ptx.cuh"
#include "report.cuh"
#include "wgmma.cuh"

namespace forge {

constexpr int TILE_ROWS = FORGE_TILE_ROWS, TILE_COLS = FORGE_TILE_COLS,
              TILE_TOKENS = FORGE_TILE_TOKENS;
constexpr int STAGES = FORGE_STAGES;
// Accumulators of 64 rows each.
constexpr int HALVES = TILE_ROWS / 64;
constexpr int CONSUMERS = FORGE_CONSUMERS;
// Blocks that work on tiles below each other in step and share the loads of X: each loads some of
// the tokens for both. The L2's two halves exchange less then, and that exchange is what saturates
// first.
constexpr int CLUSTER = FORGE_CLUSTER;
constexpr int THREADS = 128 * (CONSUMERS + 1);

// One TMA box of a factor: TILE_TOKENS tokens × 64 features, 128-byte swizzle.
constexpr u32 ATOM_BYTES = TILE_TOKENS * 128;
constexpr u32 STAGE_A = TILE_ROWS / 64 * ATOM_BYTES;
constexpr u32 STAGE_BYTES = STAGE_A + TILE_COLS / 64 * ATOM_BYTES;

constexpr int COL_CHUNKS = TILE_COLS / CHUNK_COLS;
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
    u32 nonfinite, last;
};
constexpr u32 TALLIES_AT = BARRIERS_AT + 8 * N_BARRIERS;
constexpr u32 SCALARS_AT = TALLIES_AT + sizeof(Tally) * CONSUMERS;
// backend::cuda::sm90 computes the same.
constexpr u32 SHARED_BYTES = SCALARS_AT + sizeof(Scalars);
static_assert(SHARED_BYTES <= 227 * 1024 && (!any_q8() || TILE_COLS == 128),
              "policy.rs keeps to this");

struct Params {
    // Of each streamed array two: its rows 0..7 and its rows 8..15 of every 16. backend::cuda::sm90
    // makes them.
    TensorMap arrays[N_ARRAYS][2];
    // Of the scales of q8 states [ceil(cols/128)][rows], likewise.
    TensorMap scales[3][2];
    TensorMap dy[FORGE_MAX_SEGMENTS];
    TensorMap x[FORGE_MAX_SEGMENTS];
    u32 token_blocks[FORGE_MAX_SEGMENTS]; // of TILE_TOKENS
    u32 n_segments;
    u32 rows, cols; // of W
    u32 tiles_m, tiles_n;
    u32 group_m;     // rows of places (see Walk) that are walked together, for reuse in the L2
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

struct TileIndex {
    u32 m, n;
};

// What a block walks through: every `step`-th place from `first` on. A place is a tile, or with
// clusters CLUSTER tiles below each other, one for each block; the last of them may lie outside W.
struct Walk {
    u32 first, step, places, rows_of_places;
    FORGE_DEVICE explicit Walk(const Params &p)
        : first(blockIdx.x / CLUSTER), step(gridDim.x / CLUSTER),
          places((p.tiles_m + CLUSTER - 1) / CLUSTER * p.tiles_n),
          rows_of_places((p.tiles_m + CLUSTER - 1) / CLUSTER) {}

    // In groups of `group_m` rows of places, down the rows first.
    FORGE_DEVICE TileIndex tile(const Params &p, u32 place) const {
        const u32 per_group = p.group_m * p.tiles_n;
        const u32 group = place / per_group, within = place % per_group;
        const u32 first_row = group * p.group_m;
        const u32 height = min(p.group_m, rows_of_places - first_row);
        u32 m = first_row + within % height;
        if (CLUSTER > 1)
            m = m * CLUSTER + cluster_rank();
        return {m, within / height};
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

// The whole warp walks along, so that the addresses are uniform; one lane issues.
FORGE_DEVICE void load_factors(const Params &p, u8 *shared, u32 full, u32 empty) {
    const bool leader = elect_one();
    const Walk walk(p);
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    constexpr int X_TOKENS = TILE_TOKENS / CLUSTER;
    Ring<STAGES> stage;
    for (u32 place = walk.first; place < walk.places; place += walk.step) {
        const TileIndex tile = walk.tile(p, place);
        const i32 row = tile.m * TILE_ROWS, col = tile.n * TILE_COLS;
        for (u32 segment = 0; segment < p.n_segments; ++segment) {
            const TensorMap *dy = &p.dy[segment];
            const TensorMap *x = &p.x[segment];
            const u32 blocks = p.token_blocks[segment];
#pragma unroll 1
            for (u32 block = 0; block < blocks; ++block) {
                barrier_wait(empty + 8 * stage.index, stage.parity ^ 1);
                const u32 barrier = full + 8 * stage.index;
                const u32 target = shared_address(shared) + stage.index * STAGE_BYTES;
                const i32 token = block * TILE_TOKENS;
                if (leader) {
                    barrier_arrive_expect(barrier, STAGE_BYTES);
#pragma unroll
                    for (int i = 0; i < TILE_ROWS / 64; ++i)
                        tma_load_2d(target + i * ATOM_BYTES, dy, barrier, row + 64 * i, token);
#pragma unroll
                    for (int i = 0; i < TILE_COLS / 64; ++i) {
                        const u32 at = target + STAGE_A + i * ATOM_BYTES + rank * X_TOKENS * 128;
                        const i32 feature = col + 64 * i, first = token + rank * X_TOKENS;
                        if constexpr (CLUSTER == 1)
                            tma_load_2d(at, x, barrier, feature, first);
                        else
                            tma_load_2d_multicast(at, x, barrier, feature, first,
                                                  (1u << CLUSTER) - 1);
                    }
                }
                stage.advance();
            }
        }
    }
}

// The part of chunk `chunk` of the tile at (row, col) that array ARRAY has. Coordinates: a map
// holds every second 8 rows, as groups of 8 (two-byte and one-byte arrays) or of 2 × 4 rows, the
// two 4 apart, which interleaves them in shared memory (four-byte arrays; see pair_offset).
template <int ARRAY, bool LOAD>
FORGE_DEVICE void move_chunk(const Params &p, u32 slot, u32 barrier, u32 row, u32 col, u32 chunk) {
    constexpr ArraySpec SPEC = array_spec(ARRAY);
    if constexpr (LOAD ? SPEC.loads : SPEC.stores) {
        constexpr int COLS = box_cols(SPEC.bytes);
        // Order of chunks: m64 half, 8-row half, columns.
        const u32 half = chunk / (2 * COL_CHUNKS), row8 = chunk / COL_CHUNKS % 2;
        const i32 group = row / 16 + half * 4;
        const TensorMap *map = &p.arrays[ARRAY][row8];
#pragma unroll
        for (int i = 0; i < CHUNK_COLS / COLS; ++i) {
            const i32 c = col + chunk % COL_CHUNKS * CHUNK_COLS + i * COLS;
            const u32 at = slot + array_offset(ARRAY) + i * box_bytes(SPEC.bytes);
            if constexpr (SPEC.bytes == 4) {
                if constexpr (LOAD)
                    tma_load_4d(at, map, barrier, c, 0, 0, group);
                else
                    tma_store_4d(map, at, c, 0, 0, group);
            } else {
                if constexpr (LOAD)
                    tma_load_3d(at, map, barrier, c, 0, group);
                else
                    tma_store_3d(map, at, c, 0, group);
            }
        }
    }
}

template <int STATE_INDEX, bool LOAD>
FORGE_DEVICE void move_scales(const Params &p, u32 scales, u32 barrier, u32 row, u32 col,
                              u32 chunk) {
    if constexpr (is_q8(STATE_INDEX)) {
        const TensorMap *map = &p.scales[STATE_INDEX][chunk / COL_CHUNKS % 2];
        const i32 group = row / 16 + chunk / (2 * COL_CHUNKS) * 4;
        const i32 block = (col + chunk % COL_CHUNKS * CHUNK_COLS) / 128;
        const u32 at = scales + STATE_INDEX * SCALE_BYTES;
        if constexpr (LOAD)
            tma_load_3d(at, map, barrier, 0, group, block);
        else
            tma_store_3d(map, at, 0, group, block);
    }
}

template <bool LOAD>
FORGE_DEVICE void move_arrays(const Params &p, u32 slot, u32 scales, u32 barrier, u32 row, u32 col,
                              u32 chunk) {
    if (LOAD)
        barrier_arrive_expect(barrier, SLOT_LOAD_BYTES);
    move_scales<0, LOAD>(p, scales, barrier, row, col, chunk);
    move_scales<1, LOAD>(p, scales, barrier, row, col, chunk);
    move_scales<2, LOAD>(p, scales, barrier, row, col, chunk);
    move_chunk<0, LOAD>(p, slot, barrier, row, col, chunk);
    move_chunk<1, LOAD>(p, slot, barrier, row, col, chunk);
    move_chunk<2, LOAD>(p, slot, barrier, row, col, chunk);
    move_chunk<3, LOAD>(p, slot, barrier, row, col, chunk);
    move_chunk<4, LOAD>(p, slot, barrier, row, col, chunk);
    move_chunk<5, LOAD>(p, slot, barrier, row, col, chunk);
}

constexpr bool any_store() {
    bool any = false;
    for (int i = 0; i < N_ARRAYS; ++i)
        any = any || array_spec(i).stores;
    return any;
}

// Streams the arrays of one consumer's tiles. `full` and `done`: barriers of its ring.
FORGE_DEVICE void stream_arrays(const Params &p, u32 consumer, u32 slots, u32 scales, u32 full,
                                u32 done) {
    const Walk walk(p);
    const u32 first = walk.first + consumer * walk.step;
    if (first >= walk.places)
        return;
    const bool leader = elect_one();
    // Loads run SLOTS chunks ahead of stores, over the seams between tiles.
    u32 load_place = first, load_chunk = 0, store_place = first, store_chunk = 0;
    Ring<SLOTS> ring;
#pragma unroll 1
    for (u32 ahead = 0; store_place < walk.places; ring.advance()) {
        const u32 slot = slots + ring.index * SLOT_BYTES;
        const u32 slot_scales = scales + ring.index * SLOT_SCALE_BYTES;
        if (ahead < SLOTS) {
            ++ahead;
        } else {
            // `ring` is a round further on than the chunk that lies in the slot.
            barrier_wait(done + 8 * ring.index, ring.parity ^ 1);
            if constexpr (any_store()) {
                const TileIndex tile = walk.tile(p, store_place);
                if (leader) {
                    move_arrays<false>(p, slot, slot_scales, 0, tile.m * TILE_ROWS,
                                       tile.n * TILE_COLS, store_chunk);
                    tma_commit();
                    tma_wait_read<0>();
                }
                __syncwarp();
            }
            if (++store_chunk == CHUNKS) {
                store_chunk = 0;
                store_place += CONSUMERS * walk.step;
            }
        }
        if (load_place < walk.places) {
            const TileIndex tile = walk.tile(p, load_place);
            if (leader)
                move_arrays<true>(p, slot, slot_scales, full + 8 * ring.index, tile.m * TILE_ROWS,
                                  tile.n * TILE_COLS, load_chunk);
            if (++load_chunk == CHUNKS) {
                load_chunk = 0;
                load_place += CONSUMERS * walk.step;
            }
        }
    }
    if (leader)
        tma_wait_all();
}

// A warp is done with a stage; all blocks whose loads go there must know.
FORGE_DEVICE void release(u32 barrier) {
    const u32 lane = threadIdx.x % 32;
    if constexpr (CLUSTER == 1) {
        if (lane == 0)
            barrier_arrive(barrier);
    } else {
        if (lane < CLUSTER)
            barrier_arrive_in(barrier, lane);
    }
}

template <int REGISTERS>
FORGE_DEVICE void multiply(float (&acc)[HALVES][REGISTERS], u32 token_blocks, u32 stages, u32 full,
                           u32 empty, Ring<STAGES> &stage) {
    // From +0, also where there are no tokens.
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
        for (int i = 0; i < REGISTERS; ++i) {
            acc[half][i] = 0.0f;
            wgmma_pin(acc[half][i]);
        }
    Ring<STAGES> previous = stage;
    for (u32 block = 0; block < token_blocks; ++block) {
        barrier_wait(full + 8 * stage.index, stage.parity);
        const u64 a = wgmma_descriptor<ATOM_BYTES>(stages + stage.index * STAGE_BYTES);
        const u64 b = wgmma_descriptor<ATOM_BYTES>(stages + stage.index * STAGE_BYTES + STAGE_A);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILE_TOKENS / 16; ++k) {
            // 16 tokens further: 2048 bytes; 64 rows of dW further: an atom. In units of 16 bytes.
#pragma unroll
            for (int half = 0; half < HALVES; ++half)
                wgmma<TILE_COLS>(acc[half], a + 128 * k + half * (ATOM_BYTES / 16), b + 128 * k);
        }
        wgmma_commit();
        // All but the products just issued are done: their stage may be loaded again.
        wgmma_wait<1>();
        if (block > 0) {
            release(empty + 8 * previous.index);
        }
        previous = stage;
        stage.advance();
    }
}

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

// Waits for a chunk, works on it in place, and hands it to the DMA warp. `acc`: of one m64 half.
template <int COL, int REGISTERS>
FORGE_DEVICE void one_chunk(const Params &p, const float (&acc)[REGISTERS], u32 half, u32 row8,
                            bool finite, Squares &squares, u8 *slots, u8 *slot_scales, u32 full,
                            u32 done, Ring<SLOTS> &ring, ChunkUpdate &update, const Lane &lane) {
    const u32 row_in_tile = half * 64 + row8 * 8;
    float grad[CHUNK_COLS / 4];
#pragma unroll
    for (int j = 0; j < CHUNK_COLS / 8; ++j) {
        const int at = 4 * (COL / 8 + j);
        grad[2 * j] = row8 == 0 ? acc[at] : acc[at + 2];
        grad[2 * j + 1] = row8 == 0 ? acc[at + 1] : acc[at + 3];
    }
    barrier_wait(full + 8 * ring.index, ring.parity);
    u8 *slot = slots + ring.index * SLOT_BYTES;
    if constexpr (array_spec(A_ACCUMULATOR).bytes > 0) {
#pragma unroll
        for (int j = 0; j < CHUNK_COLS / 8; ++j) {
            u8 *at =
                slot + array_offset(A_ACCUMULATOR) + pair_offset<4>(j, lane.warp, lane.row, lane.q);
            const float2 before = load_f32x2(at);
            grad[2 * j] = __fadd_rn(before.x, grad[2 * j]);
            grad[2 * j + 1] = __fadd_rn(before.y, grad[2 * j + 1]);
            if constexpr (MODE == Mode::Accumulate)
                store_f32x2(at, grad[2 * j], grad[2 * j + 1]);
        }
        if constexpr (MODE != Mode::Accumulate) {
            // Here a warp's part of a chunk is what is left alone, since the rest of the buffer's
            // tile comes only when this chunk has gone.
            Squares of_chunk;
            add_squares(of_chunk, grad, update.step.grad_scale);
            squares.sum += of_chunk.sum;
            finite = !__any_sync(0xFFFFFFFFu, of_chunk.bad);
            squares.bad = squares.bad || !finite;
        }
    }
    if constexpr (MODE == Mode::Update) {
        float *scales[3];
#pragma unroll
        for (int s = 0; s < 3; ++s) {
            u8 *at = slot_scales + ring.index * SLOT_SCALE_BYTES + s * SCALE_BYTES;
            scales[s] = reinterpret_cast<float *>(at) + lane.warp * 8 + lane.row;
        }
        const u32 row = lane.tile_row + row_in_tile + lane.warp * 16 + lane.row;
        const u64 index = p.first_index + row * p.global_cols + lane.tile_col + COL;
        if (finite)
            update.run(slot, grad, index, scales);
        else
            update.keep(slot);
    }
    fence_shared_for_tma();
    __syncwarp();
    if (threadIdx.x % 32 == 0)
        barrier_arrive(done + 8 * ring.index);
    ring.advance();
}

// What becomes of the tile's registers, chunk by chunk.
template <int REGISTERS>
FORGE_DEVICE void consume(const Params &p, const StepScalars &step, const RoundKeys &keys,
                          float (&acc)[HALVES][REGISTERS], u32 consumer, u8 *shared, u32 full,
                          u32 done, Ring<SLOTS> &ring, const Lane &lane) {
    Tally &tally = reinterpret_cast<Tally *>(shared + TALLIES_AT)[consumer];
    // A place below W counts for nothing: its zeros may meet an infinity.
    const bool told =
        (p.reports[0] != nullptr || p.reports[1] != nullptr) && lane.tile_row < p.rows;
    constexpr bool GUARDED = MODE != Mode::Accumulate;
    constexpr bool ADDS = array_spec(A_ACCUMULATOR).bytes > 0;
    Squares squares;
    bool finite = true;
    if constexpr (GUARDED && !ADDS) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
            add_squares(squares, acc[half], step.grad_scale);
        finite = !named_barrier_any(OWN + consumer, 128, squares.bad);
        if (told)
            add_to(tally, lane.warp, squares.sum, finite);
    }
    if constexpr (STREAMS) {
        u8 *slots = shared + SLOTS_AT + consumer * SLOTS * SLOT_BYTES;
        u8 *slot_scales = shared + SCALES_AT + consumer * SLOTS * SLOT_SCALE_BYTES;
        ChunkUpdate update{step, keys, lane, p.draw_high};
        // One body for both m64 halves: unrolled over the whole tile, the code would outgrow the
        // instruction cache, which costs more than moving the second half's accumulators.
#pragma unroll 1
        for (u32 half = 0; half < HALVES; ++half) {
            if constexpr (any_q8()) {
                // Twice as long: one body for rows 0..7 and 8..15 as well. Tiles are a block wide.
#pragma unroll 1
                for (u32 row8 = 0; row8 < 2; ++row8)
                    one_chunk<0>(p, acc[0], half, row8, finite, squares, slots, slot_scales, full,
                                 done, ring, update, lane);
            } else {
                for_constants<CHUNKS / HALVES>([&](auto constant) {
                    constexpr int C = decltype(constant)::value;
                    one_chunk<C % COL_CHUNKS * CHUNK_COLS>(p, acc[0], half, C / COL_CHUNKS, finite,
                                                           squares, slots, slot_scales, full, done,
                                                           ring, update, lane);
                });
            }
            if constexpr (HALVES == 2) {
#pragma unroll
                for (int i = 0; i < REGISTERS; ++i)
                    acc[0][i] = acc[1][i];
            }
        }
    }
    if constexpr (GUARDED && ADDS) {
        finite = !named_barrier_any(OWN + consumer, 128, squares.bad);
        if (told)
            add_to(tally, lane.warp, squares.sum, finite);
    }
}

FORGE_DEVICE void consumer_loop(const Params &p, u8 *shared, u32 consumer, u32 full, u32 empty,
                                u32 ring_full, u32 ring_done) {
    constexpr int REGISTERS = TILE_COLS / 2;
#if FORGE_DEVICE_STEP
    const Scalars &scalars = *reinterpret_cast<const Scalars *>(shared + SCALARS_AT);
    const StepScalars &step = scalars.step;
    const RoundKeys &keys = scalars.keys;
#else
    const StepScalars &step = p.step.value;
    const RoundKeys &keys = p.keys;
#endif
    const Walk walk(p);
    const u32 thread = threadIdx.x % 128;
    u32 token_blocks = 0;
    for (u32 segment = 0; segment < p.n_segments; ++segment)
        token_blocks += p.token_blocks[segment];

    Ring<STAGES> stage;
    Ring<SLOTS> ring;
    // The mainloops take turns, so that waits on `full` never lag a whole round behind.
    const u32 mine = TURN + consumer, next = TURN + (consumer + 1) % CONSUMERS;
    if (consumer == CONSUMERS - 1)
        named_barrier_arrive(next, 256);
    stage.advance(consumer * token_blocks);
    for (u32 place = walk.first + consumer * walk.step; place < walk.places;
         place += CONSUMERS * walk.step) {
        const TileIndex tile = walk.tile(p, place);
        float acc[HALVES][REGISTERS];
        named_barrier_sync(mine, 256);
        Ring<STAGES> last = stage;
        if (token_blocks > 0)
            last.advance(token_blocks - 1);
        multiply(acc, token_blocks, shared_address(shared), full, empty, stage);
        named_barrier_arrive(next, 256);
        wgmma_wait<0>();
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
#pragma unroll
            for (int i = 0; i < REGISTERS; ++i)
                wgmma_pin(acc[half][i]);
        if (token_blocks > 0)
            release(empty + 8 * last.index);
        stage.advance((CONSUMERS - 1) * token_blocks); // those of the others' tiles

        const Lane lane{thread / 32, thread % 32 / 4, thread % 4, tile.m * TILE_ROWS,
                        tile.n * TILE_COLS};
        consume(p, step, keys, acc, consumer, shared, ring_full, ring_done, ring, lane);
    }
}

} // namespace forge

#if FORGE_CLUSTER > 1
#define FORGE_CLUSTER_ATTRIBUTE __cluster_dims__(FORGE_CLUSTER, 1, 1)
#else
#define FORGE_CLUSTER_ATTRIBUTE
#endif

extern "C" __global__ void FORGE_CLUSTER_ATTRIBUTE __launch_bounds__(forge::THREADS, 1)
    forge_wgrad_sm90(const __grid_constant__ forge::Params p) {
    using namespace forge;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 barriers = shared_address(shared) + BARRIERS_AT;
    const u32 full = barriers, empty = full + 8 * STAGES;
    const u32 rings = empty + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 4 * CLUSTER); // the warps of the consumers that used it
        }
        for (int i = 0; i < 2 * CONSUMERS * SLOTS; ++i) {
            // A ring: SLOTS `full` barriers, then SLOTS `done` ones, by the warps of its consumer.
            barrier_init(rings + 8 * i, i / SLOTS % 2 == 0 ? 1 : 4);
        }
        barrier_init_fence();
        for (int c = 0; c < CONSUMERS; ++c)
            reinterpret_cast<Tally *>(shared + TALLIES_AT)[c] = {};
#if FORGE_DEVICE_STEP
        Scalars &scalars = *reinterpret_cast<Scalars *>(shared + SCALARS_AT);
        scalars.step = *p.step.device;
        scalars.keys = round_keys(scalars.step);
#endif
    }
    if (CLUSTER > 1)
        cluster_sync();
    else
        __syncthreads();
    const u32 group = warp_index() / 4;
    if (group == CONSUMERS) {
        registers_lower<24>();
        const u32 warp = warp_index() % 4;
        if (warp == 0) {
            load_factors(p, shared, full, empty);
        } else if (STREAMS && warp <= CONSUMERS) {
            const u32 consumer = warp - 1;
            stream_arrays(p, consumer,
                          shared_address(shared) + SLOTS_AT + consumer * SLOTS * SLOT_BYTES,
                          shared_address(shared) + SCALES_AT + consumer * SLOTS * SLOT_SCALE_BYTES,
                          rings + 16 * SLOTS * consumer, rings + 16 * SLOTS * consumer + 8 * SLOTS);
        }
    } else {
        registers_raise<CONSUMERS == 2 ? 240 : 160>();
        consumer_loop(p, shared, group, full, empty, rings + 16 * SLOTS * group,
                      rings + 16 * SLOTS * group + 8 * SLOTS);
    }
    __syncwarp();
    report(p, reinterpret_cast<Tally *>(shared + TALLIES_AT));
    // Nobody leaves while others still load into its memory or arrive on its barriers.
    if (CLUSTER > 1) {
        __syncwarp();
        cluster_sync();
    }
}
