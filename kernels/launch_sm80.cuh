// What the fused kernel of 8.0 is given, for one weight or for many small ones.
#pragma once
#include "shard.cuh"

#ifndef FORGE_GROUP
#define FORGE_GROUP 0
#endif

namespace forge {

struct FactorPair {
    const u8 *dy, *x;
    u64 dy_stride, x_stride; // elements from one token to the next
    u64 tokens;
};

// A weight and what becomes of it; backend::cuda::sm80 fills it.
struct Problem {
    ShardArrays arrays;
    Shard shard;
    float *accumulator;    // [rows, cols], or null
    TilePartial *partials; // one for each 64 × 128, row by row; null: not wanted
    u16 group;             // tiles below each other that are worked on together, for the L2's sake
    u16 n_segments;
    // In a grouped launch, for this weight: its first block and segment, and its parameter's id.
    u32 first_block, first_segment, parameter;
};

#if FORGE_GROUP
// Many weights, too small to fill a GPU one by one; backend::cuda::group fills it. The scalars are
// those of all, but for the id in the key. As many bytes as drivers take by value since CUDA 12.1.
struct Params {
    StepSource step;
    u32 n_problems;
    // Problems, then all their segments, so that either may be many.
    u64 pool[(32760 - sizeof(StepSource) - sizeof(u64)) / sizeof(u64)];

    // Whose block this is. First blocks ascend.
    FORGE_DEVICE const Problem &problem() const {
        const Problem *at = reinterpret_cast<const Problem *>(pool);
        u32 first = 0, end = n_problems;
        while (end - first > 1) {
            const u32 middle = (first + end) / 2;
            (at[middle].first_block <= blockIdx.x ? first : end) = middle;
        }
        return at[first];
    }
    FORGE_DEVICE static u32 block_of(const Problem &problem) {
        return blockIdx.x - problem.first_block;
    }
    FORGE_DEVICE const FactorPair *segments_of(const Problem &problem) const {
        const u64 *behind = pool + n_problems * (sizeof(Problem) / sizeof(u64));
        return reinterpret_cast<const FactorPair *>(behind) + problem.first_segment;
    }
    FORGE_DEVICE StepScalars scalars(const Problem &problem) const {
        StepScalars out = step.device != nullptr ? *step.device : step.value;
        out.key[1] = problem.parameter;
        return out;
    }
};
static_assert(sizeof(Params) == 32760 && sizeof(Problem) == 128, "backend::cuda::group's");
#else
constexpr u32 MOST_SEGMENTS = 32;

struct Params {
    Problem only;
    StepSource step;
    FactorPair segments[MOST_SEGMENTS];

    FORGE_DEVICE const Problem &problem() const { return only; }
    FORGE_DEVICE static u32 block_of(const Problem &) { return blockIdx.x; }
    FORGE_DEVICE const FactorPair *segments_of(const Problem &) const { return segments; }
    FORGE_DEVICE StepScalars scalars(const Problem &) const {
        return step.device != nullptr ? *step.device : step.value;
    }
};
#endif

} // namespace forge
