// CUDA C++ for the host's compiler: as much of it as kernels/ uses, for one block at a time. A
// thread of the block is a fiber, which runs until it waits for others; so everything is
// deterministic, and a second run in another order (`Order`) tells whether a result depends on the
// order.
//
// What is wrong on a device fails here or shows in the result: shared memory begins as NaNs, and
// threads that wait at different places, or for one that is gone, are an error.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Of the block: all its fibers run on one thread of the host.
#define __shared__ thread_local

using std::max;
using std::min;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index {
    unsigned x, y, z;
};
static thread_local Index threadIdx, blockIdx, gridDim;

// Dynamic shared memory, and a band behind it that nobody may write.
constexpr unsigned MOST_SHARED = 232448, BAND = 4096;
alignas(1024) static thread_local unsigned char shared[MOST_SHARED + BAND];

namespace emulated {

enum class Order { Ascending, Descending };
enum class Wait : unsigned { Block, BlockOr, Warp, Exchange, Matrices, Product };

// Where threads wait for each other.
struct Meeting {
    unsigned members = 0, arrived = 0, round = 0;
    Wait what = Wait::Block;
};

// A copy that was asked for and has not come yet.
struct Copy {
    unsigned target;
    const void *source;
    unsigned bytes, group;
};

struct Warp {
    Meeting meeting;
    // What lanes show each other; two rounds, since some lanes may be one ahead.
    alignas(16) unsigned char shown[2][32][32];
};

struct Fiber {
    ucontext_t first;
    jmp_buf resume;
    bool started = false, done = false;
    const Meeting *waits = nullptr; // until its round is another
    unsigned round = 0;
    std::vector<Copy> copies;
    unsigned groups = 0; // of copies
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Meeting meeting;
    int any[2] = {0, 0};
    jmp_buf scheduler;
    ucontext_t scheduler_first;
    unsigned shared_bytes = 0;
    unsigned resumed = 0; // how often a fiber was
    const char *wrong = nullptr;
};

static thread_local Block *block;
static thread_local unsigned current;
constexpr size_t STACK = 128 << 10;

inline Fiber &fiber() { return block->fibers[current]; }
inline Warp &warp() { return block->warps[current / 32]; }
inline unsigned lane() { return current % 32; }

[[noreturn]] inline void to_scheduler() { _longjmp(block->scheduler, 1); }
[[noreturn]] inline void fail(const char *why) {
    block->wrong = why;
    to_scheduler();
}

inline void release(Meeting &meeting) {
    if (meeting.arrived == 0 || meeting.arrived < meeting.members)
        return;
    meeting.arrived = 0;
    ++meeting.round;
}

inline void meet(Meeting &meeting, Wait what) {
    if (meeting.arrived++ == 0)
        meeting.what = what;
    else if (meeting.what != what)
        fail("threads wait at different places");
    Fiber &self = fiber();
    self.waits = &meeting;
    self.round = meeting.round;
    release(meeting);
    if (meeting.round == self.round && _setjmp(self.resume) == 0)
        to_scheduler();
}

// What every lane of the warp shows: an array by lane, until the lane's next exchange.
template <class T> const T *show(const T &mine, Wait what = Wait::Exchange) {
    static_assert(sizeof(T) <= 32, "a lane's place");
    Warp &all = warp();
    auto &shown = all.shown[all.meeting.round % 2];
    std::memcpy(reinterpret_cast<T *>(shown) + lane(), &mine, sizeof(T));
    meet(all.meeting, what);
    return reinterpret_cast<const T *>(shown);
}

// The bytes of dynamic shared memory from `at` on, all of them inside.
inline unsigned char *inside(unsigned at, unsigned bytes) {
    if (at % bytes != 0 || at + bytes > block->shared_bytes)
        fail("shared memory: an address outside, or not aligned");
    return shared + at;
}

// --- a block ---

static thread_local void (*body)(void *);
static thread_local void *body_data;

inline void first_call() {
    body(body_data);
    Fiber &self = fiber();
    if (!self.copies.empty())
        fail("a thread ends before its copies have come");
    self.done = true;
    for (Meeting *meeting : {&block->meeting, &warp().meeting}) {
        --meeting->members;
        release(*meeting);
    }
    to_scheduler();
}

inline void resume(unsigned index) {
    current = index;
    threadIdx = {index, 0, 0};
    Fiber &next = fiber();
    if (_setjmp(block->scheduler) != 0)
        return;
    if (next.started)
        _longjmp(next.resume, 1);
    next.started = true;
    swapcontext(&block->scheduler_first, &next.first);
}

// Runs a warp until each of its lanes waits for another warp, or has ended: warps get as far apart
// as barriers let them. Returns how many lanes have ended.
inline unsigned run_warp(unsigned index, Order order) {
    unsigned ended = 0;
    const unsigned first = 32 * index;
    const unsigned lanes = min(32u, static_cast<unsigned>(block->fibers.size()) - first);
    for (bool progress = true; progress;) {
        progress = false;
        for (unsigned i = 0; i < lanes; ++i) {
            const unsigned lane = order == Order::Ascending ? i : lanes - 1 - i;
            Fiber &next = block->fibers[first + lane];
            if (next.done || (next.waits != nullptr && next.waits->round == next.round))
                continue;
            next.waits = nullptr;
            progress = true;
            ++block->resumed;
            resume(first + lane);
            if (block->wrong != nullptr)
                return ended;
            ended += next.done;
        }
    }
    return ended;
}

// Runs the threads of a block to their end. Returns what went wrong, or null.
inline const char *run_block(unsigned threads, unsigned shared_bytes, Order order,
                             unsigned char *stacks) {
    Block all;
    block = &all;
    all.fibers.resize(threads);
    all.warps.resize((threads + 31) / 32);
    all.shared_bytes = shared_bytes;
    all.meeting.members = threads;
    std::memset(shared, 0xFF, shared_bytes + BAND);
    for (unsigned i = 0; i < threads; ++i) {
        ++all.warps[i / 32].meeting.members;
        ucontext_t &first = all.fibers[i].first;
        getcontext(&first);
        first.uc_stack.ss_sp = stacks + i * STACK;
        first.uc_stack.ss_size = STACK;
        first.uc_link = nullptr;
        makecontext(&first, first_call, 0);
    }
    for (unsigned left = threads; left > 0;) {
        const unsigned before = all.resumed;
        for (unsigned i = 0; i < all.warps.size() && all.wrong == nullptr; ++i)
            left -= run_warp(order == Order::Ascending ? i : all.warps.size() - 1 - i, order);
        if (all.wrong != nullptr)
            return all.wrong;
        if (all.resumed == before)
            return "threads wait for each other for ever";
    }
    for (unsigned i = 0; i < BAND; ++i)
        if (shared[shared_bytes + i] != 0xFF)
            return "written behind the dynamic shared memory";
    return nullptr;
}

} // namespace emulated

