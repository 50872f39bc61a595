// 16 random bits for each element of a run, and values rounded by them.
#pragma once
#include "philox.cuh"
#include "runs.cuh"

namespace forge {

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
    for (int j = 0; j < RUN / 2; ++j) {
        // The instruction has a NaN of its own; exact fp32 keeps the CPU's.
        run.word[j] = EXACT ? formats::narrow_bf16(x[2 * j]) | formats::narrow_bf16(x[2 * j + 1])
                                                                   << 16
                            : narrow_bf16x2(x[2 * j], x[2 * j + 1]);
    }
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

} // namespace forge
