// wgmma (PTX ISA 9.7.15): D[64×N] (+)= A·B over 16 tokens, both operands in shared memory with the
// token as their slow dimension ("MN-major", transposed). The accumulators must be named one by
// one.
#pragma once
#include "prelude.cuh"

namespace forge {

FORGE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FORGE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> FORGE_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving an accumulator across the asynchronous instructions that own it.
FORGE_DEVICE void wgmma_pin(float &accumulator) { asm volatile("" : "+f"(accumulator)::"memory"); }

// Lower word of the descriptor of a tile of [tokens, 64·k features] in atoms of 64 features, rows
// of 128 bytes: `address` of the first atom, in units of 16 bytes, and ATOM_BYTES to the next 64
// features. What is added to it moves the tile, in the same units.
template <u32 ATOM_BYTES> FORGE_DEVICE u32 wgmma_descriptor(u32 address) {
    constexpr u32 LEADING = ATOM_BYTES >> 4;
    return ((address & 0x3FFFFu) >> 4) | (LEADING << 16);
}
// The upper word: 1024 bytes to the next 8 tokens, 128-byte swizzle.
constexpr u32 WGMMA_DESCRIPTOR_UPPER = 1024 >> 4 | 1u << 30;

#if FORGE_FACTOR == 1
#define FORGE_WGMMA_TYPES "f32.bf16.bf16"
#elif FORGE_FACTOR == 2
#define FORGE_WGMMA_TYPES "f32.f16.f16"
#else
#error "wgmma multiplies bf16 or fp16 factors"
#endif

// The accumulators as operands, eight at a time; K is their constraint.
#define FORGE_WGMMA_8(K, I)                                                                        \
    K(d[I]), K(d[I + 1]), K(d[I + 2]), K(d[I + 3]), K(d[I + 4]), K(d[I + 5]), K(d[I + 6]),         \
        K(d[I + 7])
#define FORGE_WGMMA_32(K, I)                                                                       \
    FORGE_WGMMA_8(K, I), FORGE_WGMMA_8(K, I + 8), FORGE_WGMMA_8(K, I + 16), FORGE_WGMMA_8(K, I + 24)
#define FORGE_WGMMA_FIRST_32(K) FORGE_WGMMA_32(K, 0)
#define FORGE_WGMMA_FIRST_64(K) FORGE_WGMMA_FIRST_32(K), FORGE_WGMMA_32(K, 32)
#define FORGE_WGMMA_FIRST_96(K) FORGE_WGMMA_FIRST_64(K), FORGE_WGMMA_32(K, 64)
#define FORGE_WGMMA_32_NAMES                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "                                           \
    "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "                                 \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define FORGE_WGMMA_64_NAMES                                                                       \
    FORGE_WGMMA_32_NAMES ", "                                                                      \
                         "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "            \
                         "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "            \
                         "%56, %57, %58, %59, %60, %61, %62, %63"
#define FORGE_WGMMA_96_NAMES                                                                       \
    FORGE_WGMMA_64_NAMES ", "                                                                      \
                         "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, "            \
                         "%76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, "            \
                         "%88, %89, %90, %91, %92, %93, %94, %95"
// N, its registers; A, B, UPPER: the operands behind these.
#define FORGE_WGMMA(N, REGISTERS, K, ADDS, A, B, UPPER)                                            \
    asm volatile("{\n.reg .b64 a, b;\n"                                                            \
                 "mov.b64 a, {%" A ", %" UPPER "};\nmov.b64 b, {%" B ", %" UPPER "};\n"            \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16." FORGE_WGMMA_TYPES                   \
                 " {" FORGE_WGMMA_##REGISTERS##_NAMES "}, a, b, " ADDS ", 1, 1, 1, 1;\n}"          \
                 : FORGE_WGMMA_FIRST_##REGISTERS(K)                                                \
                 : "r"(a), "r"(b), "n"(WGMMA_DESCRIPTOR_UPPER))

// D = A·B, or with ADDS D += A·B. `a`, `b`: wgmma_descriptor.
template <int N, bool ADDS, int REGISTERS>
FORGE_DEVICE void wgmma(float (&d)[REGISTERS], u32 a, u32 b) {
    static_assert(N == 64 || N == 128 || N == 192, "no other widths are written out");
    static_assert(REGISTERS >= N / 2, "the accumulators of N columns");
    if constexpr (N == 64 && ADDS)
        FORGE_WGMMA(64, 32, "+f", "1", "32", "33", "34");
    else if constexpr (N == 64)
        FORGE_WGMMA(64, 32, "=f", "0", "32", "33", "34");
    else if constexpr (N == 128 && ADDS)
        FORGE_WGMMA(128, 64, "+f", "1", "64", "65", "66");
    else if constexpr (N == 128)
        FORGE_WGMMA(128, 64, "=f", "0", "64", "65", "66");
    else if constexpr (ADDS)
        FORGE_WGMMA(192, 96, "+f", "1", "96", "97", "98");
    else
        FORGE_WGMMA(192, 96, "=f", "0", "96", "97", "98");
}

} // namespace forge
