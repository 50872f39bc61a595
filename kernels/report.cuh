// forge_report and forge_norm of the C ABI, as kernels write them.
#pragma once
#include "prelude.cuh"

namespace forge {

struct Report {
    u32 struct_size, reserved;
    u64 tiles, nonfinite_tiles;
    double sum_of_squares;
};
struct Norm {
    u32 struct_size, method;
    double sum_of_squares;
    u32 nonfinite, reserved;
};
static_assert(sizeof(Report) == 32 && sizeof(Norm) == 24, "the C ABI's");

FORGE_DEVICE Norm norm_of(double sum, u64 nonfinite, u32 method) {
    // The square of an fp32 does not overflow an fp64: the sum is finite exactly if dW is.
    const bool overflowed = !is_finite(sum);
    const bool bad = nonfinite > 0 || overflowed;
    const double told = bad && !overflowed ? __longlong_as_double(0x7FF8000000000000ll) : sum;
    return {sizeof(Norm), method, told, bad ? 1u : 0u, 0};
}

} // namespace forge
