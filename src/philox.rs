//! Philox4x32-7, the counter-based generator behind stochastic rounding.
//!
//! Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Seven rounds are
//! the fewest that pass TestU01's BigCrush there; libraries for simulation take ten, as a margin, which a
//! GPU's update pays for (docs/numerics.md). Pinned by Random123's published known-answer vectors in the
//! tests below.
//!
//! A draw has 16 bits and depends on (seed, parameter, tensor, step, global element index) and on no tile,
//! thread, launch or rank. One call, four words, serves 16 elements of the *global* matrix. Which: of every
//! 64 consecutive elements, those that one lane of a quad holds in a tensor core's accumulator, so that on
//! a GPU no lane draws for another: call `4·(i/64) + (i%8)/2`, word `(i%32)/8`, half `i%2`. Elements from
//! 32 to 63 take the halves with their bytes exchanged.

const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Elements that share four Philox calls.
const BLOCK: u64 = 64;

/// Rounds of Philox.
pub const ROUNDS: usize = 7;

/// The keys of all rounds.
pub fn round_keys(key: [u32; 2]) -> [[u32; 2]; ROUNDS] {
    let mut keys = [key; ROUNDS];
    for round in 1..ROUNDS {
        keys[round] =
            [keys[round - 1][0].wrapping_add(WEYL[0]), keys[round - 1][1].wrapping_add(WEYL[1])];
    }
    keys
}

/// Seven rounds of Philox4x32.
#[inline(always)]
pub fn philox4x32_7(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
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
    /// than all else in an update: with the bytes of a word b₃b₂b₁b₀, they have b₃, b₃⊕b₂ and b₃⊕b₂⊕b₁ on
    /// top, cyclically. All draws of a call have different sums of bytes on top, so any two of them, and
    /// the three of one element, are independent in their upper 8 bits; and each is uniform.
    #[inline(always)]
    fn bits(self, word: u32) -> u32 {
        match self {
            Stream::State(0) => word ^ word.rotate_left(8),
            Stream::State(1) => word ^ word.rotate_left(8) ^ word.rotate_left(16),
            Stream::Weight | Stream::State(_) => word,
        }
    }
}

/// The bytes of both halves exchanged.
#[inline(always)]
fn exchanged(word: u32) -> u32 {
    (word & 0x00FF_00FF) << 8 | (word >> 8) & 0x00FF_00FF
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
        // 56 bits of group index: 2^60 elements.
        let high = ((group >> 32) as u32 & 0x00FF_FFFF) | (own << 24);
        philox4x32_7([group as u32, high, self.step, self.seed_high], self.key)
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

    /// The draws of 64 consecutive elements: four calls.
    #[inline(always)]
    fn block(&self, stream: Stream, block: u64) -> [u16; BLOCK as usize] {
        let mut out = [0; BLOCK as usize];
        for lane in 0..4 {
            let words = self.call(stream, 4 * block + lane as u64);
            for (j, word) in words.into_iter().enumerate() {
                let at = 8 * j + 2 * lane;
                for (first, word) in [(at, word), (at + 32, exchanged(word))] {
                    out[first] = word as u16;
                    out[first + 1] = (word >> 16) as u16;
                }
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
        // kat_vectors of Random123 1.14: philox4x32 7.
        let cases = [
            ([0; 4], [0; 2], [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x5207_ddc2, 0x4516_5e59, 0x4d8e_e751, 0x8c52_f662]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0x4dfc_caba, 0x190a_87f0, 0xc473_62ba, 0xb6b5_242a],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox4x32_7(counter, key), expected);
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
    fn upper_bytes_of_a_call_are_pairwise_independent() {
        // Each upper byte is a sum of some of the word's four bytes: bit masks of which.
        let sums = |stream: Stream, second: bool| {
            let mut tops = [0u8; 2];
            for byte in 0..4 {
                let word = stream.bits(0xFF << (8 * byte));
                let word = if second { exchanged(word) } else { word };
                for (half, top) in tops.iter_mut().enumerate() {
                    if (word >> (16 * half + 8)) & 0xFF != 0 {
                        *top |= 1 << byte;
                    }
                }
            }
            tops
        };
        let mut all = Vec::new();
        let streams = [Stream::Weight, Stream::State(0), Stream::State(1)];
        for second in [false, true] {
            for stream in streams {
                all.extend(sums(stream, second));
            }
            // The three of one element: no sum of some of them is zero.
            for half in 0..2 {
                let [w, a, b] = streams.map(|stream| sums(stream, second)[half]);
                assert!(![w, a, b, w ^ a, w ^ b, a ^ b, w ^ a ^ b].contains(&0));
            }
        }
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 12);
        assert!(!all.contains(&0));
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
