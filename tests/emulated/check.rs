//! What the fused kernel must be, for one scheme, shape and tile.

use crate::common::{Random, scalars};
use crate::kernel::{Kernel, Order, parameters};
use crate::memory::{Factor, Guarded, Memory, Segment};
use forge::backend::cpu::Cpu;
use forge::backend::cuda::elementwise::{self, Gradient, is_vector};
use forge::backend::cuda::parameters::{KernelArrays, KernelShard, KernelStep, Region};
use forge::backend::cuda::sm80::{Call, Launch, Mode, THREADS};
use forge::backend::cuda::sources;
use forge::backend::cuda::specialise::dtype_code;
use forge::backend::{
    Accumulator, Backend, Deliver, Factors, Image, Scheme, Shard, Step, StepSource, Stream,
};
use forge::format::Dtype;
use forge::rule::StepScalars;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

/// `forge::TilePartial`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Partial {
    pub sum_of_squares: f64,
    pub nonfinite: u32,
    pub tiles: u32,
}

/// A shard and factors of it: ragged, or of whole runs of 8 and blocks of 32 indices.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub rows: usize,
    pub cols: usize,
    pub first: (u64, u64),
    pub global_cols: u64,
    pub tokens: &'static [usize],
}

/// Tiles beside and below each other, none of them whole; runs of 8.
pub const WHOLE_RUNS: Shape =
    Shape { rows: 140, cols: 168, first: (3, 64), global_cols: 320, tokens: &[37, 0, 32, 101] };
pub const RAGGED: Shape =
    Shape { rows: 67, cols: 133, first: (1, 5), global_cols: 143, tokens: &[19, 33] };

impl Shape {
    pub fn shard(&self) -> Shard {
        Shard {
            rows: self.rows,
            cols: self.cols,
            row_offset: self.first.0,
            col_offset: self.first.1,
            global_cols: self.global_cols,
        }
    }

    pub fn segments(&self, r: &mut Random, dtype: Dtype) -> Vec<Segment> {
        let of = |tokens: &usize| Segment {
            dy: Factor::random(r, *tokens, self.rows, dtype),
            x: Factor::random(r, *tokens, self.cols, dtype),
            tokens: *tokens,
        };
        self.tokens.iter().map(of).collect()
    }
}

pub fn factors(segments: &[Segment]) -> Vec<Factors> {
    segments.iter().map(Segment::factors).collect()
}

pub fn backend() -> &'static Cpu {
    static CPU: LazyLock<Arc<Cpu>> = LazyLock::new(|| crate::common::cpu(1));
    &CPU
}

/// fp64 dW, and a bound on what fp32 sums may differ from it, whatever their order; of fp32 factors that are
/// split into two bf16 each.
pub fn product(segments: &[Segment], shard: &Shard, split: bool) -> Vec<(f64, f64)> {
    let mut out = vec![(0.0, 0.0); shard.rows * shard.cols];
    let tokens: usize = segments.iter().map(|s| s.tokens).sum();
    for segment in segments {
        let dy = segment.dy.values.chunks_exact(shard.rows);
        for (dy, x) in dy.zip(segment.x.values.chunks_exact(shard.cols)) {
            for (row, dy) in out.chunks_exact_mut(shard.cols).zip(dy) {
                for ((sum, magnitude), x) in row.iter_mut().zip(x) {
                    let term = f64::from(*dy) * f64::from(*x);
                    *sum += term;
                    *magnitude += term.abs();
                }
            }
        }
    }
    let left_out = if split { 3.0 * 2f64.powi(-16) } else { 0.0 };
    let terms = if split { 3 * tokens } else { tokens };
    let eps = (8 + terms) as f64 * 2f64.powi(-24) + left_out;
    out.iter_mut().for_each(|(_, magnitude)| *magnitude *= eps);
    out
}

