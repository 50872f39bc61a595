// The rule over a tile of an fp32 gradient, 64 × 128, by the threads of a block.
//
// It first looks at the whole tile's gradient; if an element, or its product with grad_scale, is
// not finite, no weight or state of the tile is touched. Then it goes through the tile in steps: a
// thread has 8 consecutive elements of a row, a run, in each. Loads are one or two steps ahead of
// their use.
#pragma once
#include "formats.cuh"
#include "philox.cuh"
#include "prelude.cuh"
#include "rules.cuh"
#include "shard.cuh"
#include "squares.cuh"

namespace forge {

// 1: runs of 8 are aligned and whole, and blocks of 32 global indices are four lanes' runs.
constexpr bool VECTOR = FORGE_VECTOR != 0;
constexpr int N_STATES = FORGE_N_STATES;
constexpr int STATE_FORMAT[3] = {FORGE_STATE0_FORMAT, FORGE_STATE1_FORMAT, FORGE_STATE2_FORMAT};
template <int K>
constexpr bool STATE_SIGNED = (K == 0   ? FORGE_STATE0_KIND
                               : K == 1 ? FORGE_STATE1_KIND
                                        : FORGE_STATE2_KIND) == 0;
enum : int { F32 = 0, BF16 = 1, Q8 = 2 };                      // state formats
enum : int { W_F32 = 0, W_BF16 = 1, W_MASTER = 2, W_LOW = 3 }; // weight formats
constexpr bool CODES = STATE_FORMAT[0] == Q8 || STATE_FORMAT[1] == Q8 || STATE_FORMAT[2] == Q8;
constexpr bool WEIGHT_DRAWS = FORGE_WEIGHT_FORMAT == W_BF16 && FORGE_WEIGHT_STOCHASTIC != 0;
using Form = CodedForm<FORGE_RULE, all_coded(N_STATES, STATE_FORMAT[0] == Q8, STATE_FORMAT[1] == Q8,
                                             STATE_FORMAT[2] == Q8)>;
template <int K>
constexpr bool STATE_DRAWS = K < N_STATES && FORGE_STATE_STOCHASTIC != 0 && STATE_FORMAT[K] != F32;

// Two steps share what can be shared. They are runs of one row, 32 columns apart: the same Philox
// calls draw for both. For q8, whose block of 128 columns is then a row of half a warp, they are
// runs of two rows.
constexpr int RUN = 8, STEPS = 2;
constexpr bool ONE_ROW = !CODES;
constexpr int LANES = TILE_COLS / RUN / (ONE_ROW ? STEPS : 1); // of a row
constexpr u32 APART = 32;                                      // columns

// A thread's run of 8 elements of one row.
struct Place {
    u64 at;     // of the first element in the shard's arrays
    u64 global; // its global index
    u64 scale;  // of its row's q8 block
    u32 count;  // elements that exist, from the first on
};

// --- runs in memory: 8 elements of 1, 2 or 4 bytes, as 32-bit words ---

template <int BYTES> struct alignas(BYTES == 1 ? 8 : 16) Run {
    static constexpr u32 PER_WORD = 4 / BYTES;
    u32 word[RUN / PER_WORD];
};

template <int BYTES> struct ElementOf {
    using Type = u8;
};
template <> struct ElementOf<2> {
    using Type = u16;
};
template <> struct ElementOf<4> {
    using Type = u32;
};

template <int BYTES> FORGE_DEVICE Run<BYTES> load_run(const void *data, const Place &place) {
    using Element = typename ElementOf<BYTES>::Type;
    Run<BYTES> run{};
    const Element *p = static_cast<const Element *>(data) + place.at;
    if constexpr (VECTOR) {
        if (place.count == 0)
            return run;
        if constexpr (BYTES == 1) {
            reinterpret_cast<uint2 *>(&run)[0] = __ldcs(reinterpret_cast<const uint2 *>(p));
        } else {
#pragma unroll
            for (int i = 0; i < BYTES / 2; ++i)
                reinterpret_cast<uint4 *>(&run)[i] = __ldcs(reinterpret_cast<const uint4 *>(p) + i);
        }
    } else {
        constexpr u32 PER_WORD = Run<BYTES>::PER_WORD;
#pragma unroll
        for (u32 i = 0; i < RUN; ++i)
            if (i < place.count)
                run.word[i / PER_WORD] |= static_cast<u32>(p[i]) << (8 * BYTES * (i % PER_WORD));
    }
    return run;
}

template <int BYTES>
FORGE_DEVICE void store_run(void *data, const Place &place, const Run<BYTES> &run) {
    using Element = typename ElementOf<BYTES>::Type;
    Element *p = static_cast<Element *>(data) + place.at;
    if constexpr (VECTOR) {
        if (place.count == 0)
            return;
        if constexpr (BYTES == 1) {
            __stcs(reinterpret_cast<uint2 *>(p), reinterpret_cast<const uint2 *>(&run)[0]);
        } else {
#pragma unroll
            for (int i = 0; i < BYTES / 2; ++i)
                __stcs(reinterpret_cast<uint4 *>(p) + i, reinterpret_cast<const uint4 *>(&run)[i]);
        }
    } else {
        constexpr u32 PER_WORD = Run<BYTES>::PER_WORD;
#pragma unroll
        for (u32 i = 0; i < RUN; ++i)
            if (i < place.count)
                p[i] = static_cast<Element>(run.word[i / PER_WORD] >> (8 * BYTES * (i % PER_WORD)));
    }
}

// fp32.
struct Values {
    float value[RUN];
};
FORGE_DEVICE Values values_of(const Run<4> &run) {
    Values out;
#pragma unroll
    for (int i = 0; i < RUN; ++i)
        out.value[i] = bits_to_float(run.word[i]);
    return out;
}
FORGE_DEVICE Run<4> run_of(const float *values) {
    Run<4> run;
#pragma unroll
    for (int i = 0; i < RUN; ++i)
        run.word[i] = float_to_bits(values[i]);
    return run;
}

// --- draws: 16 bits for each element of a run ---

struct RunDraws {
    u32 pair[RUN / 2]; // elements 2i and 2i + 1
    FORGE_DEVICE u32 operator[](int i) const { return (pair[i / 2] >> (16 * (i % 2))) & 0xFFFFu; }
};

// Of the 32 elements of four neighbouring lanes each lane makes one Philox call, which gives word j
// for lane j; the lanes then transpose the 4 × 4 words. All lanes of the warp take part. Words are
// those of the weight in the first of a call's two blocks: `draws` makes the others of them.
FORGE_DEVICE RunDraws shared_words(const StepScalars &step, u32 calls, u64 global) {
    const u32 q = threadIdx.x & 3u;
    const Draws d = call_words(step, calls, global / 64, q);
    u32 a = d.word[0], b = d.word[1], c = d.word[2], e = d.word[3];
    {
        const bool odd = q & 1u;
        const u32 x = __shfl_xor_sync(0xFFFFFFFFu, odd ? a : b, 1);
        const u32 y = __shfl_xor_sync(0xFFFFFFFFu, odd ? c : e, 1);
        a = odd ? x : a;
        b = odd ? b : x;
        c = odd ? y : c;
        e = odd ? e : y;
    }
    {
        const bool high = q & 2u;
        const u32 x = __shfl_xor_sync(0xFFFFFFFFu, high ? a : c, 2);
        const u32 y = __shfl_xor_sync(0xFFFFFFFFu, high ? b : e, 2);
        a = high ? x : a;
        c = high ? c : x;
        b = high ? y : b;
        e = high ? e : y;
    }
    return {{a, b, c, e}};
}

// The words of two steps' runs: of weight and first two states, and of the third.
struct Words {
    static constexpr bool SHARED = WEIGHT_DRAWS || STATE_DRAWS<0> || STATE_DRAWS<1>;
    RunDraws shared[STEPS]{}, third[STEPS]{};

