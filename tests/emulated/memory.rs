//! What kernels read and write: buffers with bands of NaNs around them, a parameter's arrays, factors with
//! NaNs between their rows.

use crate::common::{Random, encode};
use forge::backend::cuda::driver::DevicePtr;
use forge::backend::{Arrays, Factors, Matrix, Scheme, Shard};
use forge::format::Dtype;
use forge::linear::{ArrayLayout, Layout};
use forge::rule::MAX_STATES;

const BAND: usize = 4096;
/// Bytes that buffers begin at multiples of.
const ALIGNED: usize = 256;

/// Bytes with bands around them: an element read from a band is NaN, one written there is found.
#[derive(Clone)]
pub struct Guarded {
    /// In units of [`ALIGNED`].
    units: Vec<Unit>,
    bytes: usize,
}

#[derive(Clone, Copy)]
#[repr(align(256))]
struct Unit {
    _bytes: [u8; ALIGNED],
}

impl Guarded {
    /// Bytes that read as NaN.
    pub fn new(bytes: usize) -> Self {
        let units = vec![Unit { _bytes: [0xFF; ALIGNED] }; (2 * BAND + bytes).div_ceil(ALIGNED)];
        Self { units, bytes }
    }

    pub fn zeros(bytes: usize) -> Self {
        let mut out = Self::new(bytes);
        out.bytes_mut().fill(0);
        out
    }

    pub fn of(values: &[u8]) -> Self {
        let mut out = Self::new(values.len());
        out.bytes_mut().copy_from_slice(values);
        out
    }

    pub fn of_f32(values: &[f32]) -> Self {
        Self::of(&encode(Dtype::F32, values))
    }

    fn all(&self) -> &[u8] {
        // SAFETY: units are bytes, and there are that many.
        unsafe {
            std::slice::from_raw_parts(self.units.as_ptr().cast(), self.units.len() * ALIGNED)
        }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.all()[BAND..BAND + self.bytes]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let n = self.units.len() * ALIGNED;
        // SAFETY: as above, and nobody else has them.
        let all = unsafe { std::slice::from_raw_parts_mut(self.units.as_mut_ptr().cast(), n) };
        &mut all[BAND..BAND + self.bytes]
    }

    pub fn f32(&self) -> Vec<f32> {
        let words = self.bytes().chunks_exact(4);
        words.map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect()
    }

    pub fn u16(&self) -> Vec<u16> {
        let words = self.bytes().chunks_exact(2);
        words.map(|b| u16::from_ne_bytes(b.try_into().unwrap())).collect()
    }

    /// Null where there is nothing.
    pub fn pointer(&mut self) -> *mut u8 {
        if self.bytes == 0 { std::ptr::null_mut() } else { self.bytes_mut().as_mut_ptr() }
    }

    pub fn address(&mut self) -> DevicePtr {
        self.pointer() as DevicePtr
    }

    /// Whether the bands are as they were.
    pub fn check(&self) {
        let (before, after) = (&self.all()[..BAND], &self.all()[BAND + self.bytes..]);
        assert!(before.iter().chain(after).all(|b| *b == 0xFF), "written outside a buffer");
    }
}

/// A parameter's arrays.
#[derive(Clone)]
pub struct Memory {
    pub weight: Guarded,
    pub extra: Guarded,
    pub states: [Guarded; MAX_STATES],
    pub scales: [Guarded; MAX_STATES],
}

impl Memory {
    pub fn zeros(scheme: &Scheme, shard: &Shard) -> Self {
        let layout = Layout::new(scheme, shard, shard);
        let zeros = |a: &ArrayLayout| Guarded::zeros(a.bytes());
        Self {
            weight: zeros(&layout.weight),
            extra: zeros(&layout.extra),
            states: layout.states.each_ref().map(zeros),
            scales: layout.scales.each_ref().map(zeros),
        }
    }

    pub fn arrays(&mut self) -> Arrays {
        Arrays {
            weight: self.weight.pointer(),
            extra: self.extra.pointer(),
            states: self.states.each_mut().map(|s| s.pointer()),
            scales: self.scales.each_mut().map(|s| s.pointer().cast()),
        }
    }

    fn all(&self) -> impl Iterator<Item = &Guarded> {
        [&self.weight, &self.extra].into_iter().chain(&self.states).chain(&self.scales)
    }

    pub fn assert_same_bits(&self, other: &Self, what: &str) {
        for (k, (a, b)) in self.all().zip(other.all()).enumerate() {
            a.check();
            b.check();
            let differ = a.bytes().iter().zip(b.bytes()).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{what}: array {k}: bytes that differ, of {}", a.bytes().len());
        }
    }
}

/// The factors of a micro-batch. Rows are `stride` elements apart, with NaNs in between.
pub struct Factor {
    data: Guarded,
    stride: usize,
    pub values: Vec<f32>,
}

impl Factor {
    pub fn random(r: &mut Random, tokens: usize, features: usize, dtype: Dtype) -> Self {
        Self::of(&r.vector(tokens * features), features, dtype)
    }

    pub fn of(values: &[f32], features: usize, dtype: Dtype) -> Self {
        let stride = features.next_multiple_of(8) + 8;
        let tokens = values.len() / features;
        let mut data = Guarded::new(tokens * stride * dtype.bytes());
        let rows = data.bytes_mut().chunks_exact_mut(stride * dtype.bytes());
        for (row, values) in rows.zip(values.chunks_exact(features)) {
            let coded = encode(dtype, values);
            row[..coded.len()].copy_from_slice(&coded);
        }
        // As they are stored.
        let values = decode(dtype, &encode(dtype, values));
        Self { data, stride, values }
    }

    pub fn matrix(&self) -> Matrix {
        Matrix { data: self.data.bytes().as_ptr(), stride: self.stride }
    }
}

pub struct Segment {
    pub dy: Factor,
    pub x: Factor,
    pub tokens: usize,
}

impl Segment {
    pub fn factors(&self) -> Factors {
        Factors { dy: self.dy.matrix(), x: self.x.matrix(), tokens: self.tokens }
    }
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let half = |b: &[u8]| u16::from_ne_bytes([b[0], b[1]]);
    match dtype {
        Dtype::F32 => {
            bytes.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect()
        }
        Dtype::Bf16 => {
            bytes.chunks_exact(2).map(|b| f32::from_bits(u32::from(half(b)) << 16)).collect()
        }
        _ => bytes.chunks_exact(2).map(|b| half::f16::from_bits(half(b)).to_f32()).collect(),
    }
}