/// The fused kernel of a launch, and the element-wise one for the same scheme.
pub fn kernel_of(scheme: &Scheme, launch: &Launch) -> &'static Kernel {
    static BUILT: LazyLock<Mutex<HashMap<Vec<String>, &'static Kernel>>> =
        LazyLock::new(Mutex::default);
    let defines = launch.specialisation.defines(scheme);
    let known = BUILT.lock().unwrap().get(&defines).copied();
    // Not locked meanwhile; that two tests build the same does no harm.
    known.unwrap_or_else(|| {
        let units = [sources::WGRAD_SM80, sources::ELEMENTWISE];
        let names = ["forge_wgrad_sm80", "forge_elementwise"];
        let kernel: &'static Kernel = Box::leak(Box::new(Kernel::new(&units, &names, &defines)));
        BUILT.lock().unwrap().insert(defines, kernel);
        kernel
    })
}

/// Runs the fused kernel; the partials of its 64 × 128s.
pub fn fused(
    scheme: &Scheme,
    launch: &Launch,
    partials: &mut Guarded,
    order: Order,
) -> Vec<Partial> {
    let mut params = launch.params;
    let size = (launch.blocks, THREADS, launch.shared_bytes);
    let kernel = kernel_of(scheme, launch);
    // SAFETY: the plan's own parameter; its arrays are the caller's.
    unsafe { kernel.launch("forge_wgrad_sm80", size, &mut parameters!(params), order) };
    partials.check();
    partials_of(partials)
}

fn narrow(value: f32, dtype: Dtype) -> u16 {
    match dtype {
        Dtype::Bf16 => half::bf16::from_f32(value).to_bits(),
        _ => half::f16::from_f32(value).to_bits(),
    }
}

fn widen(bits: u16, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::Bf16 => half::bf16::from_bits(bits).to_f32(),
        _ => half::f16::from_bits(bits).to_f32(),
    }
}

pub fn partials_of(memory: &Guarded) -> Vec<Partial> {
    let one = |bytes: &[u8]| Partial {
        sum_of_squares: f64::from_ne_bytes(bytes[..8].try_into().unwrap()),
        nonfinite: u32::from_ne_bytes(bytes[8..12].try_into().unwrap()),
        tiles: u32::from_ne_bytes(bytes[12..].try_into().unwrap()),
    };
    memory.bytes().chunks_exact(16).map(one).collect()
}

/// Runs the element-wise kernel over a gradient in memory, stored as `dtype`, compiled as for this launch.
pub fn elementwise(
    scheme: &Scheme,
    launch: &Launch,
    shard: &Shard,
    memory: &mut Memory,
    (gradient, dtype): (&[f32], Dtype),
    step: KernelStep,
) -> Vec<Partial> {
    let mut g = match dtype {
        Dtype::F32 => Guarded::of_f32(gradient),
        _ => {
            let mut stored = Guarded::new(2 * gradient.len());
            for (to, value) in stored.bytes_mut().chunks_exact_mut(2).zip(gradient) {
                to.copy_from_slice(&narrow(*value, dtype).to_ne_bytes());
            }
            stored
        }
    };
    let arrays = memory.arrays();
    let (mut data, mut stride) = (g.address(), shard.cols as u64);
    let vector = is_vector(scheme, shard, &arrays, Gradient { data, stride, dtype });
    assert_eq!(vector, launch.specialisation.vector);
    let mut region = Region::whole(shard);
    let mut partials = Guarded::new(16 * region.tiles() as usize);
    let mut dtype = dtype_code(dtype);
    let (mut arrays, mut shard) = (KernelArrays::from(&arrays), KernelShard::from(shard));
    let (mut step, mut at) = (step, partials.address());
    let size = (region.tiles(), elementwise::THREADS, 0);
    let mut list = parameters!(arrays, shard, region, data, stride, dtype, step, at);
    let kernel = kernel_of(scheme, launch);
    // SAFETY: the kernel's parameters, as the backend passes them.
    unsafe { kernel.launch("forge_elementwise", size, &mut list, Order::Descending) };
    partials.check();
    partials_of(&partials)
}

