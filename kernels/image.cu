// A weight or a state as fp32 [rows, cols], and back, rounded to nearest. A warp has 128 columns of
// a row: a q8 block.
#include "formats.cuh"
#include "prelude.cuh"
#include "shard.cuh"

namespace forge {

constexpr int THREADS = 256, BLOCK = 128, PER_LANE = BLOCK / 32;
constexpr bool IS_WEIGHT = FORGE_IMAGE == 0;
constexpr bool SIGNED = FORGE_KIND == 0;
constexpr bool IS_Q8 = !IS_WEIGHT && FORGE_FORMAT == 2;
enum : int { BF16 = 1, W_MASTER = 2, W_LOW = 3 };

struct Place {
    u64 row, col;
    bool exists;
};

FORGE_DEVICE Place warp_place(const Shard &shard) {
    const u64 block = (static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x) / 32;
    const u64 across = (shard.cols + BLOCK - 1) / BLOCK;
    return {block / across, block % across * BLOCK, block / across < shard.rows};
}

} // namespace forge

using namespace forge;

extern "C" __global__ void __launch_bounds__(THREADS)
    forge_export(ShardArrays arrays, Shard shard, u32 k, float *out) {
    const Place place = warp_place(shard);
    if (!place.exists)
        return;
    const void *data = IS_WEIGHT ? arrays.weight : arrays.states[k];
    float factor = 0.0f;
    if (IS_Q8)
        factor =
            q8_decode_factor<SIGNED>(arrays.scales[k][shard.scale_at(place.row, place.col)], 1.0f);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const u64 col = place.col + threadIdx.x % 32 + 32 * i, at = shard.at(place.row, col);
        if (col >= shard.cols)
            continue;
        if constexpr (IS_Q8) {
            out[at] =
                q8_decode<SIGNED, false>(BYTE_MAGIC | static_cast<const u8 *>(data)[at], factor);
        } else if constexpr (IS_WEIGHT && FORGE_FORMAT == W_MASTER) {
            out[at] = static_cast<const float *>(arrays.extra)[at];
        } else if constexpr (IS_WEIGHT && FORGE_FORMAT == W_LOW) {
            out[at] = formats::join_halves(static_cast<const u16 *>(data)[at],
                                           static_cast<const u16 *>(arrays.extra)[at]);
        } else if constexpr (FORGE_FORMAT == BF16) {
            out[at] = formats::widen_bf16(static_cast<const u16 *>(data)[at]);
        } else {
            out[at] = static_cast<const float *>(data)[at];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    forge_import(ShardArrays arrays, Shard shard, u32 k, const float *values) {
    const Place place = warp_place(shard);
    if (!place.exists)
        return;
    void *data = IS_WEIGHT ? arrays.weight : arrays.states[k];
    float value[PER_LANE], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const u64 col = place.col + threadIdx.x % 32 + 32 * i;
        value[i] = col < shard.cols ? values[shard.at(place.row, col)] : 0.0f;
        largest = fmaxf(largest, fabsf(value[i]));
    }
    if constexpr (IS_Q8) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
    }
    const formats::Q8Block<SIGNED> block(largest, 1.0f);
    if (IS_Q8 && threadIdx.x % 32 == 0)
        arrays.scales[k][shard.scale_at(place.row, place.col)] = block.scale;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const u64 col = place.col + threadIdx.x % 32 + 32 * i, at = shard.at(place.row, col);
        if (col >= shard.cols)
            continue;
        if constexpr (IS_Q8) {
            static_cast<u8 *>(data)[at] = static_cast<u8>(block.encode(value[i], 0));
        } else if constexpr (IS_WEIGHT && FORGE_FORMAT == W_LOW) {
            static_cast<u16 *>(data)[at] = static_cast<u16>(formats::upper_half(value[i]));
            static_cast<u16 *>(arrays.extra)[at] = static_cast<u16>(formats::lower_half(value[i]));
        } else if constexpr (FORGE_FORMAT == BF16 || (IS_WEIGHT && FORGE_FORMAT == W_MASTER)) {
            static_cast<u16 *>(data)[at] = static_cast<u16>(formats::narrow_bf16(value[i]));
            if (IS_WEIGHT && FORGE_FORMAT == W_MASTER)
                static_cast<float *>(arrays.extra)[at] = value[i];
        } else {
            static_cast<float *>(data)[at] = value[i];
        }
    }
}
