// A scheme's layout for element-wise work: runs of 8 elements of a row, as threads load, keep and
// store them.
#pragma once
#include "formats.cuh"
#include "rules.cuh"
#include "shard.cuh"

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

} // namespace forge