/// A parameter that has been updated once, so that its states are something.
pub fn warm(scheme: &Scheme, shard: &Shard, r: &mut Random, name: &str) -> Memory {
    let mut memory = Memory::zeros(scheme, shard);
    let arrays = memory.arrays();
    let weights = r.vector(shard.rows * shard.cols);
    // SAFETY: arrays of the layout's sizes, values of the shard's.
    unsafe {
        let (image, values) = (Image::Weight, weights.as_ptr());
        backend().import(scheme, shard, &arrays, image, values, Stream::NULL).unwrap();
    }
    let gradient = r.vector(shard.rows * shard.cols);
    on_cpu(scheme, shard, &mut memory, &gradient, &scalars(name, 1));
    memory
}

/// The CPU's update with a gradient that is given.
pub fn on_cpu(
    scheme: &Scheme,
    shard: &Shard,
    memory: &mut Memory,
    gradient: &[f32],
    s: &StepScalars,
) {
    let mut buffer = gradient.to_vec();
    let buffer = Some(Accumulator::fp32(buffer.as_mut_ptr()));
    let step = StepSource::new(scheme, s);
    let arrays = memory.arrays();
    let deliver = Deliver::HOST;
    // SAFETY: arrays of the layout's sizes, a buffer of the shard's.
    unsafe {
        backend()
            .update(scheme, shard, &[], buffer, &arrays, &step, deliver, Stream::NULL)
            .unwrap();
    }
}

/// What the fused kernel must be: dW within rounding of fp64; an update with the bits of the element-wise
/// kernel over that dW; the same squares in a norm. `name` as in `scheme`.
pub struct Check {
    pub name: &'static str,
    pub scheme: Scheme,
    pub shape: Shape,
    pub tile_rows: u32,
    pub accumulator: bool,
}

/// What a check has computed.
pub struct Outcome {
    pub shard: Shard,
    pub before: Memory,
    pub after: Memory,
    pub gradient: Vec<f32>,
    pub step: StepScalars,
    pub partials: Vec<Partial>,
}

impl Check {
    pub fn run(&self) -> Outcome {
        let mut r = Random(7);
        let segments = self.shape.segments(&mut r, self.scheme.factor_dtype);
        let outcome = self.run_with(&segments, &mut r);
        for (k, ((exact, bound), ours)) in
            product(&segments, &outcome.shard, self.scheme.factor_dtype == Dtype::F32)
                .iter()
                .zip(self.dw(&segments))
                .enumerate()
        {
            let error = (f64::from(ours) - exact).abs();
            assert!(error <= *bound, "{self}: dW[{k}] is {ours}, exact {exact} ± {bound}");
        }
        outcome
    }

    /// dW, by the accumulating kernel.
    pub fn dw(&self, segments: &[Segment]) -> Vec<f32> {
        let shard = self.shape.shard();
        let factors = factors(segments);
        let mut none = Guarded::new(0);
        let both = [Order::Ascending, Order::Descending].map(|order| {
            let mut buffer = Guarded::zeros(4 * shard.rows * shard.cols);
            let out = Some(Accumulator::fp32(buffer.pointer().cast()));
            let call = Call::plain(&self.scheme, &shard, &factors, out, Mode::Accumulate, 0);
            let launch = call.plan_with(self.tile_rows).unwrap();
            fused(&self.scheme, &launch, &mut none, order);
            buffer.check();
            buffer
        });
        assert_eq!(both[0].bytes(), both[1].bytes(), "{self}: dW depends on the order of threads");
        both[0].f32()
    }

