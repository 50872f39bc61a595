// The rule over a tile of an fp32 gradient, 64 × 128, by a block of 256 threads.
//
// It first looks at the whole tile's gradient; if an element, or
// its product with grad_scale, is not finite, no weight or state of the tile is touched. Then it
// goes through the tile 16 rows at a time: a thread has 8 consecutive elements, 16 lanes have a
// row, which is one q8 block. The loads of a pass are all in flight before its first use.
#pragma once
#include "formats.cuh"
#include "philox.cuh"
#include "prelude.cuh"
#include "rules.cuh"
#include "shard.cuh"

namespace forge {

constexpr int THREADS = 256, RUN = 8, LANES = TILE_COLS / RUN, PASS_ROWS = THREADS / LANES,
              PASSES = TILE_ROWS / PASS_ROWS;
static_assert(LANES == 16, "half a warp has a row");

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
constexpr bool WEIGHT_DRAWS = FORGE_WEIGHT_FORMAT == W_BF16 && FORGE_WEIGHT_STOCHASTIC != 0;
using Form = CodedForm<FORGE_RULE, all_coded(N_STATES, STATE_FORMAT[0] == Q8, STATE_FORMAT[1] == Q8,
                                             STATE_FORMAT[2] == Q8)>;
template <int K> constexpr bool STATE_DRAWS = FORGE_STATE_STOCHASTIC != 0 && STATE_FORMAT[K] != F32;

// Blocks that share an SM: three where the registers suffice, for more loads in flight.
constexpr bool FEW_REGISTERS = VECTOR && N_STATES < 3 && FORGE_STATE_STOCHASTIC == 0 &&
                               FORGE_STATE0_FORMAT != Q8 && FORGE_STATE1_FORMAT != Q8 &&
                               FORGE_STATE2_FORMAT != Q8;
constexpr int BLOCKS = FEW_REGISTERS ? 3 : 2;

// A thread's run of 8 elements of one row.
struct Place {
    u64 at;     // of the first element in the shard's arrays
    u64 global; // its global index
    u64 scale;  // of its row's q8 block
    u32 count;  // elements that exist, from the first on
};

// --- runs in memory: N elements of 1, 2 or 4 bytes ---

template <class T> struct alignas(sizeof(T) == 1 ? 8 : 16) Run {
    T value[RUN];
};

template <class T> FORGE_DEVICE Run<T> load_run(const void *data, const Place &place) {
    Run<T> run{};
    const T *p = static_cast<const T *>(data) + place.at;
    if constexpr (VECTOR) {
        if (place.count == 0)
            return run;
        if constexpr (sizeof(T) == 4) {
            reinterpret_cast<uint4 *>(&run)[0] = __ldcs(reinterpret_cast<const uint4 *>(p));
            reinterpret_cast<uint4 *>(&run)[1] = __ldcs(reinterpret_cast<const uint4 *>(p) + 1);
        } else if constexpr (sizeof(T) == 2) {
            reinterpret_cast<uint4 *>(&run)[0] = __ldcs(reinterpret_cast<const uint4 *>(p));
        } else {
            reinterpret_cast<uint2 *>(&run)[0] = __ldcs(reinterpret_cast<const uint2 *>(p));
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < RUN; ++i)
            if (i < place.count)
                run.value[i] = p[i];
    }
    return run;
}

template <class T> FORGE_DEVICE void store_run(void *data, const Place &place, const Run<T> &run) {
    T *p = static_cast<T *>(data) + place.at;
    if constexpr (VECTOR) {
        if (place.count == 0)
            return;
        if constexpr (sizeof(T) == 4) {
            __stcs(reinterpret_cast<uint4 *>(p), reinterpret_cast<const uint4 *>(&run)[0]);
            __stcs(reinterpret_cast<uint4 *>(p) + 1, reinterpret_cast<const uint4 *>(&run)[1]);
        } else if constexpr (sizeof(T) == 2) {
            __stcs(reinterpret_cast<uint4 *>(p), reinterpret_cast<const uint4 *>(&run)[0]);
        } else {
            __stcs(reinterpret_cast<uint2 *>(p), reinterpret_cast<const uint2 *>(&run)[0]);
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < RUN; ++i)
            if (i < place.count)
                p[i] = run.value[i];
    }
}

// --- draws: 16 bits for each element of the run ---

struct RunDraws {
    u32 pair[RUN / 2]; // elements 2i and 2i + 1
    FORGE_DEVICE u32 operator[](int i) const { return (pair[i / 2] >> (16 * (i % 2))) & 0xFFFFu; }
};

// Of the 32 elements of four neighbouring lanes each lane makes one Philox call, which gives word j
// for lane j; the lanes then transpose the 4 × 4 words. All lanes of the warp take part.
FORGE_DEVICE RunDraws shared_draws(const StepScalars &step, Stream stream, u64 global) {
    const u32 q = threadIdx.x & 3u;
    const Draws d = block_draws(step, stream, global / 32, q);
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

FORGE_DEVICE RunDraws draws(const StepScalars &step, Stream stream, const Place &place) {
    if constexpr (VECTOR)
        return shared_draws(step, stream, place.global);
    RunDraws out{};
#pragma unroll
    for (u32 i = 0; i < RUN; ++i)
        if (i < place.count)
            out.pair[i / 2] |= draw_one(step, stream, place.global + i) << (16 * (i % 2));
    return out;
}

// --- weights ---

// What a run of weights has in memory; unused parts take no registers.
struct WeightRun {
    Run<float> full;
    Run<u16> upper, lower;
};

FORGE_DEVICE WeightRun load_weight(const ShardArrays &arrays, const Place &place) {
    WeightRun run;
    if constexpr (FORGE_WEIGHT_FORMAT == W_F32)
        run.full = load_run<float>(arrays.weight, place);
    if constexpr (FORGE_WEIGHT_FORMAT == W_MASTER)
        run.full = load_run<float>(arrays.extra, place);
    if constexpr (FORGE_WEIGHT_FORMAT == W_BF16 || FORGE_WEIGHT_FORMAT == W_LOW)
        run.upper = load_run<u16>(arrays.weight, place);
    if constexpr (FORGE_WEIGHT_FORMAT == W_LOW)
        run.lower = load_run<u16>(arrays.extra, place);
    return run;
}

FORGE_DEVICE float weight_value(const WeightRun &run, int i) {
    if constexpr (FORGE_WEIGHT_FORMAT == W_BF16)
        return formats::widen_bf16(run.upper.value[i]);
    if constexpr (FORGE_WEIGHT_FORMAT == W_LOW)
        return formats::join_halves(run.upper.value[i], run.lower.value[i]);
    return run.full.value[i];
}

FORGE_DEVICE void store_weight(const ShardArrays &arrays, const Place &place, const float *w,
                               const StepScalars &step) {
    Run<float> full;
    Run<u16> upper, lower;
    RunDraws random{};
    if constexpr (WEIGHT_DRAWS)
        random = draws(step, Stream::Weight, place);
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
        full.value[i] = w[i];
        if constexpr (WEIGHT_DRAWS) {
            upper.value[i] = static_cast<u16>(formats::narrow_bf16(w[i], random[i]));
        } else if constexpr (FORGE_WEIGHT_FORMAT == W_LOW) {
            upper.value[i] = static_cast<u16>(formats::upper_half(w[i]));
            lower.value[i] = static_cast<u16>(formats::lower_half(w[i]));
        } else {
            upper.value[i] = static_cast<u16>(formats::narrow_bf16(w[i]));
        }
    }
    if constexpr (FORGE_WEIGHT_FORMAT == W_F32)
        store_run(arrays.weight, place, full);
    if constexpr (FORGE_WEIGHT_FORMAT != W_F32)
        store_run(arrays.weight, place, upper);
    if constexpr (FORGE_WEIGHT_FORMAT == W_MASTER)
        store_run(arrays.extra, place, full);
    if constexpr (FORGE_WEIGHT_FORMAT == W_LOW)
        store_run(arrays.extra, place, lower);
}

// --- states ---

struct StateRun {
    Run<float> full;
    Run<u16> half;
    Run<u8> codes;
    float scale;
};

template <int K> FORGE_DEVICE StateRun load_state(const ShardArrays &arrays, const Place &place) {
    StateRun run;
    if constexpr (STATE_FORMAT[K] == F32)
        run.full = load_run<float>(arrays.states[K], place);
    if constexpr (STATE_FORMAT[K] == BF16)
        run.half = load_run<u16>(arrays.states[K], place);
    if constexpr (STATE_FORMAT[K] == Q8) {
        run.codes = load_run<u8>(arrays.states[K], place);
        run.scale = place.count > 0 ? arrays.scales[K][place.scale] : 0.0f;
    }
    return run;
}

// `worth`: of a level, where the state is stored as codes.
template <int K> FORGE_DEVICE float state_value(const StateRun &run, int i, float worth) {
    if constexpr (STATE_FORMAT[K] == BF16)
        return formats::widen_bf16(run.half.value[i]);
    if constexpr (STATE_FORMAT[K] == Q8)
        return q8_decode<STATE_SIGNED<K>, Form::USED>(BYTE_MAGIC | run.codes.value[i], worth);
    return run.full.value[i];
}

template <int K>
FORGE_DEVICE void store_state(const ShardArrays &arrays, const Place &place, const float *s,
                              const StepScalars &step) {
    RunDraws random{};
    if constexpr (STATE_DRAWS<K>)
        random = draws(step, static_cast<Stream>(static_cast<u32>(Stream::State0) + K), place);
    if constexpr (STATE_FORMAT[K] == F32) {
        Run<float> run;
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            run.value[i] = s[i];
        store_run(arrays.states[K], place, run);
    } else if constexpr (STATE_FORMAT[K] == BF16) {
        Run<u16> run;
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            run.value[i] = static_cast<u16>(STATE_DRAWS<K> ? formats::narrow_bf16(s[i], random[i])
                                                           : formats::narrow_bf16(s[i]));
        store_run(arrays.states[K], place, run);
    } else {
        float largest = 0.0f;
#pragma unroll
        for (u32 i = 0; i < RUN; ++i)
            if (i < place.count)
                largest = fmaxf(largest, fabsf(s[i]));
#pragma unroll
        for (int distance = LANES / 2; distance > 0; distance /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
        const formats::Q8Block<STATE_SIGNED<K>, Form::USED> block(largest,
                                                                  Form::unit(step.constants, K));
        Run<u8> run;
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            run.value[i] = static_cast<u8>(block.template encode<STATE_DRAWS<K>>(s[i], random[i]));
        store_run(arrays.states[K], place, run);
        if (threadIdx.x % LANES == 0 && place.count > 0)
            arrays.scales[K][place.scale] = block.scale;
    }
}

// --- the tile ---

struct Memory {
    WeightRun weight;
    StateRun states[N_STATES > 0 ? N_STATES : 1];
};

FORGE_DEVICE Memory load(const ShardArrays &arrays, const Place &place) {
    Memory memory;
    memory.weight = load_weight(arrays, place);
    if constexpr (N_STATES > 0)
        memory.states[0] = load_state<0>(arrays, place);
    if constexpr (N_STATES > 1)
        memory.states[1] = load_state<1>(arrays, place);
    if constexpr (N_STATES > 2)
        memory.states[2] = load_state<2>(arrays, place);
    return memory;
}

template <int K> FORGE_DEVICE float level_worth(const Memory &memory, const StepScalars &step) {
    if constexpr (K < N_STATES && STATE_FORMAT[K] == Q8)
        return q8_decode_factor<STATE_SIGNED<K>>(memory.states[K].scale,
                                                 Form::factor(step.constants, K));
    return 0.0f;
}

FORGE_DEVICE void update(const ShardArrays &arrays, const Place &place, const Memory &memory,
                         const float *g, const StepScalars &step) {
    float w[RUN], states[3][RUN];
    const float worth[3] = {level_worth<0>(memory, step), level_worth<1>(memory, step),
                            level_worth<2>(memory, step)};
#pragma unroll
    for (int i = 0; i < RUN; ++i) {
        float s[3] = {0.0f, 0.0f, 0.0f};
        w[i] = weight_value(memory.weight, i);
        if constexpr (N_STATES > 0)
            s[0] = state_value<0>(memory.states[0], i, worth[0]);
        if constexpr (N_STATES > 1)
            s[1] = state_value<1>(memory.states[1], i, worth[1]);
        if constexpr (N_STATES > 2)
            s[2] = state_value<2>(memory.states[2], i, worth[2]);
        Form::update(step.constants, g[i], step.grad_scale, w[i], s, worth);
#pragma unroll
        for (int k = 0; k < N_STATES; ++k)
            states[k][i] = s[k];
    }
    store_weight(arrays, place, w, step);
    if constexpr (N_STATES > 0)
        store_state<0>(arrays, place, states[0], step);
    if constexpr (N_STATES > 1)
        store_state<1>(arrays, place, states[1], step);
    if constexpr (N_STATES > 2)
        store_state<2>(arrays, place, states[2], step);
}

// Which elements of a shard a thread has: `col` of its run, in every pass the row that
// `row_in_pass` says.
struct Tile {
    u64 row, col; // of the tile's first row and of the thread's run, in the region
    u32 row_in_pass, width;

    FORGE_DEVICE Tile(const Region &region, u64 tile_row, u64 tile_col)
        : row(tile_row), col(tile_col + threadIdx.x % LANES * RUN),
          row_in_pass(threadIdx.x / LANES),
          width(col < region.cols ? static_cast<u32>(min(region.cols - col, static_cast<u64>(RUN)))
                                  : 0u) {}

    FORGE_DEVICE u64 row_of(int pass) const {
        return row + static_cast<u64>(pass) * PASS_ROWS + row_in_pass;
    }
    FORGE_DEVICE Place place(const Shard &shard, const Region &region, int pass) const {
        const u64 shard_row = region.row + row_of(pass), shard_col = region.col + col;
        return {shard.at(shard_row, shard_col), shard.global(shard_row, shard_col),
                shard.scale_at(shard_row, shard_col), row_of(pass) < region.rows ? width : 0u};
    }
};

// The rule over a tile, unless its gradient is not finite: then it is left alone. `look(pass)`: the
// thread's run of the gradient, zeros where there is none, for the first time, and `take(pass)` for
// the second. `sums`: one double for each warp. `partial`: what the tile tells of itself, or null.
template <class Look, class Take>
FORGE_DEVICE void apply_rule(const ShardArrays &arrays, const Shard &shard, const Region &region,
                             const Tile &tile, const StepScalars &step, double *sums,
                             TilePartial *partial, Look &&look, Take &&take) {
    // The first pass's arrays are on their way while the gradient is looked at.
    Memory memory = load(arrays, tile.place(shard, region, 0));
    double squares = 0.0;
    bool finite = true;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const Run<float> run = look(pass);
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            squares += static_cast<double>(run.value[i]) * static_cast<double>(run.value[i]);
            finite = finite && is_finite(__fmul_rn(run.value[i], step.grad_scale));
        }
    }
    const bool skip = __syncthreads_or(!finite);
    const double sum = block_sum<THREADS>(squares, sums);
    // At once: kept until the end it would cost registers.
    if (threadIdx.x == 0 && partial != nullptr)
        *partial = {sum, skip ? 1u : 0u, 0u};
    if (skip)
        return;
#pragma unroll 1
    for (int pass = 0; pass < PASSES; ++pass) {
        const Memory current = memory;
        if (pass + 1 < PASSES)
            memory = load(arrays, tile.place(shard, region, pass + 1));
        const Run<float> g = take(pass);
        update(arrays, tile.place(shard, region, pass), current, g.value, step);
    }
}

} // namespace forge
