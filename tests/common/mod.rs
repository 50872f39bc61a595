//! A parameter with its arrays, and factors, for the numerics tests.
#![allow(dead_code)]

use forge::backend::cpu::Cpu;
use forge::backend::{
    Accumulator, Arrays, Deliver, Factors, Fp32Products, Image, Matrix, Norm, NormMethod, Report,
    Scheme, StepSource, Stream,
};
use forge::comm::Solo;
use forge::format::{Dtype, Rounding, StateFormat, WeightFormat, bf16};
use forge::linear::{ArrayLayout, Layout, Linear, Parallel, Shape};
use forge::rule::{self, MAX_STATES, StepScalars};
use std::sync::Arc;

pub const WEIGHTS: [(WeightFormat, Rounding); 5] = [
    (WeightFormat::F32, Rounding::Nearest),
    (WeightFormat::Bf16, Rounding::Nearest),
    (WeightFormat::Bf16, Rounding::Stochastic),
    (WeightFormat::Bf16F32, Rounding::Nearest),
    (WeightFormat::Bf16Low16, Rounding::Nearest),
];
pub const STATES: [(StateFormat, Rounding); 5] = [
    (StateFormat::F32, Rounding::Nearest),
    (StateFormat::Bf16, Rounding::Nearest),
    (StateFormat::Bf16, Rounding::Stochastic),
    (StateFormat::Q8, Rounding::Nearest),
    (StateFormat::Q8, Rounding::Stochastic),
];

/// Every rule with every set of flags that changes its arithmetic.
pub fn rules() -> Vec<(&'static str, u32)> {
    vec![
        ("sgd", 0),
        ("sgd", rule::MOMENTUM),
        ("sgd", rule::MOMENTUM | rule::NESTEROV),
        ("sgd", rule::MOMENTUM | rule::MAXIMIZE),
        ("adam", 0),
        ("adam", rule::MAXIMIZE),
        ("adamw", 0),
        ("adamw", rule::MAXIMIZE),
        ("adam", rule::AMSGRAD),
        ("adamw", rule::AMSGRAD),
        ("lion", 0),
        ("lion", rule::MAXIMIZE),
        ("adamax", 0),
        ("nadam", 0),
        ("nadam", rule::DECOUPLED),
        ("radam", 0),
        ("radam", rule::DECOUPLED),
        ("ademamix", 0),
        ("rmsprop", 0),
        ("rmsprop", rule::MOMENTUM),
        ("rmsprop", rule::CENTERED),
        ("rmsprop", rule::MOMENTUM | rule::CENTERED | rule::MAXIMIZE),
        ("adagrad", 0),
        ("adadelta", 0),
        ("rprop", 0),
        ("asgd", 0),
        ("signum", 0),
    ]
}

/// SplitMix64: enough for test data, and the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn vector(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.uniform()).collect()
    }
}

pub fn scheme(
    name: &str,
    flags: u32,
    weight: (WeightFormat, Rounding),
    state: (StateFormat, Rounding),
    factor_dtype: Dtype,
) -> Scheme {
    let rule = rule::find(name).unwrap();
    rule::check_flags(rule, flags).unwrap();
    Scheme {
        rule,
        flags,
        n_states: rule.states(flags).len(),
        weight_format: weight.0,
        weight_rounding: weight.1,
        state_formats: [state.0; MAX_STATES],
        state_rounding: state.1,
        factor_dtype,
        fp32_products: Fp32Products::Exact,
        parameter_id: 11,
    }
}

pub fn scalars(name: &str, step: u64) -> StepScalars {
    let rule = rule::find(name).unwrap();
    let mut hyper = rule::default_hyper(rule);
    hyper[0] = 0.01;
    hyper[1] = 0.1;
    match name {
        "sgd" => (hyper[2], hyper[3]) = (0.9, 0.3),
        "rmsprop" => hyper[4] = 0.8,
        "adadelta" => hyper[0] = 1.0,
        // Options that their defaults leave out.
        "adagrad" => (hyper[2], hyper[3]) = (0.01, 0.1),
        "asgd" => (hyper[2], hyper[4]) = (0.03, 10.0),
        "ademamix" => (hyper[4], hyper[7]) = (0.99, 30.0),
        _ => {}
    }
    StepScalars { step, seed: 0x5eed_0000_0001, grad_scale: 0.75, hyper }
}

/// Bytes of a factor type, from fp32.
pub fn encode(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut out = vec![0u8; values.len() * dtype.bytes()];
    for (value, bytes) in values.iter().zip(out.chunks_exact_mut(dtype.bytes())) {
        match dtype {
            Dtype::F32 => bytes.copy_from_slice(&value.to_ne_bytes()),
            Dtype::Bf16 => bytes.copy_from_slice(&bf16::nearest(*value).to_ne_bytes()),
            _ => bytes.copy_from_slice(&half::f16::from_f32(*value).to_ne_bytes()),
        }
    }
    out
}

/// The factors of one micro-batch, owned.
pub struct Segment {
    pub dy: Vec<u8>,
    pub x: Vec<u8>,
    pub tokens: usize,
    pub out: usize,
    pub inn: usize,
    pub dtype: Dtype,
}

impl Segment {
    pub fn random(r: &mut Random, tokens: usize, out: usize, inn: usize, dtype: Dtype) -> Self {
        let dy = encode(dtype, &r.vector(tokens * out));
        let x = encode(dtype, &r.vector(tokens * inn));
        Self { dy, x, tokens, out, inn, dtype }
    }

    pub fn factors(&self) -> Factors {
        self.shard(0, 0)
    }

