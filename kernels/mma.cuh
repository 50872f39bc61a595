// Products by mma.sync (PTX ISA 9.7.14) and copies by cp.async (9.7.9.25), from compute capability
// 8.0 on.
#pragma once
#include "instructions.cuh"

namespace forge {

// 16 bytes, of which the first `bytes` are read and the rest are zeros.
FORGE_DEVICE void copy_async(u32 target, const void *source, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(bytes)
                 : "memory");
}
FORGE_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last N groups have come, for the thread that asked for them.
template <int N> FORGE_DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

FORGE_DEVICE float shared_load_f32(u32 at) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
    return value;
}

// Four matrices of 8 × 8, transposed; a lane's address is of row lane%8 of matrix lane/8.
FORGE_DEVICE void load_transposed(u32 at, u32 (&matrices)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(at)
                 : "memory");
}

// fp32 factors are multiplied as bf16.
#if FORGE_FACTOR <= 1
#define FORGE_MMA_TYPES "f32.bf16.bf16.f32"
#else
#define FORGE_MMA_TYPES "f32.f16.f16.f32"
#endif

// D[16×8] += A[16×16] · B[16×8].
FORGE_DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col." FORGE_MMA_TYPES
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

} // namespace forge
