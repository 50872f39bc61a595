// The rule over a tile of an fp32 gradient, 64 × 128, by the threads of a block.
//
// It first looks at the whole tile's gradient; if an element, or its product with grad_scale, is
// not finite, no weight or state of the tile is touched. Then it goes through the tile in steps: a
// thread has 8 consecutive elements of a row, a run, in each. Loads are one or two steps ahead of
// their use.
#pragma once
#include "run_draws.cuh"
#include "squares.cuh"

namespace forge {

// --- weights ---

// What a run of weights has in memory; unused parts take no registers.
struct WeightRun {
    Run<4> full;
    Run<2> upper, lower;
};

FORGE_DEVICE WeightRun load_weight(const ShardArrays &arrays, const Place &place) {
    WeightRun run;
    if constexpr (FORGE_WEIGHT_FORMAT == W_F32)
        run.full = load_run<4>(arrays.weight, place);
    if constexpr (FORGE_WEIGHT_FORMAT == W_MASTER)
        run.full = load_run<4>(arrays.extra, place);
    if constexpr (FORGE_WEIGHT_FORMAT == W_BF16 || FORGE_WEIGHT_FORMAT == W_LOW)
        run.upper = load_run<2>(arrays.weight, place);
    if constexpr (FORGE_WEIGHT_FORMAT == W_LOW)
        run.lower = load_run<2>(arrays.extra, place);
    return run;
}

FORGE_DEVICE Values weight_values(const WeightRun &run) {
    if constexpr (FORGE_WEIGHT_FORMAT == W_BF16)
        return widen(run.upper);
    if constexpr (FORGE_WEIGHT_FORMAT == W_LOW) {
        Values out;
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            out.value[i] = formats::join_halves(
                __byte_perm(run.lower.word[i / 2], run.upper.word[i / 2], i % 2 ? 0x7632 : 0x5410));
        return out;
    }
    return values_of(run.full);
}

FORGE_DEVICE void store_weight(const ShardArrays &arrays, const Place &place, const float *w,
                               const StepScalars &step, const Words &words, int i) {
    if constexpr (FORGE_WEIGHT_FORMAT == W_F32) {
        store_run(arrays.weight, place, run_of(w));
    } else if constexpr (WEIGHT_DRAWS) {
        store_run(arrays.weight, place,
                  narrow_stochastic(w, draws<Stream::Weight>(step, words, i, place)));
    } else if constexpr (FORGE_WEIGHT_FORMAT == W_LOW) {
        Run<2> upper, lower;
#pragma unroll
        for (int j = 0; j < RUN / 2; ++j) {
            const u32 x = float_to_bits(w[2 * j]), y = float_to_bits(w[2 * j + 1]);
            upper.word[j] = formats::upper_halves(x, y);
            lower.word[j] = __byte_perm(x, y, 0x5410);
        }
        store_run(arrays.weight, place, upper);
        store_run(arrays.extra, place, lower);
    } else {
        store_run(arrays.weight, place, narrow_nearest(w));
        if constexpr (FORGE_WEIGHT_FORMAT == W_MASTER)
            store_run(arrays.extra, place, run_of(w));
    }
}

// --- states ---

struct StateRun {
    Run<4> full;
    Run<2> half;
    Run<1> codes;
    float scale;
};

template <int K> FORGE_DEVICE StateRun load_state(const ShardArrays &arrays, const Place &place) {
    StateRun run;
    if constexpr (STATE_FORMAT[K] == F32)
        run.full = load_run<4>(arrays.states[K], place);
    if constexpr (STATE_FORMAT[K] == BF16)
        run.half = load_run<2>(arrays.states[K], place);
    if constexpr (STATE_FORMAT[K] == Q8) {
        run.codes = load_run<1>(arrays.states[K], place);
        run.scale = place.count > 0 ? arrays.scales[K][place.scale] : 0.0f;
    }
    return run;
}

// `worth`: of a level, where the state is stored as codes.
template <int K> FORGE_DEVICE Values state_values(const StateRun &run, float worth) {
    if constexpr (STATE_FORMAT[K] == BF16)
        return widen(run.half);
    if constexpr (STATE_FORMAT[K] == Q8) {
        Values out;
#pragma unroll
        for (u32 i = 0; i < RUN; ++i)
            out.value[i] = q8_decode<STATE_SIGNED<K>, Form::USED>(
                __byte_perm(run.codes.word[i / 4], BYTE_MAGIC, 0x7440 + i % 4), worth);
        return out;
    }
    return values_of(run.full);
}

template <int K>
FORGE_DEVICE void store_state(const ShardArrays &arrays, const Place &place, const float *s,
                              const StepScalars &step, const Words &words, int i) {
    constexpr Stream STREAM = static_cast<Stream>(static_cast<u32>(Stream::State0) + K);
    RunDraws random{};
    if constexpr (STATE_DRAWS<K>)
        random = draws<STREAM>(step, words, i, place);
    if constexpr (STATE_FORMAT[K] == F32) {
        store_run(arrays.states[K], place, run_of(s));
    } else if constexpr (STATE_FORMAT[K] == BF16) {
        if constexpr (STATE_DRAWS<K>)
            store_run(arrays.states[K], place, narrow_stochastic(s, random));
        else
            store_run(arrays.states[K], place, narrow_nearest(s));
    } else {
        float largest = 0.0f;
#pragma unroll
        for (u32 j = 0; j < RUN; ++j)
            if (VECTOR || j < place.count)
                largest = fmaxf(largest, fabsf(s[j]));
        if (VECTOR && place.count == 0)
            largest = 0.0f;
#pragma unroll
        for (int distance = LANES / 2; distance > 0; distance /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
        const formats::Q8Block<STATE_SIGNED<K>, Form::USED, STATE_DRAWS<K>> block(
            largest, Form::unit(step.constants, K));
        u32 codes[RUN];
#pragma unroll
        for (int j = 0; j < RUN; ++j)
            codes[j] = block.encode(s[j], random[j]);
        Run<1> run;
#pragma unroll
        for (int j = 0; j < RUN; j += 4)
            run.word[j / 4] = __byte_perm(__byte_perm(codes[j], codes[j + 1], 0x0040),
                                          __byte_perm(codes[j + 2], codes[j + 3], 0x0040), 0x5410);
        store_run(arrays.states[K], place, run);
        if (threadIdx.x % LANES == 0 && place.count > 0)
            arrays.scales[K][place.scale] = block.scale;
    }
}

// --- a step ---

struct Memory {
    WeightRun weight;
    StateRun states[N_STATES > 0 ? N_STATES : 1];
};

FORGE_DEVICE Memory load(const ShardArrays &arrays, const Place &place) {
    Memory memory;
    memory.weight = load_weight(arrays, place);
    for_constants<N_STATES>([&](auto constant) {
        constexpr int K = decltype(constant)::value;
        memory.states[K] = load_state<K>(arrays, place);
    });
    return memory;
}

template <int K> FORGE_DEVICE float level_worth(const Memory &memory, const StepScalars &step) {
    if constexpr (K < N_STATES && STATE_FORMAT[K] == Q8)
        return q8_decode_factor<STATE_SIGNED<K>>(memory.states[K].scale,
                                                 Form::factor(step.constants, K));
    return 0.0f;
}

FORGE_DEVICE void update(const ShardArrays &arrays, const Place &place, const Memory &memory,
                         const Values &g, const StepScalars &step, const Words &words, int i) {
    const float worth[3] = {level_worth<0>(memory, step), level_worth<1>(memory, step),
                            level_worth<2>(memory, step)};
    Values w = weight_values(memory.weight), states[3]{};
    for_constants<N_STATES>([&](auto constant) {
        constexpr int K = decltype(constant)::value;
        states[K] = state_values<K>(memory.states[K], worth[K]);
    });
#pragma unroll
    for (int j = 0; j < RUN; ++j) {
        float s[3] = {states[0].value[j], states[1].value[j], states[2].value[j]};
        Form::update(step.constants, g.value[j], step.grad_scale, w.value[j], s, worth);
#pragma unroll
        for (int k = 0; k < N_STATES; ++k)
            states[k].value[j] = s[k];
    }
    store_weight(arrays, place, w.value, step, words, i);
    for_constants<N_STATES>([&](auto constant) {
        constexpr int K = decltype(constant)::value;
        store_state<K>(arrays, place, states[K].value, step, words, i);
    });
}

// --- the tile ---

// Which elements of a region a thread of a block of THREADS has in a tile: two runs in every
// BOTH_ROWS rows.
template <int THREADS> struct Tile {
    static constexpr u32 PASS_ROWS = THREADS / LANES;
    static constexpr u32 BOTH_ROWS = PASS_ROWS * (ONE_ROW ? 1 : STEPS);
    static_assert(TILE_ROWS % BOTH_ROWS == 0, "passes of whole rows");

    const Shard &shard;
    Region region;
    u64 row;         // of the tile's first row, in the region
    u32 row_in_pass; // in the tile, in its first pass
    u32 col_in_tile; // of the first step's run
    u64 col;         // the same, in the region
    u32 width[STEPS];

    FORGE_DEVICE Tile(const Shard &of, const Region &within, u64 tile_row, u64 tile_col)
        : shard(of), region(within), row(tile_row), row_in_pass(threadIdx.x / LANES),
          // Four lanes' runs are side by side; the next four leave room for the second step's.
          col_in_tile(threadIdx.x % LANES / 4 * (ONE_ROW ? STEPS * APART : APART) +
                      threadIdx.x % 4 * RUN),
          col(tile_col + col_in_tile) {
#pragma unroll
        for (u32 i = 0; i < STEPS; ++i) {
            const u64 first = col + (ONE_ROW ? i * APART : 0);
            width[i] = first < region.cols
                           ? static_cast<u32>(min(region.cols - first, static_cast<u64>(RUN)))
                           : 0u;
        }
    }

    // In the tile, of step `i` of two, `pass` times BOTH_ROWS below its first.
    FORGE_DEVICE u32 row_of(u32 pass, u32 i) const {
        return pass * BOTH_ROWS + (ONE_ROW ? 0 : i * PASS_ROWS) + row_in_pass;
    }
    FORGE_DEVICE static u32 col_of(u32 i) { return ONE_ROW ? i * APART : 0; }

    FORGE_DEVICE Place place(u32 pass, u32 i) const {
        const u64 in_region = row + row_of(pass, i);
        const u64 shard_row = region.row + in_region, shard_col = region.col + col + col_of(i);
        return {shard.at(shard_row, shard_col), shard.global(shard_row, shard_col),
                shard.scale_at(shard_row, shard_col), in_region < region.rows ? width[i] : 0u};
    }
};

// The rule over `passes` times BOTH_ROWS of a tile, but for those that `skip(pass)`; it is the same
// for all threads. `take(pass, i)`: the thread's run of the gradient. Loads are AHEAD steps ahead.
template <int AHEAD, int THREADS, class Skip, class Take>
FORGE_DEVICE void rewrite(const ShardArrays &arrays, const Tile<THREADS> &tile,
                          const StepScalars &step, u32 passes, Skip &&skip, Take &&take) {
    static_assert(AHEAD == 1 || AHEAD == STEPS, "places of a step ahead");
    Memory memory[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        memory[i] = load(arrays, tile.place(0, i));
#pragma unroll 1
    for (u32 pass = 0; pass < passes; ++pass) {
        const bool left_alone = skip(pass);
        Place places[STEPS];
#pragma unroll
        for (u32 i = 0; i < STEPS; ++i)
            places[i] = tile.place(pass, i);
        const Words words(step, places);
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const Memory current = memory[i % AHEAD];
            if (i + AHEAD < STEPS)
                memory[i % AHEAD] = load(arrays, places[(i + AHEAD) % STEPS]);
            else if (pass + 1 < passes)
                memory[i % AHEAD] = load(arrays, tile.place(pass + 1, (i + AHEAD) % STEPS));
            if (!left_alone)
                update(arrays, places[i], current, take(pass, i), step, words, i);
        }
    }
}

// What a block has seen of a tile: its partial (null: not wanted), and whether it is to be left
// alone. `sums`: one double for each warp.
template <int THREADS>
FORGE_DEVICE bool judge(const Sight &sight, double *sums, TilePartial *partial) {
    const bool bad = __syncthreads_or(sight.bad);
    const double sum = block_sum<THREADS>(sight.squares, sums);
    if (threadIdx.x == 0 && partial != nullptr)
        *partial = {sum, bad ? 1u : 0u, 0u};
    return bad;
}

} // namespace forge