    // All lanes of the warp take part.
    FORGE_DEVICE Words(const StepScalars &step, const Place (&places)[STEPS]) {
        if constexpr (VECTOR && SHARED)
            make(step, own_calls(Stream::Weight), places, shared);
        if constexpr (VECTOR && STATE_DRAWS<2>)
            make(step, own_calls(Stream::State2), places, third);
    }

  private:
    FORGE_DEVICE static void make(const StepScalars &step, u32 calls, const Place (&places)[STEPS],
                                  RunDraws (&words)[STEPS]) {
        words[0] = words[1] = shared_words(step, calls, places[0].global);
        // A row whose first block is the second of a call needs another for the next.
        const bool other = places[0].global / 64 != places[1].global / 64;
        if (!ONE_ROW || __any_sync(0xFFFFFFFFu, other))
            words[1] = shared_words(step, calls, places[1].global);
    }
};

template <Stream STREAM>
FORGE_DEVICE RunDraws draws(const StepScalars &step, const Words &words, int i,
                            const Place &place) {
    RunDraws out{};
    if constexpr (VECTOR) {
        const RunDraws &from = STREAM == Stream::State2 ? words.third[i] : words.shared[i];
        // Second is an odd block, and where both runs share a call, the second run.
        const bool second = place.global / 32 % 2 != 0;
#pragma unroll
        for (int j = 0; j < RUN / 2; ++j)
            out.pair[j] = stream_bits(STREAM, from.pair[j], second);
    } else {
#pragma unroll
        for (u32 j = 0; j < RUN; ++j)
            if (j < place.count)
                out.pair[j / 2] |= draw_one(step, STREAM, place.global + j) << (16 * (j % 2));
    }
    return out;
}

// Values to bf16, up or down by draws.
FORGE_DEVICE Run<2> narrow_stochastic(const float *x, const RunDraws &random) {
    Run<2> run;
    float magnitudes = 0.0f;
#pragma unroll
    for (int i = 0; i < RUN; ++i)
        magnitudes = __fadd_rn(magnitudes, fabsf(x[i]));
    const bool ordinary = formats::roundable(magnitudes);
#pragma unroll
    for (int j = 0; j < RUN / 2; ++j)
        run.word[j] = formats::narrow_bf16x2_stochastic(x[2 * j], x[2 * j + 1], random.pair[j], 1);
    if (__builtin_expect(!ordinary, 0)) {
#pragma unroll
        for (int j = 0; j < RUN / 2; ++j)
            run.word[j] = formats::narrow_bf16(x[2 * j], random[2 * j]) |
                          formats::narrow_bf16(x[2 * j + 1], random[2 * j + 1]) << 16;
    }
    return run;
}
FORGE_DEVICE Run<2> narrow_nearest(const float *x) {
    Run<2> run;
#pragma unroll
    for (int j = 0; j < RUN / 2; ++j)
        run.word[j] = narrow_bf16x2(x[2 * j], x[2 * j + 1]);
    return run;
}
FORGE_DEVICE Values widen(const Run<2> &run) {
    Values out;
#pragma unroll
    for (int j = 0; j < RUN / 2; ++j) {
        const float2 pair = formats::widen_bf16x2(run.word[j]);
        out.value[2 * j] = pair.x;
        out.value[2 * j + 1] = pair.y;
    }
    return out;
}

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
        const formats::Q8Block<STATE_SIGNED<K>, Form::USED> block(largest,
                                                                  Form::unit(step.constants, K));
        u32 codes[RUN];
#pragma unroll
        for (int j = 0; j < RUN; ++j)
            codes[j] = block.template encode<STATE_DRAWS<K>>(s[j], random[j]);
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

// The whole of `look`: the tile's partial, and whether it is to be left alone. `sums`: one double
// for each warp.
template <int THREADS>
FORGE_DEVICE bool judge(const Sight &sight, double *sums, TilePartial *partial) {
    const bool bad = __syncthreads_or(sight.bad);
    const double sum = block_sum<THREADS>(sight.squares, sums);
    if (threadIdx.x == 0 && partial != nullptr)
        *partial = {sum, bad ? 1u : 0u, 0u};
    return bad;
}

} // namespace forge
