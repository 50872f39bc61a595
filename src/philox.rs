//! Philox4x32-10, the counter-based generator behind stochastic rounding.
//!
//! Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Pinned by
//! Random123's published known-answer vectors in the tests below.
//!
//! One call serves eight elements of the *global* matrix with 16 bits each, so a draw depends on
//! (seed, parameter, tensor, step, global element index) and on no tile, thread, launch or rank.
//! Which eight: of every 32 consecutive elements, those that one lane of a quad holds in a tensor
//! core's accumulator, so that on a GPU no lane draws for another: call `4·(i/32) + (i%8)/2`, word
//! `(i%32)/8`, half `i%2`.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Elements that share four Philox calls.
const BLOCK: u64 = 32;

/// The keys of the ten rounds.
pub fn round_keys(key: [u32; 2]) -> [[u32; 2]; 10] {
    let mut keys = [key; 10];
    for round in 1..10 {
        keys[round] =
            [keys[round - 1][0].wrapping_add(WEYL[0]), keys[round - 1][1].wrapping_add(WEYL[1])];
    }
    keys
}

/// Ten rounds of Philox4x32.
#[inline(always)]
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(MULTIPLIER[0]) * u64::from(counter[0]);
        let p1 = u64::from(MULTIPLIER[1]) * u64::from(counter[2]);
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key[1],
            p0 as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Which tensor of a parameter the draws are for: each has its own stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// The weight itself.
    Weight,
    /// The optimizer state of this index.
    State(usize),
}

impl Stream {
    /// Two draws of 16 bits. Weight and the first two states draw from one call, which costs a GPU more
    /// than all else in an update: a bijection of each half puts other bytes on top, so that each stream
    /// is uniform, and any two of them are independent in their upper 8 bits.
    #[inline(always)]
    fn bits(self, word: u32) -> u32 {
        match self {
            Stream::State(0) => (word & 0x00FF_00FF) << 8 | (word >> 8) & 0x00FF_00FF,
            Stream::State(1) => word ^ (word << 8) & 0xFF00_FF00,
            Stream::Weight | Stream::State(_) => word,
        }
    }
}

/// The noise of one parameter at one step.
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    key: [u32; 2],
    step: u32,
    seed_high: u32,
}

impl Noise {
    /// `seed` of the run, `parameter` unique among its parameters, `step` counted from 1.
    pub fn new(seed: u64, parameter: u32, step: u64) -> Self {
        // The step is bounded by the C ABI's check; 2^32 steps outlast any run.
        Self { key: [seed as u32, parameter], step: step as u32, seed_high: (seed >> 32) as u32 }
    }

    /// Key, step and upper half of the seed, for a GPU's kernels.
    pub fn parts(&self) -> ([u32; 2], u32, u32) {
        (self.key, self.step, self.seed_high)
    }

    #[inline(always)]
    fn call(&self, stream: Stream, group: u64) -> [u32; 4] {
        // Weight and the first two states share a call; see `Stream::bits`.
        let own = if matches!(stream, Stream::State(2..)) { 3u32 } else { 0 };
        // 56 bits of group index: 2^59 elements.
        let high = ((group >> 32) as u32 & 0x00FF_FFFF) | (own << 24);
        philox4x32_10([group as u32, high, self.step, self.seed_high], self.key)
            .map(|word| stream.bits(word))
    }

    /// Fills `out` with one uniform 16-bit draw for each element from `first` on.
    #[inline(always)]
    pub fn fill(&self, stream: Stream, first: u64, out: &mut [u16]) {
        let mut done = 0;
        while done < out.len() {
            let index = first + done as u64;
            let within = (index % BLOCK) as usize;
            let take = (BLOCK as usize - within).min(out.len() - done);
            let block = self.block(stream, index / BLOCK);
            out[done..done + take].copy_from_slice(&block[within..within + take]);
            done += take;
        }
    }

    /// The draws of 32 consecutive elements: four calls.
    #[inline(always)]
    fn block(&self, stream: Stream, block: u64) -> [u16; BLOCK as usize] {
        let mut out = [0; BLOCK as usize];
        for lane in 0..4 {
            let words = self.call(stream, 4 * block + lane as u64);
            for (j, word) in words.into_iter().enumerate() {
                out[8 * j + 2 * lane] = word as u16;
                out[8 * j + 2 * lane + 1] = (word >> 16) as u16;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random123_known_answers() {
        // kat_vectors of Random123 1.14: philox4x32 10.
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn draws_depend_on_the_global_index_alone() {
        let noise = Noise::new(0x1234_5678_9abc_def0, 7, 3);
        let mut whole = [0u16; 67];
        noise.fill(Stream::Weight, 5, &mut whole);
        for (i, expected) in whole.iter().enumerate() {
            let mut one = [0u16];
            noise.fill(Stream::Weight, 5 + i as u64, &mut one);
            assert_eq!(one[0], *expected);
        }
    }

    #[test]
    fn streams_steps_seeds_and_parameters_differ() {
        let draw = |seed, parameter, step, stream| {
            let mut out = [0u16; 8];
            Noise::new(seed, parameter, step).fill(stream, 0, &mut out);
            out
        };
        let base = draw(1, 1, 1, Stream::Weight);
        for other in [
            draw(1 << 32 | 1, 1, 1, Stream::Weight),
            draw(2, 1, 1, Stream::Weight),
            draw(1, 2, 1, Stream::Weight),
            draw(1, 1, 2, Stream::Weight),
            draw(1, 1, 1, Stream::State(0)),
        ] {
            assert_ne!(base, other);
        }
    }
}