    /// As a shard of W that starts at this row and column sees them.
    pub fn shard(&self, row: usize, col: usize) -> Factors {
        let size = self.dtype.bytes();
        Factors {
            dy: Matrix { data: self.dy[row * size..].as_ptr(), stride: self.out },
            x: Matrix { data: self.x[col * size..].as_ptr(), stride: self.inn },
            tokens: self.tokens,
        }
    }
}

pub fn factors(segments: &[Segment]) -> Vec<Factors> {
    segments.iter().map(Segment::factors).collect()
}

/// A linear and its arrays.
pub struct Parameter {
    pub linear: Linear,
    weight: Vec<u8>,
    extra: Vec<u8>,
    states: [Vec<u8>; MAX_STATES],
    scales: [Vec<u8>; MAX_STATES],
}

impl Parameter {
    pub fn new(
        scheme: Scheme,
        backend: &Arc<Cpu>,
        out: usize,
        inn: usize,
        (parallel, rank, size): (Parallel, usize, usize),
    ) -> Self {
        let shape = Shape::new(out as u64, inn as u64, parallel, false, false, rank, size).unwrap();
        let (backend, comm) = (backend.clone(), Arc::new(Solo));
        Self::of(Linear { backend, comm, shape, scheme, data_parallel: None })
    }

    /// The arrays of a linear.
    pub fn of(linear: Linear) -> Self {
        let layout = Layout::new(&linear.scheme, &linear.shape.shard, &linear.shape.owned());
        let zeros = |a: &ArrayLayout| vec![0u8; a.bytes()];
        Self {
            weight: zeros(&layout.weight),
            extra: zeros(&layout.extra),
            states: layout.states.each_ref().map(zeros),
            scales: layout.scales.each_ref().map(zeros),
            linear,
        }
    }

    /// Unsharded, with random weights.
    pub fn random(r: &mut Random, scheme: Scheme, cpu: &Arc<Cpu>, out: usize, inn: usize) -> Self {
        let mut p = Self::new(scheme, cpu, out, inn, (Parallel::None, 0, 1));
        p.import_weight(&r.vector(out * inn));
        p
    }

    pub fn arrays(&mut self) -> Arrays {
        Arrays {
            weight: self.weight.as_mut_ptr(),
            extra: self.extra.as_mut_ptr(),
            states: self.states.each_mut().map(|s| s.as_mut_ptr()),
            scales: self.scales.each_mut().map(|s| s.as_mut_ptr().cast()),
        }
    }

    pub fn import_weight(&mut self, values: &[f32]) {
        let arrays = self.arrays();
        // SAFETY: the arrays have the layout's sizes, `values` the shard's.
        unsafe { self.linear.import(&arrays, Image::Weight, values.as_ptr(), Stream::NULL) }
            .unwrap();
    }

    pub fn export(&mut self, image: Image) -> Vec<f32> {
        let shard = self.linear.shape.owned();
        let mut out = vec![0f32; shard.rows * shard.cols];
        let arrays = self.arrays();
        // SAFETY: as above.
        unsafe { self.linear.export(&arrays, image, out.as_mut_ptr(), Stream::NULL) }.unwrap();
        out
    }

    pub fn update(&mut self, factors: &[Factors], buffer: Option<&mut [f32]>, s: &StepScalars) {
        let arrays = self.arrays();
        let buffer = buffer.map(|b| Accumulator::fp32(b.as_mut_ptr()));
        assert_eq!(self.report(factors, buffer, &arrays, s).nonfinite_tiles, 0);
    }

    pub fn report(
        &self,
        factors: &[Factors],
        buffer: Option<Accumulator>,
        arrays: &Arrays,
        s: &StepScalars,
    ) -> Report {
        let step = StepSource::new(&self.linear.scheme, s);
        let (deliver, stream) = (Deliver::HOST, Stream::NULL);
        // SAFETY: the arrays have the layout's sizes, factors by construction.
        let report = unsafe { self.linear.update(factors, buffer, arrays, &step, deliver, stream) };
        report.unwrap().unwrap()
    }

    pub fn accumulate(&self, factors: &[Factors], buffer: &mut [f32]) {
        let buffer = Accumulator::fp32(buffer.as_mut_ptr());
        // SAFETY: as above.
        unsafe { self.linear.accumulate(factors, buffer, Stream::NULL) }.unwrap();
    }

    pub fn norm(&self, factors: &[Factors], method: NormMethod) -> Norm {
        let (deliver, stream) = (Deliver::HOST, Stream::NULL);
        // SAFETY: as above.
        let norm = unsafe { self.linear.norm(factors, None, method, deliver, stream) };
        norm.unwrap().unwrap()
    }

    pub fn update_two_phase(&mut self, cpu: &Cpu, factors: &[Factors], s: &StepScalars) {
        let arrays = self.arrays();
        let (scheme, shard) = (self.linear.scheme, self.linear.shape.shard);
        let step = forge::backend::Step::new(&scheme, s);
        // SAFETY: as above.
        unsafe { cpu.update_two_phase(&scheme, &shard, factors, &arrays, &step) };
    }

    /// All bytes that are stored, for comparisons.
    pub fn bytes(&self) -> Vec<&[u8]> {
        let mut all: Vec<&[u8]> = vec![&self.weight, &self.extra];
        all.extend(self.states.iter().map(|s| s.as_slice()));
        all.extend(self.scales.iter().map(|s| s.as_slice()));
        all
    }
}

pub fn cpu(threads: usize) -> Arc<Cpu> {
    Arc::new(Cpu::new(threads).unwrap())
}
