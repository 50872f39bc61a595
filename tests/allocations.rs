//! No buffer of the size of a weight gradient is ever allocated: counted by the allocator itself.
//! (A test binary of its own: the counters are the process's.)

mod common;

use common::*;
use forge::backend::{Image, NormMethod};
use forge::format::Dtype;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// `(largest single allocation, peak above the start)` of `work`.
fn measure(work: impl FnOnce()) -> (usize, usize) {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    LARGEST.store(0, Ordering::Relaxed);
    work();
    (LARGEST.load(Ordering::Relaxed), PEAK.load(Ordering::Relaxed) - before)
}

#[test]
fn no_allocation_of_a_gradients_size() {
    let (out, inn, tokens) = (4096, 2048, 64);
    let gradient = out * inn * 2; // even in bf16
    for (weight, state, dtype) in
        [(WEIGHTS[0], STATES[0], Dtype::F32), (WEIGHTS[2], STATES[3], Dtype::Bf16)]
    {
        let cpu = cpu(2);
        let mut r = Random(1);
        let scheme = scheme("adamw", 0, weight, state, dtype);
        let mut p = Parameter::random(&mut r, scheme, &cpu, out, inn);
        let segments = [Segment::random(&mut r, tokens, out, inn, dtype)];
        let all = factors(&segments);
        let (largest, peak) = measure(|| {
            p.update(&all, None, &scalars("adamw", 1));
            for method in [NormMethod::Gram, NormMethod::Tiles] {
                p.norm(&all, method);
            }
        });
        println!("update and norms: largest {largest} B, peak {peak} B, gradient {gradient} B");
        // Two threads, each with a tile, two converted chunks and the GEMM's packing buffers.
        assert!(largest <= 2 << 20, "{largest}");
        assert!(peak < gradient / 2, "{peak}");

        // The counter does see a gradient where there is one.
        let (largest, _) = measure(|| p.update_two_phase(&cpu, &all, &scalars("adamw", 2)));
        assert!(largest >= out * inn * 4);
        let _ = p.export(Image::Weight);
    }
}
