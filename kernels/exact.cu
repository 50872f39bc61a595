// Products in fp32 FFMA with one accumulator for each element and its terms in order through all
// segments: the same bits as a loop of `fmaf`, whatever the shape. Operands of any type and strides.
//
// A block of 256 threads makes a tile of 128 × 128, 8 × 8 for each thread; the next step's operands are
// loaded to registers while this one's are multiplied from shared memory.
#include "formats.cuh"
#include "prelude.cuh"

namespace forge {
namespace exact {

constexpr int TILE = 128, DEPTH = 8, THREADS = 256, PER_THREAD = 8;
constexpr int LOADS = TILE * DEPTH / THREADS;
constexpr int MOST_SEGMENTS = 32;

// Element (i, k) lies at i · row + k · depth.
struct Operand {
    const void* data;
    u64 row, depth;
};

struct Segment {
    Operand left, right;
    u64 terms;
};

struct Params {
    Segment segments[MOST_SEGMENTS];
    u64 n_segments;
    u64 rows, cols;
    const float* initial;  // null: zeros
    u64 initial_stride;
    void* out;
    u64 out_stride;
};

// Which elements of a TILE × DEPTH slice a thread loads: neighbours in memory go to neighbouring threads,
// along whichever dimension is contiguous.
struct Slice {
    int row[LOADS], depth[LOADS];
    FORGE_DEVICE explicit Slice(const Operand& operand) {
        const int t = static_cast<int>(threadIdx.x);
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int n = i * THREADS + t;
            row[i] = operand.row == 1 ? n % TILE : n / DEPTH;
            depth[i] = operand.row == 1 ? n / TILE : n % DEPTH;
        }
    }

    template <int DTYPE>
    FORGE_DEVICE void load(float (&out)[LOADS], const Operand& operand, u64 first_row, u64 rows, u64 first,
                           u64 terms) const {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const u64 r = first_row + row[i], k = first + depth[i];
            out[i] = r < rows && k < terms
                         ? formats::load_factor<DTYPE>(operand.data, r * operand.row + k * operand.depth)
                         : 0.0f;
        }
    }

    FORGE_DEVICE void store(float (*shared)[TILE + 4], const float (&values)[LOADS]) const {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) shared[depth[i]][row[i]] = values[i];
    }
};

}  // namespace exact
}  // namespace forge

using namespace forge;
using namespace forge::exact;

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    forge_exact(const __grid_constant__ Params p) {
    // Rows padded by 16 bytes: stores along the depth meet fewer banks twice.
    __shared__ __align__(16) float left[2][DEPTH][TILE + 4];
    __shared__ __align__(16) float right[2][DEPTH][TILE + 4];
    const u64 across = (p.cols + TILE - 1) / TILE;
    const u64 row0 = blockIdx.x / across * TILE, col0 = blockIdx.x % across * TILE;
    // A thread's rows and columns: four from `4·t`, four from 64 on, so that reads of shared memory
    // are 16 bytes wide and meet no bank twice.
    const int tr = static_cast<int>(threadIdx.x) / 16 * 4, tc = static_cast<int>(threadIdx.x) % 16 * 4;
    const auto row_of = [&](int i) { return row0 + static_cast<u64>(i < 4 ? tr + i : 64 + tr + i - 4); };
    const auto col_of = [&](int j) { return col0 + static_cast<u64>(j < 4 ? tc + j : 64 + tc + j - 4); };

    float acc[PER_THREAD][PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i)
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
            const u64 r = row_of(i), c = col_of(j);
            const bool inside = p.initial != nullptr && r < p.rows && c < p.cols;
            acc[i][j] = inside ? p.initial[r * p.initial_stride + c] : 0.0f;
        }

    for (u64 s = 0; s < p.n_segments; ++s) {
        const Segment& segment = p.segments[s];
        const Slice from_left(segment.left), from_right(segment.right);
        float a[LOADS], b[LOADS];
        from_left.load<FORGE_LEFT>(a, segment.left, row0, p.rows, 0, segment.terms);
        from_right.load<FORGE_RIGHT>(b, segment.right, col0, p.cols, 0, segment.terms);
        __syncthreads();  // the segment before has been read
        from_left.store(left[0], a);
        from_right.store(right[0], b);
        __syncthreads();
        int stage = 0;
        for (u64 first = 0; first < segment.terms; first += DEPTH, stage ^= 1) {
            const u64 next = first + DEPTH;
            if (next < segment.terms) {
                from_left.load<FORGE_LEFT>(a, segment.left, row0, p.rows, next, segment.terms);
                from_right.load<FORGE_RIGHT>(b, segment.right, col0, p.cols, next, segment.terms);
            }
            // Terms beyond the last are left out and not added as zeros: −0 + 0 is +0.
            const int depth = static_cast<int>(min(segment.terms - first, static_cast<u64>(DEPTH)));
#pragma unroll
            for (int k = 0; k < DEPTH; ++k) {
                if (k < depth) {
                    float x[PER_THREAD], y[PER_THREAD];
                    *reinterpret_cast<float4*>(x) = *reinterpret_cast<const float4*>(&left[stage][k][tr]);
                    *reinterpret_cast<float4*>(x + 4) =
                        *reinterpret_cast<const float4*>(&left[stage][k][64 + tr]);
                    *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(&right[stage][k][tc]);
                    *reinterpret_cast<float4*>(y + 4) =
                        *reinterpret_cast<const float4*>(&right[stage][k][64 + tc]);
#pragma unroll
                    for (int i = 0; i < PER_THREAD; ++i)
#pragma unroll
                        for (int j = 0; j < PER_THREAD; ++j)
                            acc[i][j] = __fmaf_rn(x[i], y[j], acc[i][j]);
                }
            }
            if (next < segment.terms) {
                from_left.store(left[stage ^ 1], a);
                from_right.store(right[stage ^ 1], b);
            }
            __syncthreads();
        }
    }

#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i)
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
            const u64 r = row_of(i), c = col_of(j);
            if (r < p.rows && c < p.cols)
                formats::store_factor<FORGE_OUT>(p.out, r * p.out_stride + c, acc[i][j]);
        }
}
