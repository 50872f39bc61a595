// Philox4x32-7 (Salmon et al., SC 2011), the same numbers as src/philox.rs.
//
// One call gives 16 elements 16 bits each. Which: of every 64 consecutive elements of the global
// matrix, those that one lane of a quad holds in an mma accumulator, so that no lane draws for
// another: call 4·(index/64) + (index%8)/2, word (index%32)/8, half index%2. Elements 32..63 take
// the halves with their bytes exchanged.
#pragma once
#include "prelude.cuh"

namespace forge {

struct Draws {
    u32 word[4]; // word j: elements 8j + 2q and 8j + 2q + 1 of the block of 32
};

constexpr u32 PHILOX_ROUNDS = 7;

// The keys of all rounds. From a kernel's parameters they are operands that cost no register.
struct RoundKeys {
    u32 key[PHILOX_ROUNDS][2];
};

FORGE_DEVICE u32 second_key(u32 parameter, u32 round) { return parameter + round * 0xBB67AE85u; }

FORGE_DEVICE RoundKeys round_keys(const StepScalars &s) {
    RoundKeys keys;
#pragma unroll
    for (u32 round = 0; round < PHILOX_ROUNDS; ++round) {
        keys.key[round][0] = s.key[0] + round * 0x9E3779B9u;
        keys.key[round][1] = second_key(s.key[1], round);
    }
    return keys;
}

FORGE_DEVICE Draws philox4x32_7(u32 c0, u32 c1, u32 c2, u32 c3, const RoundKeys &keys) {
#pragma unroll
    for (u32 round = 0; round < PHILOX_ROUNDS; ++round) {
        const u64 p0 = static_cast<u64>(0xD2511F53u) * c0;
        const u64 p1 = static_cast<u64>(0xCD9E8D57u) * c2;
        c0 = static_cast<u32>(p1 >> 32) ^ c1 ^ keys.key[round][0];
        c1 = static_cast<u32>(p1);
        c2 = static_cast<u32>(p0 >> 32) ^ c3 ^ keys.key[round][1];
        c3 = static_cast<u32>(p0);
    }
    return {{c0, c1, c2, c3}};
}

// Weight and the first two states draw from one call: different sums of a word's bytes are on top,
// so that any two draws are independent in their upper 8 bits. The third state has calls of its
// own.
enum class Stream : u32 { Weight = 0, State0 = 1, State1 = 2, State2 = 3 };

// `second`: for elements 32..63.
FORGE_DEVICE u32 stream_bits(Stream stream, u32 word, bool second) {
    const u32 by8 = __byte_perm(word, 0, 0x2103), by16 = __byte_perm(word, 0, 0x1032);
    if (stream == Stream::State0)
        word ^= by8;
    if (stream == Stream::State1)
        word ^= by8 ^ by16;
    return second ? __byte_perm(word, 0, 0x2301) : word;
}
FORGE_DEVICE Draws stream_draws(Stream stream, Draws d, bool second) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
        d.word[j] = stream_bits(stream, d.word[j], second);
    return d;
}
FORGE_DEVICE u32 own_calls(Stream stream) { return stream == Stream::State2 ? 3u << 24 : 0u; }

// Of 64 elements: what the call of lane q of 0..3 gives. `calls`: whose (`own_calls`).
FORGE_DEVICE Draws call_words(const StepScalars &s, u32 calls, u64 both_blocks, u32 q) {
    const u64 call = both_blocks * 4 + q;
    const u32 high = (static_cast<u32>(call >> 32) & 0x00FFFFFFu) | calls;
    return philox4x32_7(static_cast<u32>(call), high, s.step, s.seed_high, round_keys(s));
}

// Of a block of 32 elements: the draws of lane q of 0..3.
FORGE_DEVICE Draws block_draws(const StepScalars &s, Stream stream, u64 block, u32 q) {
    return stream_draws(stream, call_words(s, own_calls(stream), block / 2, q), block % 2 != 0);
}

// The 16 bits of one element, at the price of a call each: for elements that share no block.
FORGE_DEVICE u32 draw_one(const StepScalars &s, Stream stream, u64 index) {
    const Draws d = block_draws(s, stream, index / 32, (static_cast<u32>(index) & 7u) / 2);
    const u32 j = (static_cast<u32>(index) & 31u) / 8;
    const u32 low = j & 1 ? d.word[1] : d.word[0];
    const u32 high = j & 1 ? d.word[3] : d.word[2];
    const u32 word = j & 2 ? high : low;
    return (word >> (16 * (static_cast<u32>(index) & 1u))) & 0xFFFFu;
}

} // namespace forge
