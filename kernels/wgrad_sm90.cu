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
#include "epilogue.cuh"
#include "launch.cuh"
#include "producer.cuh"
#include "ptx.cuh"
#include "tally.cuh"
#include "wgmma.cuh"

namespace forge {

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

// A stage that is about to be multiplied: what is known of it before the products ahead of it are
// done, so that its own follow them at once.
struct NextStage {
    u32 descriptor; // of dY's part
    bool ready;

    FORGE_DEVICE NextStage(u32 stages, u32 full, const Ring<STAGES> &stage)
        : descriptor(warp_uniform(
              wgmma_descriptor<ATOM_BYTES>(stages + stage.index * STAGE_BYTES))),
          ready(barrier_test(full + 8 * stage.index, stage.parity)) {}
};

// Issues the products with a stage's tokens. FIRST: of the tile.
template <bool FIRST, int REGISTERS>
FORGE_DEVICE void multiply_stage(float (&acc)[HALVES][REGISTERS], const NextStage &next, u32 full,
                                 const Ring<STAGES> &stage) {
    if (!next.ready)
        barrier_wait(full + 8 * stage.index, stage.parity);
    // In units of 16 bytes. 16 tokens further: 2048 bytes; 64 rows of dW further: an atom.
    const u32 a = next.descriptor, b = a + STAGE_A / 16;
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
        wgmma<TILE_COLS, !FIRST>(acc[half], a + half * (ATOM_BYTES / 16), b);
#pragma unroll
    for (int k = 1; k < TILE_TOKENS / 16; ++k)
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
            wgmma<TILE_COLS, true>(acc[half], a + 128 * k + half * (ATOM_BYTES / 16), b + 128 * k);
    wgmma_commit();
}

// All tokens of a tile; returns with the last products in flight and their stage not yet released.
template <int REGISTERS>
FORGE_DEVICE void multiply(float (&acc)[HALVES][REGISTERS], u32 token_blocks, u32 stages, u32 full,
                           u32 empty, Ring<STAGES> &stage) {
    if (token_blocks == 0) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
#pragma unroll
            for (int i = 0; i < REGISTERS; ++i)
                acc[half][i] = 0.0f;
        return;
    }
    multiply_stage<true>(acc, NextStage(stages, full, stage), full, stage);
    u32 in_flight = stage.index;
    stage.advance();
    NextStage next(stages, full, stage);
#pragma unroll 1
    for (u32 block = 1; block < token_blocks; ++block) {
        multiply_stage<false>(acc, next, full, stage);
        const u32 previous = in_flight;
        in_flight = stage.index;
        stage.advance();
        next = NextStage(stages, full, stage);
        // All but the products just issued are done: their stage may be loaded again.
        wgmma_wait<1>();
        release(empty + 8 * previous);
    }
}

