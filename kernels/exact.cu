// Products in fp32 FFMA with one accumulator for each element and its terms in order through all
// segments: the same bits as a loop of `fmaf`, whatever the shape. Operands of any type and
// strides.
//
// A block of 256 threads makes a tile of 128 × 128, 8 × 8 for each thread; the next step's operands
// are loaded to registers while this one's are multiplied from shared memory.
#include "formats.cuh"
#include "prelude.cuh"

namespace forge {
namespace exact {

constexpr int TILE = 128, DEPTH = 8, THREADS = 256, PER_THREAD = 8;
constexpr int LOADS = TILE * DEPTH / THREADS;
constexpr int MOST_SEGMENTS = 32;

// Element (i, k) lies at i · row + k · depth.
struct Operand {
    const void *data;
    u64 row, depth;
};

struct Segment {
    Operand left, right;
    u64 terms; // below 2^31
};

struct Params {
    Segment segments[MOST_SEGMENTS];
    u64 n_segments;
    u64 rows, cols;       // below 2^31
    const float *initial; // null: zeros
    u64 initial_stride;
    void *out;
    u64 out_stride;
};

// A thread's part of a TILE × DEPTH slice of an operand: neighbours in memory go to neighbouring
// threads. ALONG_ROWS says which dimension is the contiguous one; either gives the right result.
template <int DTYPE, bool ALONG_ROWS> struct Slice {
    static constexpr int ROW_STEP = ALONG_ROWS ? 0 : THREADS / DEPTH;
    static constexpr int DEPTH_STEP = ALONG_ROWS ? THREADS / TILE : 0;
    using Element = typename formats::FactorBits<DTYPE>::Type;

    const Element *next; // of the thread's first element in the next slice
    bool inside[ALONG_ROWS ? 1 : LOADS];

    FORGE_DEVICE static int row() { return ALONG_ROWS ? threadIdx.x % TILE : threadIdx.x / DEPTH; }
    FORGE_DEVICE static int depth() {
        return ALONG_ROWS ? threadIdx.x / TILE : threadIdx.x % DEPTH;
    }

    FORGE_DEVICE Slice(const Operand &operand, u32 first_row, u32 rows) {
        next = static_cast<const Element *>(operand.data) + (first_row + row()) * operand.row +
               depth() * operand.depth;
#pragma unroll
        for (int i = 0; i < (ALONG_ROWS ? 1 : LOADS); ++i)
            inside[i] = first_row + row() + i * ROW_STEP < rows;
    }

    // `left_over`: terms from this slice on.
    FORGE_DEVICE void load(float (&out)[LOADS], const Operand &operand, int left_over) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const bool exists = inside[ALONG_ROWS ? 0 : i] && depth() + i * DEPTH_STEP < left_over;
            const Element *p = next + i * (ROW_STEP * operand.row + DEPTH_STEP * operand.depth);
            out[i] = exists ? formats::load_factor<DTYPE>(p, 0) : 0.0f;
        }
        next += DEPTH * operand.depth;
    }

    FORGE_DEVICE static void store(float (*shared)[TILE + 4], const float (&values)[LOADS]) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i)
            shared[depth() + i * DEPTH_STEP][row() + i * ROW_STEP] = values[i];
    }
};

} // namespace exact
} // namespace forge

using namespace forge;
using namespace forge::exact;

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    forge_exact(const __grid_constant__ Params p) {
    // Rows padded by 16 bytes: stores along the depth meet fewer banks twice.
    __shared__ __align__(16) float left[2][DEPTH][TILE + 4];
    __shared__ __align__(16) float right[2][DEPTH][TILE + 4];
    const u32 rows = static_cast<u32>(p.rows), cols = static_cast<u32>(p.cols);
    const u32 across = (cols + TILE - 1) / TILE;
    const u32 row0 = blockIdx.x / across * TILE, col0 = blockIdx.x % across * TILE;
    // A thread's rows and columns: four from `4·t`, four from 64 on, so that reads of shared memory
    // are 16 bytes wide and meet no bank twice.
    const int tr = static_cast<int>(threadIdx.x) / 16 * 4,
              tc = static_cast<int>(threadIdx.x) % 16 * 4;
    const auto row_of = [&](int i) { return row0 + tr + (i < 4 ? i : 60 + i); };
    const auto col_of = [&](int j) { return col0 + tc + (j < 4 ? j : 60 + j); };

    float acc[PER_THREAD][PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i)
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
            const u32 r = row_of(i), c = col_of(j);
            const bool inside = p.initial != nullptr && r < rows && c < cols;
            acc[i][j] = inside ? p.initial[static_cast<u64>(r) * p.initial_stride + c] : 0.0f;
        }

    for (u64 s = 0; s < p.n_segments; ++s) {
        const Segment &segment = p.segments[s];
        Slice<FORGE_LEFT, FORGE_LEFT_ROWS != 0> from_left(segment.left, row0, rows);
        Slice<FORGE_RIGHT, FORGE_RIGHT_ROWS != 0> from_right(segment.right, col0, cols);
        float a[LOADS], b[LOADS];
        int left_over = static_cast<int>(segment.terms);
        from_left.load(a, segment.left, left_over);
        from_right.load(b, segment.right, left_over);
        __syncthreads(); // the segment before has been read
        from_left.store(left[0], a);
        from_right.store(right[0], b);
        __syncthreads();
        for (int stage = 0; left_over > 0; left_over -= DEPTH, stage ^= 1) {
            const bool more = left_over > DEPTH;
            if (more) {
                from_left.load(a, segment.left, left_over - DEPTH);
                from_right.load(b, segment.right, left_over - DEPTH);
            }
            const auto multiply = [&](int k) {
                float x[PER_THREAD], y[PER_THREAD];
                *reinterpret_cast<float4 *>(x) =
                    *reinterpret_cast<const float4 *>(&left[stage][k][tr]);
                *reinterpret_cast<float4 *>(x + 4) =
                    *reinterpret_cast<const float4 *>(&left[stage][k][64 + tr]);
                *reinterpret_cast<float4 *>(y) =
                    *reinterpret_cast<const float4 *>(&right[stage][k][tc]);
                *reinterpret_cast<float4 *>(y + 4) =
                    *reinterpret_cast<const float4 *>(&right[stage][k][64 + tc]);
#pragma unroll
                for (int i = 0; i < PER_THREAD; ++i)
#pragma unroll
                    for (int j = 0; j < PER_THREAD; ++j)
                        acc[i][j] = __fmaf_rn(x[i], y[j], acc[i][j]);
            };
            // Terms beyond the last are left out and not added as zeros: −0 + 0 is +0.
            if (left_over >= DEPTH) {
#pragma unroll 2
                for (int k = 0; k < DEPTH; ++k)
                    multiply(k);
            } else {
#pragma unroll 1
                for (int k = 0; k < left_over; ++k)
                    multiply(k);
            }
            if (more) {
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
            const u32 r = row_of(i), c = col_of(j);
            if (r < rows && c < cols)
                formats::store_factor<FORGE_OUT>(p.out, static_cast<u64>(r) * p.out_stride + c,
                                                 acc[i][j]);
        }
}
