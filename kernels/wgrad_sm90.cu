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
        : descriptor(
              warp_uniform(wgmma_descriptor<ATOM_BYTES>(stages + stage.index * STAGE_BYTES))),
          ready(barrier_test(full + 8 * stage.index, stage.parity)) {}
};

// Issues the products with a stage's tokens. FIRST: of the tile.
template <int COLS, bool FIRST, int REGISTERS>
FORGE_DEVICE void multiply_stage(float (&acc)[HALVES][REGISTERS], const NextStage &next, u32 full,
                                 const Ring<STAGES> &stage) {
    if (!next.ready)
        barrier_wait(full + 8 * stage.index, stage.parity);
    // In units of 16 bytes. 16 tokens further: 2048 bytes; 64 rows of dW further: an atom.
    const u32 a = next.descriptor, b = a + STAGE_A / 16;
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
        wgmma<COLS, !FIRST>(acc[half], a + half * (ATOM_BYTES / 16), b);
#pragma unroll
    for (int k = 1; k < TILE_TOKENS / 16; ++k)
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
            wgmma<COLS, true>(acc[half], a + 128 * k + half * (ATOM_BYTES / 16), b + 128 * k);
    wgmma_commit();
}

// One of the warpgroups that take turns. Its tiles' products, and what becomes of them.
struct Consumer {
    const Params &p;
    const StepScalars &step;
    const RoundKeys &keys;
    u8 *shared;
    u32 number, token_blocks;
    // Barriers: of the stages, and of its own ring of slots.
    u32 full, empty, ring_full, ring_done;

    Ring<STAGES> stage{};
    Ring<SLOTS> ring{};
    LaneTally tally{};

    FORGE_DEVICE void run() {
        const Walk walk(p);
        // The mainloops take turns, so that waits on `full` never lag a whole round behind.
        if (number == CONSUMERS - 1)
            named_barrier_arrive(next_turn(), 256);
        stage.advance(number * token_blocks);
        for (u32 place = walk.first + number * walk.step; place < walk.places;
             place += CONSUMERS * walk.step) {
            const TilePlace tile = walk.tile(p, place);
            // Narrow tiles have code of their own: two products into the same registers would
            // not be pipelined.
            if (NARROW && tile.narrow) {
                if constexpr (NARROW)
                    work_on<NARROW_COLS>(tile);
            } else {
                work_on<TILE_COLS>(tile);
            }
            stage.advance((CONSUMERS - 1) * token_blocks); // those of the others' tiles
        }
        if constexpr (!GROUPED)
            report(p, number, own_tally(), tally.sum);
    }

  private:
    FORGE_DEVICE u32 next_turn() const { return TURN + (number + 1) % CONSUMERS; }
    FORGE_DEVICE Tally &own_tally() const {
        return reinterpret_cast<Tally *>(shared + TALLIES_AT)[number];
    }

    template <int COLS> FORGE_DEVICE void work_on(const TilePlace &tile) {
        float acc[HALVES][COLS / 2];
        named_barrier_sync(TURN + number, 256);
        if (token_blocks > 0) {
            multiply<COLS>(acc);
        } else {
            named_barrier_arrive(next_turn(), 256);
#pragma unroll
            for (int half = 0; half < HALVES; ++half)
#pragma unroll
                for (int i = 0; i < COLS / 2; ++i)
                    acc[half][i] = 0.0f;
        }
        consume<COLS>(acc, tile);
    }

    // All tokens of a tile of COLS columns.
    template <int COLS> FORGE_DEVICE void multiply(float (&acc)[HALVES][COLS / 2]) {
        const u32 stages = shared_address(shared);
        multiply_stage<COLS, true>(acc, NextStage(stages, full, stage), full, stage);
        u32 in_flight = stage.index;
        stage.advance();
        NextStage next(stages, full, stage);
#pragma unroll 1
        for (u32 block = 1; block < token_blocks; ++block) {
            multiply_stage<COLS, false>(acc, next, full, stage);
            const u32 previous = in_flight;
            in_flight = stage.index;
            stage.advance();
            next = NextStage(stages, full, stage);
            // All but the products just issued are done: their stage may be loaded again.
            wgmma_wait<1>();
            release(empty + 8 * previous);
        }
        // The next consumer's products queue up behind the last ones.
        named_barrier_arrive(next_turn(), 256);
        wgmma_wait<0>();
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
#pragma unroll
            for (int i = 0; i < COLS / 2; ++i)
                wgmma_pin(acc[half][i]);
        release(empty + 8 * in_flight);
    }