// --- what CUDA C++ has names for ---

inline void __syncthreads() { emulated::meet(emulated::block->meeting, emulated::Wait::Block); }
inline int __syncthreads_or(int value) {
    emulated::Block &block = *emulated::block;
    int &any = block.any[block.meeting.round % 2];
    if (block.meeting.arrived == 0)
        any = 0;
    any |= value;
    emulated::meet(block.meeting, emulated::Wait::BlockOr);
    return any;
}
inline void __syncwarp() { emulated::meet(emulated::warp().meeting, emulated::Wait::Warp); }

template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulated::show(value)[emulated::lane() ^ mask];
}
template <class T> T __shfl_down_sync(unsigned, T value, unsigned by) {
    const unsigned from = emulated::lane() + by;
    return emulated::show(value)[from < 32 ? from : emulated::lane()];
}
inline int __any_sync(unsigned, int value) {
    const int *all = emulated::show(value);
    return std::any_of(all, all + 32, [](int one) { return one != 0; });
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    const unsigned *all = emulated::show(value);
    unsigned sum = 0;
    for (int i = 0; i < 32; ++i)
        sum += all[i];
    return sum;
}

template <class To, class From> To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }
inline double __longlong_as_double(long long bits) { return same_bits<double>(bits); }

// Compiled with -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
// Upwards: the product is exact in fp64, the sum has an error that says where it lies.
inline float __fmaf_ru(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, addend = c, sum = product + addend;
    const double part = sum - product;
    const double error = (product - (sum - part)) + (addend - part);
    const float near = static_cast<float>(sum);
    const bool below = near < sum || (near == sum && error > 0.0);
    return below ? std::nextafterf(near, INFINITY) : near;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i)
        out |= static_cast<unsigned>(bytes >> (selector >> (4 * i) & 7) * 8 & 0xFF) << (8 * i);
    return out;
}

template <class T> T __ldcs(const T *from) { return *from; }
template <class T> void __stcs(T *to, T value) { *to = value; }