    pub fn run_with(&self, segments: &[Segment], r: &mut Random) -> Outcome {
        let (scheme, shard) = (&self.scheme, self.shape.shard());
        let factors = factors(segments);
        let before = warm(scheme, &shard, r, self.name);
        let scalars = scalars(self.name, 2);
        let step = KernelStep::from(&Step::new(scheme, &scalars));
        let mut buffer = Guarded::of_f32(&r.vector(shard.rows * shard.cols));
        let accumulator = self.accumulator.then(|| Accumulator::fp32(buffer.pointer().cast()));
        let mut gradient = self.dw(segments);
        if self.accumulator {
            gradient.iter_mut().zip(buffer.f32()).for_each(|(g, b)| *g += b);
        }

        let tiles = Region::whole(&shard).tiles() as usize;
        let mut partials = Guarded::new(16 * tiles);
        let at = partials.address();
        let mut update = |order| {
            let mut memory = before.clone();
            let arrays = memory.arrays();
            let call = Call {
                arrays: Some(&arrays),
                step,
                ..Call::plain(scheme, &shard, &factors, accumulator, Mode::Update, at)
            };
            let launch = call.plan_with(self.tile_rows).unwrap();
            partials.bytes_mut().fill(0xFF);
            let told = fused(scheme, &launch, &mut partials, order);
            (memory, told, launch)
        };
        let (after, told, launch) = update(Order::Ascending);
        let (again, told_again, _) = update(Order::Descending);
        after.assert_same_bits(&again, &format!("{self}: the order of threads"));
        assert_eq!(bits(&told), bits(&told_again), "{self}: the order of threads");

        let mut two_phase = before.clone();
        let theirs =
            elementwise(scheme, &launch, &shard, &mut two_phase, (&gradient, Dtype::F32), step);
        after.assert_same_bits(&two_phase, &format!("{self}: fused and two-phase"));
        for (ours, theirs) in told.iter().zip(&theirs) {
            // Squares are summed in another order, eight or more of them in fp32.
            let error = (ours.sum_of_squares - theirs.sum_of_squares).abs();
            let near = error <= 1e-6 * theirs.sum_of_squares || ours.nonfinite > 0;
            assert!(near && ours.nonfinite == theirs.nonfinite, "{self}: {ours:?}, {theirs:?}");
        }

        for dtype in [Dtype::Bf16, Dtype::F16] {
            let widened: Vec<f32> =
                gradient.iter().map(|g| widen(narrow(*g, dtype), dtype)).collect();
            let run = |values, dtype| {
                let mut memory = before.clone();
                let told = elementwise(scheme, &launch, &shard, &mut memory, (values, dtype), step);
                (memory, bits(&told))
            };
            let (ours, told) = run(&gradient, dtype);
            let (theirs, told_of_theirs) = run(&widened, Dtype::F32);
            ours.assert_same_bits(&theirs, &format!("{self}: a gradient of {dtype:?}"));
            assert_eq!(told, told_of_theirs, "{self}: a gradient of {dtype:?}");
        }

        let norm = Call::plain(scheme, &shard, &factors, accumulator, Mode::Norm, at);
        let launch = norm.plan_with(self.tile_rows).unwrap();
        partials.bytes_mut().fill(0xFF);
        let normed = fused(scheme, &launch, &mut partials, Order::Ascending);
        for (ours, theirs) in normed.iter().zip(&told) {
            let same = ours.sum_of_squares.to_bits() == theirs.sum_of_squares.to_bits();
            assert!(same, "{self}: {ours:?} of a norm, {theirs:?} of an update");
        }
        Outcome { shard, before, after, gradient, step: scalars, partials: told }
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Scheme { weight_format, state_formats, factor_dtype, .. } = self.scheme;
        let (rounding, states) =
            (self.scheme.state_rounding, &state_formats[..self.scheme.n_states]);
        write!(
            f,
            "{} {weight_format:?} {:?} {states:?} {rounding:?} {factor_dtype:?} {:?} rows {} buffer {}",
            self.name, self.scheme.weight_rounding, self.shape, self.tile_rows, self.accumulator
        )
    }
}

pub fn bits(partials: &[Partial]) -> Vec<(u64, u32, u32)> {
    partials.iter().map(|p| (p.sum_of_squares.to_bits(), p.nonfinite, p.tiles)).collect()
}