    // What becomes of the tile's registers, chunk by chunk.
    template <int COLS>
    FORGE_DEVICE void consume(float (&acc)[HALVES][COLS / 2], const TilePlace &tile) {
        const u32 thread = threadIdx.x % 128;
        const Lane lane{thread / 32, thread % 32 / 4, thread % 4, tile.row, tile.col};
        const bool counts = tile.row < p.rows;
        constexpr bool GUARDED = MODE != Mode::Accumulate;
        constexpr bool ADDS = array_spec(A_ACCUMULATOR).bytes > 0;
        bool bad = false;
        if constexpr (GUARDED && !ADDS)
            bad = named_barrier_any(OWN + number, 128, tally.add(acc, step.grad_scale, counts));
        const bool finite = !bad;
        if constexpr (STREAMS) {
            const RoundKeys &own_keys = keys_of(p, keys, tile);
            ChunkUpdate update{step, own_keys, lane, p.draw_high};
            // One body for both m64 halves: unrolled over the whole tile, the code would outgrow
            // the instruction cache, which costs more than moving the second half's accumulators.
#pragma unroll 1
            for (u32 half = 0; half < HALVES; ++half) {
                constexpr int ACROSS = COLS / CHUNK_COLS;
                for_constants<2 * ACROSS>([&](auto constant) {
                    constexpr int C = decltype(constant)::value;
                    bad = chunk<C % ACROSS * CHUNK_COLS, C / ACROSS>(acc[0], half, finite, counts,
                                                                     update) ||
                          bad;
                });
#pragma unroll
                for (int i = 0; i < COLS / 2; ++i)
                    acc[0][i] = acc[1][i];
            }
        }
        if constexpr (GUARDED && ADDS)
            bad = named_barrier_any(OWN + number, 128, bad);
        if constexpr (GROUPED) {
            tell<COLS>(p, tile, tally.sum, bad);
            tally.sum = 0.0;
        } else if (counts && thread == 0) {
            ++own_tally().tiles;
            own_tally().nonfinite += bad ? 1 : 0;
        }
    }

    // Waits for the chunk of columns from COL on and of rows 0..7 (ROW8 0) or 8..15 of every 16,
    // works on it in place, and hands it to the DMA warp. `acc`: of one m64 half. True if with a
    // buffer added it turned out not to be finite.
    template <int COL, u32 ROW8, int REGISTERS>
    FORGE_DEVICE bool chunk(const float (&acc)[REGISTERS], u32 half, bool finite, bool counts,
                            ChunkUpdate &update) {
        const Lane &lane = update.lane;
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
        bool bad = false;
        barrier_wait(ring_full + 8 * ring.index, ring.parity);
        const u32 slot = shared_address(shared) + SLOTS_AT +
                         (number * SLOTS + ring.index) * static_cast<u32>(SLOT_BYTES);
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
                // Here a warp's part of a chunk is what is left alone, since the rest of the
                // buffer's tile comes only when this chunk has gone.
                bad = __any_sync(0xFFFFFFFFu, tally.add(grads, step.grad_scale, counts));
            }
        }
        if constexpr (MODE == Mode::Update) {
            float *scales[3];
#pragma unroll
            for (int s = 0; s < 3; ++s) {
                u8 *at = shared + SCALES_AT + (number * SLOTS + ring.index) * SLOT_SCALE_BYTES +
                         s * SCALE_BYTES;
                scales[s] = reinterpret_cast<float *>(at) + lane.warp * 8 + lane.row;
            }
            const u32 row = lane.tile_row + row_in_tile + lane.warp * 16 + lane.row;
            const u64 index = p.first_index + row * p.global_cols + lane.tile_col + COL;
            if (finite && !bad)
                update.run(slot, grad, index, COL / 32 % 2 != 0, scales);
            else
                update.keep(slot);
        }
        fence_shared_for_tma();
        __syncwarp();
        if (threadIdx.x % 32 == 0)
            barrier_arrive(ring_done + 8 * ring.index);
        ring.advance();
        return bad;
    }
};

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
        registers_raise<240>();
        u32 token_blocks = 0;
        for (u32 segment = 0; segment < p.n_segments; ++segment)
            token_blocks += p.token_blocks[segment];
#if FORGE_DEVICE_STEP
        const Scalars &scalars = *reinterpret_cast<const Scalars *>(shared + SCALARS_AT);
        const StepScalars &step = scalars.step;
        const RoundKeys &keys = scalars.keys;
#else
        const StepScalars &step = p.step.value;
        const RoundKeys &keys = p.keys;
#endif
        const u32 own = rings + 16 * SLOTS * group;
        Consumer{p, step, keys, shared, group, token_blocks, full, empty, own, own + 8 * SLOTS}
            .run();
    }
    // Nobody leaves while others still load into its memory or arrive on its barriers.
    if (CLUSTER > 1) {
        __syncwarp();
        cluster_sync();
    }
}