// Waits for the chunk of columns from COL on and of rows 0..7 (ROW8 0) or 8..15 of every 16, works
// on it in place, and hands it to the DMA warp. `acc`: of one m64 half.
template <int COL, u32 ROW8, int REGISTERS>
FORGE_DEVICE void one_chunk(const Params &p, const float (&acc)[REGISTERS], u32 half, bool finite,
                            bool &bad, bool counts, LaneTally &tally, u32 slots, u8 *slot_scales,
                            u32 full, u32 done, Ring<SLOTS> &ring, ChunkUpdate &update,
                            const Lane &lane) {
    const u32 row_in_tile = half * 64 + ROW8 * 8;
    float grads[1][CHUNK_COLS / 4];
    float (&grad)[CHUNK_COLS / 4] = grads[0];
#pragma unroll
    for (int j = 0; j < CHUNK_COLS / 8; ++j) {
        constexpr u32 FIRST = COL / 2 + 2 * ROW8;
        const u32 at = FIRST + 4 * j;
        grad[2 * j] = acc[at];
        grad[2 * j + 1] = acc[at + 1];
    }
    barrier_wait(full + 8 * ring.index, ring.parity);
    const u32 slot = slots + ring.index * SLOT_BYTES;
    if constexpr (array_spec(A_ACCUMULATOR).bytes > 0) {
#pragma unroll
        for (int j = 0; j < CHUNK_COLS / 8; ++j) {
            const u32 at = pair_at<4>(slot + update.first4, j) + array_offset(A_ACCUMULATOR);
            const float2 before = shared_load_f32x2(at);
            grad[2 * j] = __fadd_rn(before.x, grad[2 * j]);
            grad[2 * j + 1] = __fadd_rn(before.y, grad[2 * j + 1]);
            if constexpr (MODE == Mode::Accumulate)
                shared_store_f32x2(at, make_float2(grad[2 * j], grad[2 * j + 1]));
        }
        if constexpr (MODE != Mode::Accumulate) {
            // Here a warp's part of a chunk is what is left alone, since the rest of the buffer's
            // tile comes only when this chunk has gone.
            const bool wrong = tally.add(grads, update.step.grad_scale, counts);
            finite = !__any_sync(0xFFFFFFFFu, wrong);
            bad = bad || !finite;
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
            update.run(slot, grad, index, COL / 32 % 2 != 0, scales);
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
                          u32 done, Ring<SLOTS> &ring, const Lane &lane, LaneTally &tally) {
    const bool counts = lane.tile_row < p.rows;
    constexpr bool GUARDED = MODE != Mode::Accumulate;
    constexpr bool ADDS = array_spec(A_ACCUMULATOR).bytes > 0;
    bool bad = false;
    if constexpr (GUARDED && !ADDS)
        bad = named_barrier_any(OWN + consumer, 128, tally.add(acc, step.grad_scale, counts));
    const bool finite = !bad;
    if constexpr (STREAMS) {
        const u32 slots = shared_address(shared) + SLOTS_AT + consumer * SLOTS * SLOT_BYTES;
        u8 *slot_scales = shared + SCALES_AT + consumer * SLOTS * SLOT_SCALE_BYTES;
        ChunkUpdate update{step, keys, lane, p.draw_high};
        // One body for both m64 halves: unrolled over the whole tile, the code would outgrow the
        // instruction cache, which costs more than moving the second half's accumulators.
#pragma unroll 1
        for (u32 half = 0; half < HALVES; ++half) {
            for_constants<CHUNKS / HALVES>([&](auto constant) {
                constexpr int C = decltype(constant)::value;
                one_chunk<C % COL_CHUNKS * CHUNK_COLS, C / COL_CHUNKS>(
                    p, acc[0], half, finite, bad, counts, tally, slots, slot_scales, full, done,
                    ring, update, lane);
            });
#pragma unroll
            for (int i = 0; i < REGISTERS; ++i)
                acc[0][i] = acc[1][i];
        }
    }
    if constexpr (GUARDED && ADDS)
        bad = named_barrier_any(OWN + consumer, 128, bad);
    if (bad && counts && threadIdx.x % 128 == 0)
        ++reinterpret_cast<Tally *>(shared + TALLIES_AT)[consumer].nonfinite;
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
    u32 token_blocks = 0;
    for (u32 segment = 0; segment < p.n_segments; ++segment)
        token_blocks += p.token_blocks[segment];

    Ring<STAGES> stage;
    Ring<SLOTS> ring;
    LaneTally tally;
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

        const u32 thread = threadIdx.x % 128;
        const Lane lane{thread / 32, thread % 32 / 4, thread % 4, tile.m * TILE_ROWS,
                        tile.n * TILE_COLS};
        consume(p, step, keys, acc, consumer, shared, ring_full, ring_done, ring, lane, tally);
    }
    report(p, consumer, reinterpret_cast<Tally *>(shared + TALLIES_AT)[consumer], tally.sum);
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
            await_first_factors(p, full);
            stream_arrays(p, consumer,
                          shared_address(shared) + SLOTS_AT + consumer * SLOTS * SLOT_BYTES,
                          shared_address(shared) + SCALES_AT + consumer * SLOTS * SLOT_SCALE_BYTES,
                          rings + 16 * SLOTS * consumer, rings + 16 * SLOTS * consumer + 8 * SLOTS);
        }
    } else {
        registers_raise<240>();
        consumer_loop(p, shared, group, full, empty, rings + 16 * SLOTS * group,
                      rings + 16 * SLOTS * group + 8 * SLOTS);
    }
    // Nobody leaves while others still load into its memory or arrive on its barriers.
    if (CLUSTER > 1) {
        __syncwarp();
        cluster_sync();
    }
}
