// The producer warpgroup of the fused kernel: factors to the stages, weights and states to the
// slots and back.
#pragma once
#include "launch.cuh"

namespace forge {

// The whole warp walks along, so that the addresses are uniform; one lane issues.
FORGE_DEVICE void load_factors(const Params &p, u8 *shared, u32 full, u32 empty) {
    const bool leader = elect_one();
    const Walk walk(p);
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    constexpr int X_TOKENS = TILE_TOKENS / CLUSTER;
    Ring<STAGES> stage;
    for (u32 place = walk.first; place < walk.places; place += walk.step) {
        const TilePlace tile = walk.tile(p, place);
        const i32 row = tile.row, col = tile.col;
        // Others read the same factors, now and later; weights and states, which are read once,
        // must not push them out. What the last wave leaves behind is of no use to anybody.
        const bool last_wave = place - walk.first + walk.step >= walk.places;
        const u64 policy = last_wave ? L2_LET_GO : L2_KEEP;
        if (leader)
            fetch_factor_maps(p, tile);
        for (u32 segment = 0; segment < p.n_segments; ++segment) {
            const TensorMap *dy = dy_map(p, tile, segment);
            const TensorMap *x = x_map(p, tile, segment);
            const u32 blocks = p.token_blocks[segment];
#pragma unroll 1
            for (u32 block = 0; block < blocks; ++block) {
                barrier_wait(empty + 8 * stage.index, stage.parity ^ 1);
                const u32 barrier = full + 8 * stage.index;
                const u32 target = shared_address(shared) + stage.index * STAGE_BYTES;
                const i32 token = block * TILE_TOKENS;
                if (leader) {
                    barrier_arrive_expect(barrier,
                                          tile.narrow ? STAGE_A + ATOM_BYTES : STAGE_BYTES);
#pragma unroll
                    for (int i = 0; i < HALVES; ++i)
                        tma_load_2d(target + i * ATOM_BYTES, dy, barrier, row + 64 * i, token,
                                    policy);
#pragma unroll
                    for (int i = 0; i < TILE_COLS / 64; ++i) {
                        if (i > 0 && tile.narrow)
                            break;
                        const u32 at = target + STAGE_A + i * ATOM_BYTES + rank * X_TOKENS * 128;
                        const i32 feature = col + 64 * i, first = token + rank * X_TOKENS;
                        if constexpr (CLUSTER == 1)
                            tma_load_2d(at, x, barrier, feature, first, policy);
                        else
                            tma_load_2d_multicast(at, x, barrier, feature, first,
                                                  (1u << CLUSTER) - 1, policy);
                    }
                }
                stage.advance();
            }
        }
    }
}

// The part of chunk `chunk` of a tile that array ARRAY has. Coordinates: a map
// holds every second 8 rows, as groups of 8 (two-byte and one-byte arrays) or of 2 × 4 rows, the
// two 4 apart, which interleaves them in shared memory (four-byte arrays; see pair_offset).
template <int ARRAY, bool LOAD>
FORGE_DEVICE void move_chunk(const Params &p, u32 slot, u32 barrier, const TilePlace &tile,
                             u32 chunk) {
    constexpr ArraySpec SPEC = array_spec(ARRAY);
    if constexpr (LOAD ? SPEC.loads : SPEC.stores) {
        constexpr int COLS = box_cols(SPEC.bytes);
        // Order of chunks: m64 half, 8-row half, columns.
        const u32 half = chunk / (2 * COL_CHUNKS), row8 = chunk / COL_CHUNKS % 2;
        const i32 group = tile.row / 16 + half * 4;
        const TensorMap *map = array_map<ARRAY>(p, tile, row8);
#pragma unroll
        for (int i = 0; i < CHUNK_COLS / COLS; ++i) {
            const i32 c = tile.col + chunk % COL_CHUNKS * CHUNK_COLS + i * COLS;
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
FORGE_DEVICE void move_scales(const Params &p, u32 scales, u32 barrier, const TilePlace &tile,
                              u32 chunk) {
    if constexpr (is_q8(STATE_INDEX)) {
        const TensorMap *map = scale_map<STATE_INDEX>(p, tile, chunk / COL_CHUNKS % 2);
        const i32 group = tile.row / 16 + chunk / (2 * COL_CHUNKS) * 4;
        const i32 block = (tile.col + chunk % COL_CHUNKS * CHUNK_COLS) / 128;
        const u32 at = scales + STATE_INDEX * SCALE_BYTES;
        if constexpr (LOAD)
            tma_load_3d(at, map, barrier, 0, group, block);
        else
            tma_store_3d(map, at, 0, group, block);
    }
}

template <bool LOAD>
FORGE_DEVICE void move_arrays(const Params &p, u32 slot, u32 scales, u32 barrier,
                              const TilePlace &tile, u32 chunk) {
    if (LOAD)
        barrier_arrive_expect(barrier, SLOT_LOAD_BYTES);
    move_scales<0, LOAD>(p, scales, barrier, tile, chunk);
    move_scales<1, LOAD>(p, scales, barrier, tile, chunk);
    move_scales<2, LOAD>(p, scales, barrier, tile, chunk);
    move_chunk<0, LOAD>(p, slot, barrier, tile, chunk);
    move_chunk<1, LOAD>(p, slot, barrier, tile, chunk);
    move_chunk<2, LOAD>(p, slot, barrier, tile, chunk);
    move_chunk<3, LOAD>(p, slot, barrier, tile, chunk);
    move_chunk<4, LOAD>(p, slot, barrier, tile, chunk);
    move_chunk<5, LOAD>(p, slot, barrier, tile, chunk);
}

constexpr bool any_store() {
    bool any = false;
    for (int i = 0; i < N_ARRAYS; ++i)
        any = any || array_spec(i).stores;
    return any;
}

// To the next chunk of a tile, in the order of move_chunk; false after the last.
FORGE_DEVICE bool next_chunk(u32 &chunk, const TilePlace &tile) {
    ++chunk;
    if (NARROW && tile.narrow && chunk % COL_CHUNKS == NARROW_CHUNKS % COL_CHUNKS)
        chunk += COL_CHUNKS - NARROW_CHUNKS;
    return chunk < CHUNKS;
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
    TilePlace load_tile = walk.tile(p, first), store_tile = load_tile;
    if (leader)
        fetch_array_maps(p, load_tile);
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
                if (leader) {
                    move_arrays<false>(p, slot, slot_scales, 0, store_tile, store_chunk);
                    tma_commit();
                    tma_wait_read<0>();
                }
                __syncwarp();
            }
            if (!next_chunk(store_chunk, store_tile)) {
                store_chunk = 0;
                store_place += CONSUMERS * walk.step;
                if (store_place < walk.places)
                    store_tile = walk.tile(p, store_place);
            }
        }
        if (load_place < walk.places) {
            if (leader)
                move_arrays<true>(p, slot, slot_scales, full + 8 * ring.index, load_tile,
                                  load_chunk);
            if (!next_chunk(load_chunk, load_tile)) {
                load_chunk = 0;
                load_place += CONSUMERS * walk.step;
                if (load_place < walk.places) {
                    load_tile = walk.tile(p, load_place);
                    if (leader)
                        fetch_array_maps(p, load_tile);
                }
            }
        }
    }
}

} // namespace forge
