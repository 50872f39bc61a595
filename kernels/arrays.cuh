// Which arrays a specialisation streams beside dW, and how their tiles lie in shared memory.
//
// The unit of streaming is a chunk: of a warpgroup's tile, CHUNK_COLS columns of 32 rows, namely 8
// of every 16: those that the lanes of one accumulator register row hold (row = lane/4, or 8 more).
// Each array's part of a chunk is one or more TMA boxes, swizzled so that the quads of a warp,
// which read 8 rows at 4 pairs of columns, meet no bank twice.
#pragma once
#include "mode.cuh"
#include "prelude.cuh"

#ifndef FORGE_ACCUMULATOR
#define FORGE_ACCUMULATOR 0
#endif

namespace forge {

enum class WeightFormat { F32 = 0, Bf16 = 1, Bf16F32 = 2, Bf16Low16 = 3 };
constexpr WeightFormat WEIGHT = static_cast<WeightFormat>(FORGE_WEIGHT_FORMAT);
enum class StateFormat { F32 = 0, Bf16 = 1, Q8 = 2 };
constexpr StateFormat STATE[3] = {static_cast<StateFormat>(FORGE_STATE0_FORMAT),
                                  static_cast<StateFormat>(FORGE_STATE1_FORMAT),
                                  static_cast<StateFormat>(FORGE_STATE2_FORMAT)};
// A q8 state is signed, or non-negative and used through its square root.
constexpr bool SIGNED[3] = {FORGE_STATE0_KIND == 0, FORGE_STATE1_KIND == 0, FORGE_STATE2_KIND == 0};
constexpr int N_STATES = FORGE_N_STATES;

enum Array { A_WEIGHT = 0, A_EXTRA = 1, A_STATE0 = 2, A_ACCUMULATOR = 5, N_ARRAYS = 6 };

struct ArraySpec {
    int bytes; // of an element; 0: absent
    bool loads, stores;
};

constexpr ArraySpec array_spec(int array) {
    const bool update = MODE == Mode::Update;
    if (array == A_WEIGHT && update)
        return {WEIGHT == WeightFormat::F32 ? 4 : 2, WEIGHT != WeightFormat::Bf16F32, true};
    if (array == A_EXTRA && update && WEIGHT == WeightFormat::Bf16F32)
        return {4, true, true};
    if (array == A_EXTRA && update && WEIGHT == WeightFormat::Bf16Low16)
        return {2, true, true};
    if (array >= A_STATE0 && array < A_STATE0 + N_STATES && update) {
        const StateFormat format = STATE[array - A_STATE0];
        return {format == StateFormat::F32 ? 4 : format == StateFormat::Bf16 ? 2 : 1, true, true};
    }
    if (array == A_ACCUMULATOR && (FORGE_ACCUMULATOR != 0 || MODE == Mode::Accumulate))
        return {4, true, MODE == Mode::Accumulate};
    return {0, false, false};
}

constexpr bool is_q8(int state) {
    return MODE == Mode::Update && state < N_STATES && STATE[state] == StateFormat::Q8;
}
constexpr bool any_q8() { return is_q8(0) || is_q8(1) || is_q8(2); }

constexpr int CHUNK_ROWS = 32, CHUNK_COLS = FORGE_CHUNK_COLS, SLOTS = FORGE_SLOTS;

// Columns of a TMA box: 128 bytes, the widest that a swizzle spans, or the whole chunk.
constexpr int box_cols(int bytes) {
    const int widest = 128 / bytes;
    return widest < CHUNK_COLS ? widest : CHUNK_COLS;
}
constexpr int box_bytes(int bytes) { return CHUNK_ROWS * box_cols(bytes) * bytes; }
constexpr int array_bytes(int array) { return CHUNK_ROWS * CHUNK_COLS * array_spec(array).bytes; }
// Of an array's part within a slot.
constexpr int array_offset(int array) {
    int offset = 0;
    for (int i = 0; i < array; ++i)
        offset += array_bytes(i);
    return offset;
}
constexpr int SLOT_BYTES = array_offset(N_ARRAYS);
constexpr int loaded_bytes() {
    int bytes = 0;
    for (int i = 0; i < N_ARRAYS; ++i)
        bytes += array_spec(i).loads ? array_bytes(i) : 0;
    for (int i = 0; i < 3; ++i)
        bytes += is_q8(i) ? CHUNK_ROWS * 4 : 0;
    return bytes;
}
// Of each q8 state the scales of a chunk's rows, outside the slots, whose parts are swizzled.
constexpr int SCALE_BYTES = CHUNK_ROWS * 4;
constexpr int SLOT_SCALE_BYTES = any_q8() ? 3 * SCALE_BYTES : 0;
constexpr int SLOT_LOAD_BYTES = loaded_bytes();
constexpr bool STREAMS = SLOT_BYTES > 0;

// TMA's swizzle of a box whose rows are ROW_BYTES: 16-byte units (bits 4..) XOR the number of the
// 128-byte line (bits 7..).
template <int ROW_BYTES> FORGE_DEVICE u32 swizzled(u32 linear) {
    constexpr u32 MASK = ROW_BYTES == 128 ? 7 : ROW_BYTES == 64 ? 3 : ROW_BYTES == 32 ? 1 : 0;
    return linear ^ (((linear >> 7) & MASK) << 4);
}

// Where in an array's part of a slot the pair of columns (2·q, + 1) of a lane's row lies. `warp`
// 0..3 and `row` 0..7 say which of the chunk's rows, `q` is the lane in its quad.
template <int BYTES> FORGE_DEVICE u32 pair_offset(u32 warp, u32 row, u32 q) {
    constexpr int ROW_BYTES = box_cols(BYTES) * BYTES;
    // Four-byte arrays have rows 0 4 1 5 2 6 3 7 (see `move_chunk`): a pair is half a swizzled unit
    // then, and rows that meet in one access would else share banks.
    const u32 line = warp * 8 + (BYTES == 4 ? (row >> 2) + 2 * (row & 3) : row);
    return swizzled<ROW_BYTES>(line * ROW_BYTES + q * 2 * BYTES);
}
// The same pair of the j-th eight columns. `first`: address of the first eight's. Slots begin at
// multiples of 128 bytes, so the swizzle of what is added is its XOR.
template <int BYTES> FORGE_DEVICE u32 pair_at(u32 first, int j) {
    constexpr int PER_BOX = box_cols(BYTES) / 8;
    return (first ^ (j % PER_BOX * 8 * BYTES)) + j / PER_BOX * box_bytes(BYTES);
}

// Four pairs of a two-byte array can go through registers at once, as matrices of 8×8 (ldmatrix).
// The address that a lane gives is of row lane%8 of matrix lane/8.
FORGE_DEVICE u32 matrix_offset(u32 warp, u32 lane) {
    constexpr int ROW_BYTES = box_cols(2) * 2;
    return swizzled<ROW_BYTES>((warp * 8 + lane % 8) * ROW_BYTES + lane / 8 * 16);
}

} // namespace forge
