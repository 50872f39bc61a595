//! Random numbers that a printed seed repeats, and memory that notices stray writes.

use half::{bf16, f16};
use std::collections::VecDeque;

/// Choices: of a seed, which repeats them, or of a fuzzer's bytes, which then decide what is called.
pub struct Random {
    /// SplitMix64 (Steele, Lea & Flood, 2014).
    state: u64,
    /// What is left of a fuzzer's input; choices are taken from it until it is empty.
    bytes: Option<VecDeque<u8>>,
}

impl Random {
    pub fn seeded(seed: u64) -> Self {
        Self { state: seed, bytes: None }
    }

    /// The input's first two bytes seed the *contents* of arrays, all others are choices: a fuzzer
    /// then changes one choice with one byte, and needs no bytes for what it cannot learn from.
    pub fn from_bytes(input: &[u8]) -> Self {
        let (seed, choices) = input.split_at(input.len().min(2));
        let state = seed.iter().fold(0, |s, b| s << 8 | u64::from(*b));
        Self { state, bytes: Some(choices.iter().copied().collect()) }
    }

    /// Whether the input is used up; a seed never is.
    pub fn is_used_up(&self) -> bool {
        self.bytes.as_ref().is_some_and(VecDeque::is_empty)
    }

    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// So many bytes of choice as one number.
    fn choice(&mut self, bytes: usize) -> u64 {
        match &mut self.bytes {
            None => self.next(),
            Some(input) => {
                (0..bytes).fold(0, |n, _| n << 8 | u64::from(input.pop_front().unwrap_or(0)))
            }
        }
    }

    /// In `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.choice(if n <= 256 { 1 } else { 3 }) % n as u64) as usize
    }

    /// Any number, often one at the edge of something.
    pub fn any(&mut self) -> u64 {
        const EDGES: &[u64] = &[0, 1, 2, 3, 127, 128, 129, 1 << 31, 1 << 32, 1 << 62, 1 << 63];
        match self.below(4) {
            0 => self.pick(EDGES),
            1 => self.pick(EDGES).wrapping_neg(),
            2 => self.choice(1),
            _ => self.choice(8),
        }
    }

    /// True in so many of a hundred cases.
    pub fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A multiple of `1 / parts` in `-most / parts ..= most / parts`. Contents, not a choice.
    pub fn fraction(&mut self, most: i64, parts: f32) -> f32 {
        ((self.next() % (2 * most + 1) as u64) as i64 - most) as f32 / parts
    }
}

/// AddressSanitizer's red zones, where the build has it (`--cfg forge_asan`): a guard band shows
/// what was written there, a red zone also what was read.
mod red_zone {
    #[cfg(forge_asan)]
    unsafe extern "C" {
        pub fn __asan_poison_memory_region(address: *const u8, bytes: usize);
        pub fn __asan_unpoison_memory_region(address: *const u8, bytes: usize);
    }
    /// # Safety
    /// The bytes belong to the caller.
    #[cfg(not(forge_asan))]
    pub unsafe fn __asan_poison_memory_region(_: *const u8, _: usize) {}
    /// # Safety
    /// The bytes belong to the caller.
    #[cfg(not(forge_asan))]
    pub unsafe fn __asan_unpoison_memory_region(_: *const u8, _: usize) {}
}

const GUARD: usize = 64;
const PATTERN: u8 = 0xA5;

/// `bytes` bytes, aligned to 8, between two guard bands. All access goes through the one raw pointer,
/// as the library under test accesses it too.
pub struct Guarded {
    base: *mut u8,
    words: usize,
    bytes: usize,
}

impl Guarded {
    pub fn new(bytes: usize) -> Self {
        let words = (bytes + 2 * GUARD).div_ceil(8);
        let pattern = u64::from_ne_bytes([PATTERN; 8]);
        let base = Box::into_raw(vec![pattern; words].into_boxed_slice()).cast();
        let memory = Self { base, words, bytes };
        // SAFETY: the payload lies within the allocation.
        unsafe { memory.ptr().write_bytes(0, bytes) };
        memory.set_guarded(true);
        memory
    }

    /// A struct or scalar in guarded memory.
    pub fn holding<T: Copy>(value: T) -> Self {
        let memory = Self::new(size_of::<T>());
        // SAFETY: room for one T, aligned to 8, which every C struct here is content with.
        unsafe { memory.ptr().cast::<T>().write(value) };
        memory
    }

    pub fn ptr(&self) -> *mut u8 {
        self.base.wrapping_add(GUARD)
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn read<T: Copy>(&self) -> T {
        assert!(size_of::<T>() <= self.bytes);
        // SAFETY: within the payload, aligned to 8; only used for types without invalid bits.
        unsafe { self.ptr().cast::<T>().read() }
    }

    /// Makes the guard bands red zones, or readable for whoever checks them.
    fn set_guarded(&self, guarded: bool) {
        let behind = self.ptr().wrapping_add(self.bytes);
        let rest = self.words * 8 - GUARD - self.bytes;
        for (address, bytes) in [(self.base, GUARD), (behind, rest)] {
            // SAFETY: the allocation's own bytes.
            unsafe {
                if guarded {
                    red_zone::__asan_poison_memory_region(address, bytes);
                } else {
                    red_zone::__asan_unpoison_memory_region(address, bytes);
                }
            }
        }
    }

    /// Everything, guard bands included.
    pub fn snapshot(&self) -> Vec<u8> {
        self.set_guarded(false);
        // SAFETY: the whole allocation, which nobody writes meanwhile.
        let all = unsafe { std::slice::from_raw_parts(self.base, self.words * 8).to_vec() };
        self.set_guarded(true);
        all
    }

    /// The payload of a snapshot.
    pub fn payload<'a>(&self, snapshot: &'a [u8]) -> &'a [u8] {
        &snapshot[GUARD..GUARD + self.bytes]
    }

    pub fn guards_are_intact(&self) -> bool {
        let all = self.snapshot();
        all[..GUARD].iter().chain(&all[GUARD + self.bytes..]).all(|b| *b == PATTERN)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.set_guarded(false);
        let words = std::ptr::slice_from_raw_parts_mut(self.base.cast::<u64>(), self.words);
        // SAFETY: made by Box::into_raw with this length.
        drop(unsafe { Box::from_raw(words) });
    }
}

/// Writes element `i` of an array of `dtype`.
pub fn store(dtype: u32, memory: &Guarded, i: usize, value: f32) {
    let bytes = match dtype {
        1 => value.to_ne_bytes().to_vec(),
        2 => bf16::from_f32(value).to_ne_bytes().to_vec(),
        3 => f16::from_f32(value).to_ne_bytes().to_vec(),
        _ => unreachable!("floats only"),
    };
    assert!((i + 1) * bytes.len() <= memory.bytes());
    // SAFETY: within the payload.
    unsafe { memory.ptr().add(i * bytes.len()).copy_from(bytes.as_ptr(), bytes.len()) };
}

/// Reads element `i` of an array of `dtype`.
pub fn load(dtype: u32, payload: &[u8], i: usize) -> f64 {
    let at = |n: usize| &payload[i * n..(i + 1) * n];
    match dtype {
        1 => f64::from(f32::from_ne_bytes(at(4).try_into().unwrap())),
        2 => f64::from(bf16::from_ne_bytes(at(2).try_into().unwrap())),
        3 => f64::from(f16::from_ne_bytes(at(2).try_into().unwrap())),
        _ => unreachable!("floats only"),
    }
}
