// The PTX instructions of sm_90 that CUDA C++ has no name for: shared memory by address and as
// matrices, barriers in it, the tensor memory accelerator (TMA), register re-allocation. PTX
// ISA 8.x, the sections named beside each.
#pragma once
#include "instructions.cuh"

namespace forge {

// Opaque to us; cuTensorMapEncodeTiled fills it on the host.
struct alignas(64) TensorMap {
    u8 opaque[128];
};

// A value that is the same in all lanes of the warp, as one that the compiler knows to be uniform.
FORGE_DEVICE u32 warp_uniform(u32 value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }
FORGE_DEVICE u32 warp_index() { return warp_uniform(threadIdx.x / 32); }

// True in one lane of the warp, always the same one.
FORGE_DEVICE bool elect_one() {
    u32 elected;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "elect.sync _|p, 0xFFFFFFFF;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(elected));
    return elected != 0;
}

// --- shared memory by address; ldmatrix and stmatrix (9.7.14.5) ---

FORGE_DEVICE u32 shared_load_u16(u32 at) {
    u16 value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(at) : "memory");
    return value;
}
FORGE_DEVICE void shared_store_u16(u32 at, u32 value) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(static_cast<u16>(value)) : "memory");
}
FORGE_DEVICE float2 shared_load_f32x2(u32 at) {
    float2 value;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(value.x), "=f"(value.y)
                 : "r"(at)
                 : "memory");
    return value;
}
FORGE_DEVICE void shared_store_f32x2(u32 at, float2 value) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(value.x), "f"(value.y)
                 : "memory");
}

// A lane's pairs of 16-bit elements. One: at its own address. Four: as 8×8 matrices, of each of
// which a lane has columns 2·(lane%4) and the next of row lane/4; the address that it gives is of
// row lane%8 of matrix lane/8.
FORGE_DEVICE void pairs_load(u32 at, u32 (&pairs)[1]) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pairs[0]) : "r"(at) : "memory");
}
FORGE_DEVICE void pairs_store(u32 at, const u32 (&pairs)[1]) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(pairs[0]) : "memory");
}
FORGE_DEVICE void pairs_load(u32 at, u32 (&pairs)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"(at)
                 : "memory");
}
FORGE_DEVICE void pairs_store(u32 at, const u32 (&pairs)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                 : "memory");
}

// --- mbarrier (9.7.13.15). Without `.release.cluster`: that spelling costs a GPU-wide fence. ---

FORGE_DEVICE void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
// Makes initialised barriers visible to the TMA unit.
FORGE_DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FORGE_DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
FORGE_DEVICE void barrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
// Whether the phase is over; does not wait for it.
FORGE_DEVICE bool barrier_test(u32 barrier, u32 parity) {
    u32 done;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}
FORGE_DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra ready;\n"
                 "bra again;\n"
                 "ready:\n"
                 "}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// On the barrier at the same place in block `rank` of the cluster.
FORGE_DEVICE void barrier_arrive_in(u32 barrier, u32 rank) {
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

// --- clusters (9.7.13.4, 10) ---

FORGE_DEVICE u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
FORGE_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// --- atomics (9.7.13.7) ---

// Adds one, or goes to 0 from `most`; the value before. What this thread wrote before is seen by
// who counts further, and what those wrote who counted so far is seen by this thread.
FORGE_DEVICE u32 atomic_increment(u32 *counter, u32 most) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(most)
                 : "memory");
    return before;
}

// --- named barriers (9.7.13.1): ids 1.. ; 0 is __syncthreads ---

FORGE_DEVICE void named_barrier_sync(u32 id, u32 threads) {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FORGE_DEVICE void named_barrier_arrive(u32 id, u32 threads) {
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Whether the predicate holds in any of the threads.
FORGE_DEVICE bool named_barrier_any(u32 id, u32 threads, bool predicate) {
    u32 any;
    asm volatile("{\n"
                 ".reg .pred in, out;\n"
                 "setp.ne.u32 in, %3, 0;\n"
                 "barrier.cta.red.or.pred.aligned out, %1, %2, in;\n"
                 "selp.u32 %0, 1, 0, out;\n"
                 "}"
                 : "=r"(any)
                 : "r"(id), "r"(threads), "r"(static_cast<u32>(predicate))
                 : "memory");
    return any != 0;
}

// --- TMA (9.7.9.27) ---

// How long the L2 should keep what is loaded: the values of `createpolicy` for all of an access.
constexpr u64 L2_KEEP = 0x14F0000000000000ull;   // evict_last
constexpr u64 L2_LET_GO = 0x12F0000000000000ull; // evict_first

FORGE_DEVICE void tma_load_2d(u32 target, const TensorMap *map, u32 barrier, i32 c0, i32 c1,
                              u64 policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes."
                 "L2::cache_hint "
                 "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
                 "l"(map), "r"(barrier), "r"(c0), "r"(c1), "l"(policy)
                 : "memory");
}
// To the same place in each block of the cluster whose bit is set in `blocks`, telling each one's
// barrier.
FORGE_DEVICE void tma_load_2d_multicast(u32 target, const TensorMap *map, u32 barrier, i32 c0,
                                        i32 c1, u32 blocks, u64 policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes."
                 "multicast::cluster.L2::cache_hint "
                 "[%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(target),
                 "l"(map), "r"(barrier), "r"(c0), "r"(c1), "h"(static_cast<u16>(blocks)),
                 "l"(policy)
                 : "memory");
}
FORGE_DEVICE void tma_load_3d(u32 target, const TensorMap *map, u32 barrier, i32 c0, i32 c1,
                              i32 c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(target),
                 "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
                 : "memory");
}
FORGE_DEVICE void tma_load_4d(u32 target, const TensorMap *map, u32 barrier, i32 c0, i32 c1, i32 c2,
                              i32 c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
                 "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}
FORGE_DEVICE void tma_store_3d(const TensorMap *map, u32 source, i32 c0, i32 c1, i32 c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
            map),
        "r"(source), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}
FORGE_DEVICE void tma_store_4d(const TensorMap *map, u32 source, i32 c0, i32 c1, i32 c2, i32 c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            map),
        "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
// Makes a map in global memory one of another address.
FORGE_DEVICE void tensor_map_address(TensorMap *map, u64 address) {
    asm volatile("tensormap.replace.tile.global_address.global.b1024.b64 [%0], %1;" ::"l"(map),
                 "l"(address)
                 : "memory");
}
// What this thread did to maps comes before a fence of the next kind by who uses them.
FORGE_DEVICE void tensor_map_release() {
    asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory");
}
FORGE_DEVICE void tensor_map_acquire(const TensorMap *map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}
FORGE_DEVICE void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the sources of all but the last N groups may be overwritten.
template <int N> FORGE_DEVICE void tma_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// Orders a thread's writes to shared memory before later reads of them by TMA.
FORGE_DEVICE void fence_shared_for_tma() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- registers per warp (9.7.19.5) ---

template <u32 N> FORGE_DEVICE void registers_raise() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <u32 N> FORGE_DEVICE void registers_lower() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

} // namespace forge
