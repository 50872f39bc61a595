// dbias[o] = Σ_t dY[t, o], in fp32 and in a fixed order: a block has 32 columns; each of its 32
// warps sums every 32nd token, and then one warp adds the 32 sums in order.
#include "formats.cuh"
#include "prelude.cuh"

using namespace forge;

extern "C" __global__ void __launch_bounds__(1024)
    forge_bias(const void *dy, u64 stride, u64 cols, u64 tokens, void *dbias) {
    __shared__ float sums[32][33];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 col = static_cast<u64>(blockIdx.x) * 32 + lane;
    float sum = 0.0f;
    if (col < cols) {
#pragma unroll 4
        for (u64 token = warp; token < tokens; token += 32)
            sum = __fadd_rn(sum, formats::load_factor<FORGE_FACTOR>(dy, token * stride + col));
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || col >= cols)
        return;
    float total = 0.0f;
    for (int i = 0; i < 32; ++i)
        total = __fadd_rn(total, sums[i][lane]);
    formats::store_factor<FORGE_FACTOR>(dbias, col, total);
}
