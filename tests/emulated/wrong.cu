// Kernels with a mistake each, by which tests/emulated.rs sees that the emulator finds mistakes.
#include "mma.cuh"

using namespace forge;

// Some lanes of a warp wait for the warp, the others for the block.
extern "C" __global__ void waits_for_ever(float *, const float *) {
    if (threadIdx.x == 3)
        __syncwarp();
    else
        __syncthreads();
}

extern "C" __global__ void waits_at_different_places(float *out, const float *) {
    if (threadIdx.x < 16)
        __syncwarp();
    else
        out[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
}

extern "C" __global__ void copies_past_the_end(float *, const float *in) {
    copy_async(1024 - 8, in, 16);
}

extern "C" __global__ void never_waits_for_its_copies(float *, const float *in) {
    copy_async(16 * threadIdx.x, in, 16);
    copies_commit();
}

// Of two groups it waits for the first and reads the second.
extern "C" __global__ void reads_too_early(float *out, const float *in) {
    extern __shared__ __align__(128) u8 shared[];
    if (threadIdx.x == 0) {
        for (u32 group = 0; group < 2; ++group) {
            copy_async(16 * group, in, 16);
            copies_commit();
        }
        copies_wait<1>();
        out[0] = reinterpret_cast<const float *>(shared)[0];
        out[1] = reinterpret_cast<const float *>(shared)[4];
        copies_wait<0>();
        out[2] = reinterpret_cast<const float *>(shared)[4];
    }
}

// No barrier between what a thread writes and what another reads.
extern "C" __global__ void races(float *out, const float *) {
    extern __shared__ __align__(128) u8 shared[];
    float *values = reinterpret_cast<float *>(shared);
    values[threadIdx.x] = 1.0f;
    const float other = values[63 - threadIdx.x];
    out[threadIdx.x] = other == 1.0f ? 1.0f : 0.0f;
}
