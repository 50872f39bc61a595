// Sums in a fixed order: squares of a region, and tile partials to a report or a norm.
#include "formats.cuh"
#include "prelude.cuh"
#include "report.cuh"
#include "shard.cuh"

namespace forge {

constexpr int THREADS = 256, REDUCE_THREADS = 1024;

// What partials come to.
struct Sum {
    double squares = 0.0;
    u64 nonfinite = 0, tiles = 0;
};

// Of all, for thread 0: each thread takes every 1024th, then a tree. Partials that count no tiles
// are one each.
FORGE_DEVICE Sum sum_of(const TilePartial *partials, u64 count) {
    __shared__ double sums[REDUCE_THREADS / 32];
    __shared__ u32 counts[2][REDUCE_THREADS / 32];
    double sum = 0.0;
    u32 skipped = 0, tiles = 0;
    for (u64 i = threadIdx.x; i < count; i += REDUCE_THREADS) {
        sum += partials[i].sum_of_squares;
        skipped += partials[i].nonfinite;
        tiles += partials[i].tiles;
    }
    skipped = __reduce_add_sync(0xFFFFFFFFu, skipped);
    tiles = __reduce_add_sync(0xFFFFFFFFu, tiles);
    if (threadIdx.x % 32 == 0) {
        counts[0][threadIdx.x / 32] = skipped;
        counts[1][threadIdx.x / 32] = tiles;
    }
    Sum out;
    out.squares = block_sum<REDUCE_THREADS>(sum, sums);
    if (threadIdx.x == 0)
        for (int warp = 0; warp < REDUCE_THREADS / 32; ++warp) {
            out.nonfinite += counts[0][warp];
            out.tiles += counts[1][warp];
        }
    if (out.tiles == 0)
        out.tiles = count;
    return out;
}

FORGE_DEVICE Report report_of(const Sum &sum) {
    return {sizeof(Report), 0, sum.tiles, sum.nonfinite, sum.squares};
}

// The reports of a grouped launch; backend::cuda::reduce fills it.
constexpr u32 MOST_REPORTS = 1024;
struct ReportOf {
    const TilePartial *partials;
    u64 count;
    Report *target;
};
struct Reports {
    ReportOf of[MOST_REPORTS];
};
static_assert(sizeof(Reports) <= 32764, "what drivers take by value since CUDA 12.1");

} // namespace forge

using namespace forge;

extern "C" __global__ void __launch_bounds__(REDUCE_THREADS)
    forge_report(const TilePartial *partials, u64 count, Report *first, Report *second) {
    const Report report = report_of(sum_of(partials, count));
    if (threadIdx.x != 0)
        return;
    if (first != nullptr)
        *first = report;
    if (second != nullptr)
        *second = report;
}

// A block for each.
extern "C" __global__ void __launch_bounds__(REDUCE_THREADS)
    forge_reports(const __grid_constant__ Reports all) {
    const ReportOf &one = all.of[blockIdx.x];
    const Report report = report_of(sum_of(one.partials, one.count));
    if (threadIdx.x == 0)
        *one.target = report;
}

extern "C" __global__ void __launch_bounds__(REDUCE_THREADS)
    forge_norm(const TilePartial *partials, u64 count, u32 method, Norm *first, Norm *second) {
    const Sum sum = sum_of(partials, count);
    if (threadIdx.x != 0)
        return;
    const Norm norm = norm_of(sum.squares, sum.nonfinite, method);
    if (first != nullptr)
        *first = norm;
    if (second != nullptr)
        *second = norm;
}

// A partial for each tile of 64 × 128 of a matrix of `dtype` (see load_factor).
extern "C" __global__ void __launch_bounds__(THREADS)
    forge_squares(const void *data, u64 stride, u32 dtype, u64 rows, u64 cols,
                  TilePartial *partials) {
    __shared__ double sums[THREADS / 32];
    const u64 across = (cols + TILE_COLS - 1) / TILE_COLS;
    const u64 row0 = blockIdx.x / across * TILE_ROWS, col0 = blockIdx.x % across * TILE_COLS;
    const u64 col = col0 + threadIdx.x % TILE_COLS;
    double sum = 0.0;
#pragma unroll 8
    for (u32 i = 0; i < TILE_ROWS; i += THREADS / TILE_COLS) {
        const u64 row = row0 + i + threadIdx.x / TILE_COLS;
        float x = 0.0f;
        if (row < rows && col < cols) {
            const u64 at = row * stride + col;
            x = dtype == 0   ? formats::load_factor<0>(data, at)
                : dtype == 1 ? formats::load_factor<1>(data, at)
                             : formats::load_factor<2>(data, at);
        }
        sum += static_cast<double>(x) * static_cast<double>(x);
    }
    sum = block_sum<THREADS>(sum, sums);
    if (threadIdx.x == 0)
        partials[blockIdx.x] = {sum, is_finite(sum) ? 0u : 1u, 0u};
}
