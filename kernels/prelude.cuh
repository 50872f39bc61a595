// What every kernel starts with. NVRTC compiles these sources alone: no header of a toolkit is
// needed.
#pragma once

#ifndef FORGE_EXACT
#define FORGE_EXACT 0
#endif

namespace forge {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

static_assert(sizeof(u64) == 8 && sizeof(void *) == 8, "64-bit only");

#define FORGE_DEVICE __device__ __forceinline__

template <int N> struct Constant {
    static constexpr int value = N;
};
// Calls f(Constant<0>), ..., f(Constant<N - 1>): a loop whose index is a template argument.
template <int N, int I = 0, class F> FORGE_DEVICE void for_constants(F &&f) {
    if constexpr (I < N) {
        f(Constant<I>{});
        for_constants<N, I + 1>(f);
    }
}

// The scalars of a step in the form the tiles use; `backend::Step` on the host side.
struct StepScalars {
    float constants[16]; // of the rule
    float grad_scale;    // multiplies dW; carries the sign of `maximize`
    u32 key[2];          // Philox key: seed (low), parameter id
    u32 step;            // Philox counter word 2
    u32 seed_high;       // Philox counter word 3
};

// By value, or where the host does not know them (a captured graph), from device memory.
struct StepSource {
    StepScalars value;
    const StepScalars *device; // null: use `value`
};

// What a tile, or all tiles of a consumer, tell about themselves; a reduction in a fixed order
// makes a report of them.
struct TilePartial {
    double sum_of_squares; // of dW, before grad_scale
    u32 nonfinite;         // tiles where dW was not finite: they were left alone
    u32 tiles;             // of a fused kernel; else 0
};

FORGE_DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
FORGE_DEVICE u32 float_to_bits(float value) { return __float_as_uint(value); }
FORGE_DEVICE bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }
FORGE_DEVICE bool is_finite(float x) { return fabsf(x) <= 3.4028234663852886e38f; }

} // namespace forge
