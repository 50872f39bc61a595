// kernels/mma.cuh in C++, in its place on the host.
//
// A copy comes when its thread waits for it, and not before; until then its target holds NaNs. So a
// wait or a barrier that is missing shows in the result.
#pragma once
#include "instructions.cuh"

namespace forge {

FORGE_DEVICE void copy_async(u32 target, const void *source, u32 bytes) {
    if (bytes > 16 || reinterpret_cast<size_t>(source) % 16 != 0)
        emulated::fail("cp.async: a source that is not aligned, or of more than 16 bytes");
    std::memset(emulated::inside(target, 16), 0xFF, 16);
    emulated::fiber().copies.push_back({target, source, bytes, emulated::fiber().groups});
}
FORGE_DEVICE void copies_commit() { ++emulated::fiber().groups; }
template <int N> FORGE_DEVICE void copies_wait() {
    emulated::Fiber &self = emulated::fiber();
    const auto first_left =
        std::find_if(self.copies.begin(), self.copies.end(),
                     [&](const emulated::Copy &copy) { return copy.group + N >= self.groups; });
    for (auto copy = self.copies.begin(); copy != first_left; ++copy) {
        unsigned char *target = emulated::inside(copy->target, 16);
        std::memset(target, 0, 16);
        std::memcpy(target, copy->source, copy->bytes);
    }
    self.copies.erase(self.copies.begin(), first_left);
}

FORGE_DEVICE float shared_load_f32(u32 at) {
    float value;
    std::memcpy(&value, emulated::inside(at, 4), 4);
    return value;
}

FORGE_DEVICE void load_transposed(u32 at, u32 (&matrices)[4]) {
    const u32 *rows = emulated::show(at, emulated::Wait::Matrices);
    const u32 lane = emulated::lane();
    for (u32 m = 0; m < 4; ++m) {
        // Row lane/4 and columns 2·(lane%4) of the transposed matrix.
        u16 pair[2];
        for (u32 i = 0; i < 2; ++i) {
            const u32 row = rows[8 * m + lane % 4 * 2 + i];
            std::memcpy(&pair[i], emulated::inside(row, 16) + lane / 4 * 2, 2);
        }
        matrices[m] = pair[0] | static_cast<u32>(pair[1]) << 16;
    }
}

FORGE_DEVICE double factor_value(u32 pair, u32 half) {
    const u32 bits = pair >> (16 * half) & 0xFFFFu;
    return FORGE_FACTOR <= 1 ? bits_to_float(bits << 16) : widen_f16(bits);
}

// The sixteen products are exact and their sum is rounded once.
FORGE_DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Fragments {
        u32 a[4], b[2];
    };
    const Fragments *all =
        emulated::show(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, emulated::Wait::Product);
    const u32 lane = emulated::lane();
    for (u32 i = 0; i < 4; ++i) {
        const u32 row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        double sum = d[i];
        for (u32 k = 0; k < 16; ++k) {
            const u32 from_a = row % 8 * 4 + k % 8 / 2, from_b = col * 4 + k % 8 / 2;
            sum += factor_value(all[from_a].a[row / 8 + k / 8 * 2], k % 2) *
                   factor_value(all[from_b].b[k / 8], k % 2);
        }
        d[i] = static_cast<float>(sum);
    }
}

} // namespace forge
