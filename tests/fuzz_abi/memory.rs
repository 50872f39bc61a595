//! Random numbers that a printed seed repeats, and memory that notices stray writes.

use half::{bf16, f16};

/// SplitMix64 (Steele, Lea & Flood, 2014).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In `0..n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// True in so many of a hundred cases.
    pub fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// A multiple of `1 / parts` in `-most / parts ..= most / parts`.
    pub fn fraction(&mut self, most: i64, parts: f32) -> f32 {
        (self.below((2 * most + 1) as usize) as i64 - most) as f32 / parts
    }
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

    /// Everything, guard bands included.
    pub fn snapshot(&self) -> Vec<u8> {
        // SAFETY: the whole allocation, which nobody writes meanwhile.
        unsafe { std::slice::from_raw_parts(self.base, self.words * 8).to_vec() }
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
