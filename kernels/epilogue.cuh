// What happens to a warpgroup's tile of dW in registers: the rule over its weights and states,
// which stream through shared memory chunk by chunk.
#pragma once
#include "arrays.cuh"
#include "formats.cuh"
#include "philox.cuh"
#include "ptx.cuh"
#include "q8.cuh"
#include "rules.cuh"

namespace forge {

struct Q8Row {
    float decode;  // of the stored codes: q8_decode_factor
    float encode;  // of the new ones: q8_encode_factor
    float largest; // of the new values: |m|, or sqrt(v)
};

FORGE_DEVICE float quad_maximum(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

// --- the tile ---

using Form = CodedForm<FORGE_RULE, all_coded(N_STATES, is_q8(0), is_q8(1), is_q8(2))>;

// A lane's place in the tile and what it needs of the launch.
struct Lane {
    u32 warp;     // 0..3 in the warpgroup
    u32 row;      // lane/4: of 8
    u32 q;        // lane%4: which pair of 8 columns
    u32 tile_row; // of W here
    u32 tile_col;
};

// The rule over one chunk of a lane's row: CHUNK_COLS columns, a pair of every eight. Reads the
// arrays from a slot and writes them back to it.
struct ChunkUpdate {
    const StepScalars &step;
    const RoundKeys &keys;
    const Lane &lane;
    u32 draw_high; // upper word of all calls' counters

    // Pairs that move together between registers and two-byte arrays. Four need registers side by
    // side, which wide tiles have for one array, not for three.
    static constexpr int MATRICES = FORGE_TILE_COLS > 128 && array_spec(A_STATE0).bytes == 2 ? 1
                                                                                             : 4;

    // Addresses of what the lane moves first, were the slot at 0.
    u32 first4 = pair_offset<4>(lane.warp, lane.row, lane.q);
    u32 first1 = pair_offset<1>(lane.warp, lane.row, lane.q);
    u32 first2 = MATRICES == 1 ? pair_offset<2>(lane.warp, lane.row, lane.q)
                               : matrix_offset(lane.warp, 4 * lane.row + lane.q);

    // Pairs that are worked on together: more hide latency, fewer leave registers to what else a
    // wide tile or q8 needs.
    static constexpr int TOGETHER =
        (FORGE_TILE_COLS > 128 && (FORGE_STATE_STOCHASTIC || MATRICES == 4)) ||
                (any_q8() && FORGE_STATE_STOCHASTIC && N_STATES > 2)
            ? 2
            : 4;

    // Of some of a lane's pairs what two-byte arrays hold, before and after.
    struct Packed {
        u32 arrays[A_ACCUMULATOR][MATRICES];
    };

    // The two-byte arrays that come (LOAD) or go. From pair j on.
    template <bool LOAD> FORGE_DEVICE void move_packed(u32 slot, int j, Packed &packed) const {
        const u32 at = pair_at<2>(slot + first2, j);
        for_constants<A_ACCUMULATOR>([&](auto constant) {
            constexpr int A = decltype(constant)::value;
            constexpr ArraySpec SPEC = array_spec(A);
            if constexpr (SPEC.bytes == 2 && (LOAD ? SPEC.loads : SPEC.stores)) {
                if constexpr (LOAD)
                    pairs_load(at + array_offset(A), packed.arrays[A]);
                else
                    pairs_store(at + array_offset(A), packed.arrays[A]);
            }
        });
    }

    // Pair j of the chunk. `packed`: of the pairs that move with it.
    FORGE_DEVICE float2 load_weight(u32 slot, int j, const Packed &packed) const {
        if constexpr (WEIGHT == WeightFormat::F32) {
            return shared_load_f32x2(pair_at<4>(slot + first4, j) + array_offset(A_WEIGHT));
        } else if constexpr (WEIGHT == WeightFormat::Bf16) {
            return formats::widen_bf16x2(packed.arrays[A_WEIGHT][j % MATRICES]);
        } else if constexpr (WEIGHT == WeightFormat::Bf16F32) {
            return shared_load_f32x2(pair_at<4>(slot + first4, j) + array_offset(A_EXTRA));
        } else {
            const u32 upper = packed.arrays[A_WEIGHT][j % MATRICES],
                      lower = packed.arrays[A_EXTRA][j % MATRICES];
            return make_float2(formats::join_halves(__byte_perm(lower, upper, 0x5410)),
                               formats::join_halves(__byte_perm(lower, upper, 0x7632)));
        }
    }

    FORGE_DEVICE void store_weight(u32 slot, int j, float2 w, u32 draws, u32 one,
                                   Packed &packed) const {
        if constexpr (WEIGHT == WeightFormat::F32) {
            shared_store_f32x2(pair_at<4>(slot + first4, j) + array_offset(A_WEIGHT), w);
        } else if constexpr (WEIGHT == WeightFormat::Bf16) {
            packed.arrays[A_WEIGHT][j % MATRICES] =
                FORGE_WEIGHT_STOCHASTIC ? formats::narrow_bf16x2_stochastic(w.x, w.y, draws, one)
                                        : narrow_bf16x2(w.x, w.y);
        } else if constexpr (WEIGHT == WeightFormat::Bf16F32) {
            shared_store_f32x2(pair_at<4>(slot + first4, j) + array_offset(A_EXTRA), w);
            packed.arrays[A_WEIGHT][j % MATRICES] = narrow_bf16x2(w.x, w.y);
        } else {
            const u32 x = float_to_bits(w.x), y = float_to_bits(w.y);
            packed.arrays[A_EXTRA][j % MATRICES] = __byte_perm(x, y, 0x5410);
            packed.arrays[A_WEIGHT][j % MATRICES] = __byte_perm(x + 0x8000u, y + 0x8000u, 0x7632);
        }
    }

    template <int S>
    FORGE_DEVICE float2 load_state(u32 slot, int j, const Packed &packed, float decode) const {
        if constexpr (STATE[S] == StateFormat::F32) {
            return shared_load_f32x2(pair_at<4>(slot + first4, j) + array_offset(A_STATE0 + S));
        } else if constexpr (STATE[S] == StateFormat::Bf16) {
            return formats::widen_bf16x2(packed.arrays[A_STATE0 + S][j % MATRICES]);
        } else {
            const u32 codes =
                shared_load_u16(pair_at<1>(slot + first1, j) + array_offset(A_STATE0 + S));
            return make_float2(
                q8_decode<SIGNED[S], Form::USED>(__byte_perm(codes, BYTE_MAGIC, 0x7440), decode),
                q8_decode<SIGNED[S], Form::USED>(__byte_perm(codes, BYTE_MAGIC, 0x7441), decode));
        }
    }

    template <int S>
    FORGE_DEVICE void store_state(u32 slot, int j, float2 s, u32 draws, u32 one,
                                  Packed &packed) const {
        if constexpr (STATE[S] == StateFormat::F32) {
            shared_store_f32x2(pair_at<4>(slot + first4, j) + array_offset(A_STATE0 + S), s);
        } else if constexpr (STATE[S] == StateFormat::Bf16) {
            packed.arrays[A_STATE0 + S][j % MATRICES] =
                FORGE_STATE_STOCHASTIC ? formats::narrow_bf16x2_stochastic(s.x, s.y, draws, one)
                                       : narrow_bf16x2(s.x, s.y);
        }
    }

    // The draws of 32 columns: word j for the pair (8·j + 2·q, + 1).
    // `index`: of the lane's row at the chunk's first column, which begins with the second 32 of 64
    // if `shifted`; `group`: which 32 columns of the chunk.
    FORGE_DEVICE Draws draws(Stream stream, u64 index, bool shifted, u32 group) const {
#if FORGE_DRAWS_ALIGNED
        // The same call for both halves of 64 columns: the compiler makes it once. The upper word
        // of its number is the same for all, so the first round and half of the second are, too.
        const u32 block = group + shifted;
        const u32 call = static_cast<u32>(index / 64 * 4) + lane.q + 4 * (block / 2);
        const u32 high = draw_high | own_calls(stream);
        return stream_draws(stream, philox4x32_7(call, high, step.step, step.seed_high, keys),
                            block % 2 != 0);
#else
        Draws d;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u64 at = index + 32 * group + 8 * j + 2 * lane.q;
            d.word[j] = draw_one(step, stream, at) | (draw_one(step, stream, at + 1) << 16);
        }
        return d;
#endif
    }

    // A chunk that is left alone goes back as it came. The model weight beside a master did not
    // come: it is the master, rounded.
    FORGE_DEVICE void keep(u32 slot) const {
        if constexpr (WEIGHT == WeightFormat::Bf16F32) {
#pragma unroll
            for (int begin = 0; begin < CHUNK_COLS / 8; begin += MATRICES) {
                u32 weights[MATRICES];
#pragma unroll
                for (int p = 0; p < MATRICES; ++p) {
                    const float2 w = load_weight(slot, begin + p, Packed{});
                    weights[p] = narrow_bf16x2(w.x, w.y);
                }
                pairs_store(pair_at<2>(slot + first2, begin) + array_offset(A_WEIGHT), weights);
            }
        }
    }

    // `grad`: dW of the lane's pairs. `index`, `shifted`: see `draws`. `scales`: of the row's q8
    // blocks, in shared memory.
    FORGE_DEVICE void run(u32 slot, const float (&grad)[CHUNK_COLS / 4], u64 index, bool shifted,
                          float *const (&scales)[3]) {
        constexpr int PAIRS = CHUNK_COLS / 8;
        Q8Row q8[3];
        // q8 states wait here until their block's maximum is known.
        constexpr int KEPT = any_q8() ? CHUNK_COLS / 4 : 1;
        float kept[3][KEPT], worth[3];
#pragma unroll
        for (int s = 0; s < N_STATES; ++s) {
            const float scale = STATE[s] == StateFormat::Q8 ? *scales[s] : 0.0f;
            const float factor = Form::factor(step.constants, s);
            q8[s].decode = SIGNED[s] ? q8_decode_factor<true>(scale, factor)
                                     : q8_decode_factor<false>(scale, factor);
            q8[s].largest = 0.0f;
            worth[s] = q8[s].decode;
        }
#pragma unroll
        for (int group = 0; group < PAIRS / 4; ++group) {
            Draws weight_draws{}, state_draws[3]{};
            if constexpr (WEIGHT == WeightFormat::Bf16 && FORGE_WEIGHT_STOCHASTIC)
                weight_draws = draws(Stream::Weight, index, shifted, group);
            if constexpr (FORGE_STATE_STOCHASTIC) {
                if constexpr (N_STATES > 0 && STATE[0] == StateFormat::Bf16)
                    state_draws[0] = draws(Stream::State0, index, shifted, group);
                if constexpr (N_STATES > 1 && STATE[1] == StateFormat::Bf16)
                    state_draws[1] = draws(Stream::State1, index, shifted, group);
                if constexpr (N_STATES > 2 && STATE[2] == StateFormat::Bf16)
                    state_draws[2] = draws(Stream::State2, index, shifted, group);
            }
            Packed packed[4 / MATRICES];
#pragma unroll
            for (int begin = 0; begin < 4; begin += TOGETHER) {
                float2 w[4], s[3][4];
                float magnitudes = 0.0f, state_magnitudes[3] = {0.0f, 0.0f, 0.0f};
#pragma unroll
                for (int p = begin; p < begin + TOGETHER; ++p) {
                    const int j = 4 * group + p;
                    if (j % MATRICES == 0)
                        move_packed<true>(slot, j, packed[p / MATRICES]);
                    w[p] = load_weight(slot, j, packed[p / MATRICES]);
                    if constexpr (N_STATES > 0)
                        s[0][p] = load_state<0>(slot, j, packed[p / MATRICES], q8[0].decode);
                    if constexpr (N_STATES > 1)
                        s[1][p] = load_state<1>(slot, j, packed[p / MATRICES], q8[1].decode);
                    if constexpr (N_STATES > 2)
                        s[2][p] = load_state<2>(slot, j, packed[p / MATRICES], q8[2].decode);
                    const float2 g = make_float2(grad[2 * j], grad[2 * j + 1]);
                    float sx[3], sy[3];
#pragma unroll
                    for (int i = 0; i < N_STATES; ++i) {
                        sx[i] = s[i][p].x;
                        sy[i] = s[i][p].y;
                    }
                    Form::update(step.constants, g.x, step.grad_scale, w[p].x, sx, worth);
                    Form::update(step.constants, g.y, step.grad_scale, w[p].y, sy, worth);
#pragma unroll
                    for (int i = 0; i < N_STATES; ++i) {
                        s[i][p] = make_float2(sx[i], sy[i]);
                        if (FORGE_STATE_STOCHASTIC && STATE[i] == StateFormat::Bf16)
                            state_magnitudes[i] =
                                (state_magnitudes[i] + fabsf(sx[i])) + fabsf(sy[i]);
                        if (STATE[i] == StateFormat::Q8) {
                            const float2 v =
                                SIGNED[i] || Form::USED
                                    ? s[i][p]
                                    : make_float2(fast_sqrt(s[i][p].x), fast_sqrt(s[i][p].y));
                            q8[i].largest = fmaxf(q8[i].largest, fmaxf(fabsf(v.x), fabsf(v.y)));
                            kept[i][2 * j] = v.x;
                            kept[i][2 * j + 1] = v.y;
                        }
                    }
                    if (WEIGHT == WeightFormat::Bf16 && FORGE_WEIGHT_STOCHASTIC)
                        magnitudes = (magnitudes + fabsf(w[p].x)) + fabsf(w[p].y);
                }
                const u32 one = formats::roundable(magnitudes) ? 1u : 0u;
                u32 state_one[3];
#pragma unroll
                for (int i = 0; i < 3; ++i)
                    state_one[i] = formats::roundable(state_magnitudes[i]) ? 1u : 0u;
#pragma unroll
                for (int p = begin; p < begin + TOGETHER; ++p) {
                    const int j = 4 * group + p;
                    store_weight(slot, j, w[p], weight_draws.word[p], one, packed[p / MATRICES]);
                    if constexpr (N_STATES > 0)
                        store_state<0>(slot, j, s[0][p], state_draws[0].word[p], state_one[0],
                                       packed[p / MATRICES]);
                    if constexpr (N_STATES > 1)
                        store_state<1>(slot, j, s[1][p], state_draws[1].word[p], state_one[1],
                                       packed[p / MATRICES]);
                    if constexpr (N_STATES > 2)
                        store_state<2>(slot, j, s[2][p], state_draws[2].word[p], state_one[2],
                                       packed[p / MATRICES]);
                    if (j % MATRICES == MATRICES - 1)
                        move_packed<false>(slot, j - j % MATRICES, packed[p / MATRICES]);
                }
            }
        }
        if constexpr (any_q8())
            encode(slot, kept, q8, scales, index);
    }

    template <class F> FORGE_DEVICE static void for_q8(F body) {
        for_constants<N_STATES>([&](auto constant) {
            if constexpr (is_q8(decltype(constant)::value))
                body(constant);
        });
    }

    // A quad's row of 128 columns is one block; the host takes this path for whole blocks only.
    template <int KEPT>
    FORGE_DEVICE void encode(u32 slot, const float (&values)[3][KEPT], Q8Row (&rows)[3],
                             float *const (&scales)[3], u64 index) const {
        static_assert(CHUNK_COLS == 128, "a chunk holds whole q8 blocks");
        for_q8([&](auto constant) {
            constexpr int S = decltype(constant)::value;
            constexpr bool CODE = SIGNED[S];
            Q8Row &row = rows[S];
            row.largest = fminf(quad_maximum(row.largest), CODE ? LARGEST : LARGEST_ROOT);
            row.encode = q8_encode_factor<CODE, FORGE_STATE_STOCHASTIC != 0>(row.largest);
        });
        // All states of 32 columns, so that their draws come from the same call. It is made again
        // rather than kept from the weight's: registers are what is short.
#pragma unroll
        for (int group = 0; group < KEPT / 8; ++group)
            for_q8([&](auto constant) {
                constexpr int S = decltype(constant)::value;
                encode_group<S>(slot, values[S], rows[S].encode, index, group);
            });
        __syncwarp();
        for_q8([&](auto constant) {
            constexpr int S = decltype(constant)::value;
            if (lane.q == 0)
                *scales[S] = q8_stored_scale(rows[S].largest, Form::unit(step.constants, S));
        });
    }

    template <int S, int KEPT>
    FORGE_DEVICE void encode_group(u32 slot, const float (&values)[KEPT], float factor, u64 index,
                                   int group) const {
        constexpr bool CODE = SIGNED[S];
        Draws random{};
        if constexpr (FORGE_STATE_STOCHASTIC)
            random = draws(static_cast<Stream>(static_cast<u32>(Stream::State0) + S), index, false,
                           group);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const int j = 4 * group + p;
            const float x = values[2 * j], y = values[2 * j + 1];
            const u32 word = random.word[p];
            u32 codes;
            if constexpr (FORGE_STATE_STOCHASTIC)
                codes = __byte_perm(q8_encode_stochastic<CODE>(x, factor, word & 0xFFFFu),
                                    q8_encode_stochastic<CODE>(y, factor, word >> 16), 0x0062);
            else
                codes = __byte_perm(q8_encode<CODE>(x, factor), q8_encode<CODE>(y, factor), 0x0040);
            shared_store_u16(pair_at<1>(slot + first1, j) + array_offset(A_STATE0 + S), codes);
        }
    }
};

} // namespace forge
