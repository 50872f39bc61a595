// A parameter's shard in memory: src/backend/cuda/parameters.rs on the host side.
#pragma once
#include "prelude.cuh"

namespace forge {

// Unused arrays are null.
struct ShardArrays {
    void *weight;     // model weight [rows, cols]
    void *extra;      // master or lower halves [rows, cols]
    void *states[3];  // [rows, cols]
    float *scales[3]; // of q8 states [ceil(cols/128), rows]
};

struct Shard {
    u64 rows, cols;
    u64 first_index; // global index of the first element
    u64 global_cols; // stride of the global index

    FORGE_DEVICE u64 at(u64 row, u64 col) const { return row * cols + col; }
    FORGE_DEVICE u64 global(u64 row, u64 col) const {
        return first_index + row * global_cols + col;
    }
    FORGE_DEVICE u64 scale_at(u64 row, u64 col) const { return col / 128 * rows + row; }
};

// A rectangle of a shard; its first column is a multiple of 128.
struct Region {
    u64 row, col, rows, cols;
};

// Tiles of the element-wise kernels: what is checked for non-finite gradients and skipped as one.
constexpr u32 TILE_ROWS = 64, TILE_COLS = 128;

// Sum over the block in a fixed order, in all threads' hands for thread 0 only. `shared`: one
// double for each warp.
template <int THREADS> FORGE_DEVICE double block_sum(double x, double *shared) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        x += __shfl_down_sync(0xFFFFFFFFu, x, distance);
    if (threadIdx.x % 32 == 0)
        shared[threadIdx.x / 32] = x;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x == 0)
        for (int warp = 0; warp < THREADS / 32; ++warp)
            sum += shared[warp];
    __syncthreads();
    return sum;
}

} // namespace forge
