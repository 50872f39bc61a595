//! The kernels on a machine without a GPU: compiled by the host's compiler, run thread by thread
//! (tests/emulated), and compared with products in fp64, with each other, and with the CPU backend.
//!
//! Every kernel runs twice, with blocks, warps and lanes in opposite orders, and must give the same bits.

mod common;
#[path = "emulated/kernel.rs"]
mod kernel;
#[path = "emulated/memory.rs"]
mod memory;

use common::{Random, STATES, WEIGHTS, rules, scalars, scheme};
use forge::backend::cuda::driver::DevicePtr;
use forge::backend::cuda::elementwise::Gradient;
use forge::backend::cuda::elementwise::is_vector;
use forge::backend::cuda::parameters::{
    KernelArrays, KernelReport, KernelScalars, KernelShard, KernelStep, Region,
};
use forge::backend::cuda::sm80::{Call, Launch, Limits, MOST_SEGMENTS, Mode, THREADS};
use forge::backend::cuda::sources::Source;
use forge::backend::cuda::{exact, sources, specialise};
use forge::backend::{
    Accumulator, Backend, Deliver, Factors, Image, Matrix, Scheme, Shard, StepSource, Stream,
};
use forge::format::{Dtype, Rounding, StateFormat, StateKind, WeightFormat};
use forge::rule::StepScalars;
use kernel::{Kernel, Order, parameters};
use memory::{Factor, Guarded, Memory, Segment};
use std::sync::LazyLock;
use std::{collections::HashMap, sync::Mutex};

/// `forge::TilePartial`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Partial {
    sum_of_squares: f64,
    nonfinite: u32,
    tiles: u32,
}

/// A shard and factors of it: ragged, or of whole runs of 8 and blocks of 32 indices.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    cols: usize,
    first: (u64, u64),
    global_cols: u64,
    tokens: &'static [usize],
}

/// Tiles beside and below each other, none of them whole; runs of 8.
const WHOLE_RUNS: Shape =
    Shape { rows: 140, cols: 168, first: (3, 64), global_cols: 320, tokens: &[37, 0, 32, 101] };
const RAGGED: Shape =
    Shape { rows: 67, cols: 133, first: (1, 5), global_cols: 143, tokens: &[19, 33] };

impl Shape {
    fn shard(&self) -> Shard {
        Shard {
            rows: self.rows,
            cols: self.cols,
            row_offset: self.first.0,
            col_offset: self.first.1,
            global_cols: self.global_cols,
        }
    }

    fn segments(&self, r: &mut Random, dtype: Dtype) -> Vec<Segment> {
        let of = |tokens: &usize| Segment {
            dy: Factor::random(r, *tokens, self.rows, dtype),
            x: Factor::random(r, *tokens, self.cols, dtype),
            tokens: *tokens,
        };
        self.tokens.iter().map(of).collect()
    }
}

fn factors(segments: &[Segment]) -> Vec<Factors> {
    segments.iter().map(Segment::factors).collect()
}

fn backend() -> &'static forge::backend::cpu::Cpu {
    static CPU: LazyLock<std::sync::Arc<forge::backend::cpu::Cpu>> =
        LazyLock::new(|| common::cpu(1));
    &CPU
}

/// fp64 dW, and a bound on what fp32 sums may differ from it, whatever their order.
fn product(segments: &[Segment], shard: &Shard) -> Vec<(f64, f64)> {
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
    let eps = (8 + tokens) as f64 * 2f64.powi(-24);
    out.iter_mut().for_each(|(_, magnitude)| *magnitude *= eps);
    out
}

/// The fused kernel of a launch, and the element-wise one for the same scheme.
fn kernel_of(scheme: &Scheme, launch: &Launch) -> &'static Kernel {
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
fn fused(scheme: &Scheme, launch: &Launch, partials: &mut Guarded, order: Order) -> Vec<Partial> {
    let mut params = launch.params;
    let size = (launch.blocks, THREADS, launch.shared_bytes);
    let kernel = kernel_of(scheme, launch);
    // SAFETY: the plan's own parameter; its arrays are the caller's.
    unsafe { kernel.launch("forge_wgrad_sm80", size, &mut parameters!(params), order) };
    partials.check();
    partials_of(partials)
}

fn partials_of(memory: &Guarded) -> Vec<Partial> {
    let one = |bytes: &[u8]| Partial {
        sum_of_squares: f64::from_ne_bytes(bytes[..8].try_into().unwrap()),
        nonfinite: u32::from_ne_bytes(bytes[8..12].try_into().unwrap()),
        tiles: u32::from_ne_bytes(bytes[12..].try_into().unwrap()),
    };
    memory.bytes().chunks_exact(16).map(one).collect()
}

/// Runs the element-wise kernel over a gradient in memory, compiled as for this launch.
fn elementwise(
    scheme: &Scheme,
    launch: &Launch,
    shard: &Shard,
    memory: &mut Memory,
    gradient: &[f32],
    step: KernelStep,
) -> Vec<Partial> {
    let mut g = Guarded::of_f32(gradient);
    let arrays = memory.arrays();
    let (mut data, mut stride) = (g.address(), shard.cols as u64);
    let vector = is_vector(scheme, shard, &arrays, Gradient { data, stride });
    assert_eq!(vector, launch.specialisation.vector);
    let mut region = Region::whole(shard);
    let mut partials = Guarded::new(16 * region.tiles() as usize);
    let (mut arrays, mut shard) = (KernelArrays::from(&arrays), KernelShard::from(shard));
    let (mut step, mut at) = (step, partials.address());
    let size = (region.tiles(), THREADS, 0);
    let mut list = parameters!(arrays, shard, region, data, stride, step, at);
    let kernel = kernel_of(scheme, launch);
    // SAFETY: the kernel's parameters, as the backend passes them.
    unsafe { kernel.launch("forge_elementwise", size, &mut list, Order::Descending) };
    partials.check();
    partials_of(&partials)
}

/// A parameter that has been updated once, so that its states are something.
fn warm(scheme: &Scheme, shard: &Shard, r: &mut Random, name: &str) -> Memory {
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
fn on_cpu(scheme: &Scheme, shard: &Shard, memory: &mut Memory, gradient: &[f32], s: &StepScalars) {
    let mut buffer = gradient.to_vec();
    let buffer = Some(Accumulator(buffer.as_mut_ptr()));
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
struct Check {
    name: &'static str,
    scheme: Scheme,
    shape: Shape,
    tile_rows: u32,
    accumulator: bool,
}

/// What a check has computed.
struct Outcome {
    shard: Shard,
    before: Memory,
    after: Memory,
    gradient: Vec<f32>,
    step: StepScalars,
    partials: Vec<Partial>,
}

impl Check {
    fn run(&self) -> Outcome {
        let mut r = Random(7);
        let segments = self.shape.segments(&mut r, self.scheme.factor_dtype);
        let outcome = self.run_with(&segments, &mut r);
        for (k, ((exact, bound), ours)) in
            product(&segments, &outcome.shard).iter().zip(self.dw(&segments)).enumerate()
        {
            let error = (f64::from(ours) - exact).abs();
            assert!(error <= *bound, "{self}: dW[{k}] is {ours}, exact {exact} ± {bound}");
        }
        outcome
    }

    /// dW, by the accumulating kernel.
    fn dw(&self, segments: &[Segment]) -> Vec<f32> {
        let shard = self.shape.shard();
        let factors = factors(segments);
        let mut none = Guarded::new(0);
        let both = [Order::Ascending, Order::Descending].map(|order| {
            let mut buffer = Guarded::zeros(4 * shard.rows * shard.cols);
            let out = Some(Accumulator(buffer.pointer().cast()));
            let call = Call::plain(&self.scheme, &shard, &factors, out, Mode::Accumulate, 0);
            let launch = call.plan_with(self.tile_rows).unwrap();
            fused(&self.scheme, &launch, &mut none, order);
            buffer.check();
            buffer
        });
        assert_eq!(both[0].bytes(), both[1].bytes(), "{self}: dW depends on the order of threads");
        both[0].f32()
    }

    fn run_with(&self, segments: &[Segment], r: &mut Random) -> Outcome {
        let (scheme, shard) = (&self.scheme, self.shape.shard());
        let factors = factors(segments);
        let before = warm(scheme, &shard, r, self.name);
        let scalars = scalars(self.name, 2);
        let step = KernelStep::new(&StepSource::new(scheme, &scalars), 0);
        let mut buffer = Guarded::of_f32(&r.vector(shard.rows * shard.cols));
        let accumulator = self.accumulator.then(|| Accumulator(buffer.pointer().cast()));
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
        let theirs = elementwise(scheme, &launch, &shard, &mut two_phase, &gradient, step);
        after.assert_same_bits(&two_phase, &format!("{self}: fused and two-phase"));
        assert_eq!(bits(&told), bits(&theirs), "{self}: partials, fused and two-phase");

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

fn bits(partials: &[Partial]) -> Vec<(u64, u32, u32)> {
    partials.iter().map(|p| (p.sum_of_squares.to_bits(), p.nonfinite, p.tiles)).collect()
}

/// The emulated update against the CPU backend's, with the same gradient and the same draws.
fn assert_near_cpu(what: &str, scheme: &Scheme, o: &Outcome) {
    let mut theirs = o.before.clone();
    on_cpu(scheme, &o.shard, &mut theirs, &o.gradient, &o.step);
    let (ours, theirs) = (&o.after, &theirs);
    match scheme.weight_format {
        WeightFormat::F32 => near(what, &ours.weight.f32(), &theirs.weight.f32()),
        WeightFormat::Bf16 => few_flips(what, &monotone(&ours.weight), &monotone(&theirs.weight)),
        WeightFormat::Bf16F32 => near(what, &ours.extra.f32(), &theirs.extra.f32()),
        WeightFormat::Bf16Low16 => {
            let join = |m: &Memory| -> Vec<f32> {
                let halves = m.weight.u16().into_iter().zip(m.extra.u16());
                halves.map(|(u, l)| forge_join(u, l)).collect()
            };
            near(what, &join(ours), &join(theirs));
        }
    }
    for k in 0..scheme.n_states {
        let what = format!("{what}: state {k}");
        let (a, b) = (&ours.states[k], &theirs.states[k]);
        match scheme.state_formats[k] {
            StateFormat::F32 => near(&what, &a.f32(), &b.f32()),
            StateFormat::Bf16 => few_flips(&what, &monotone(a), &monotone(b)),
            StateFormat::Q8 => {
                let codes =
                    |m: &Guarded| m.bytes().iter().map(|b| i32::from(*b)).collect::<Vec<_>>();
                few_flips(&what, &codes(a), &codes(b));
                near(&what, &ours.scales[k].f32(), &theirs.scales[k].f32());
            }
        }
    }
}

/// An fp32 from a bf16 that was rounded to nearest and the 16 bits below it.
fn forge_join(upper: u16, lower: u16) -> f32 {
    let both = u32::from(upper) << 16 | u32::from(lower);
    f32::from_bits(both.wrapping_sub((both & 0x8000) << 1))
}

/// bf16 bits as integers in the order of their values.
fn monotone(memory: &Guarded) -> Vec<i32> {
    let of = |bits: u16| {
        let magnitude = i32::from(bits & 0x7FFF);
        if bits & 0x8000 == 0 { magnitude } else { -magnitude }
    };
    memory.u16().into_iter().map(of).collect()
}

/// Within a few roundings of numbers of the array's size.
fn near(what: &str, ours: &[f32], theirs: &[f32]) {
    let square = |x: &f32| f64::from(*x) * f64::from(*x);
    let size = (theirs.iter().map(square).sum::<f64>() / theirs.len() as f64).sqrt();
    for (k, (a, b)) in ours.iter().zip(theirs).enumerate() {
        let bound = 2f64.powi(-19) * (size + f64::from(b.abs()));
        let error = (f64::from(*a) - f64::from(*b)).abs();
        assert!(error <= bound, "{what}: [{k}] is {a}, the CPU's {b}; bound {bound}");
    }
}

/// Neighbours at most, and few: where fp32 results lie on a rounding's edge.
fn few_flips(what: &str, ours: &[i32], theirs: &[i32]) {
    let differences = || ours.iter().zip(theirs).map(|(a, b)| (a - b).unsigned_abs());
    let (most, sum) = (differences().max().unwrap_or(0), differences().sum::<u32>());
    assert!(most <= 1, "{what}: differ by {most}");
    assert!(f64::from(sum) <= 3.0 + 0.01 * ours.len() as f64, "{what}: {sum} of {}", ours.len());
}

fn adamw(
    weight: (WeightFormat, Rounding),
    state: (StateFormat, Rounding),
    factor: Dtype,
    shape: Shape,
    (tile_rows, accumulator): (u32, bool),
) -> Check {
    let scheme = scheme("adamw", 0, weight, state, factor);
    Check { name: "adamw", scheme, shape, tile_rows, accumulator }
}

fn check(check: &Check) {
    let outcome = check.run();
    assert!(outcome.partials.iter().all(|p| p.nonfinite == 0), "{check}");
    assert_near_cpu(&check.to_string(), &check.scheme, &outcome);
}

const BF16_STOCHASTIC: (WeightFormat, Rounding) = WEIGHTS[2];

#[test]
fn every_weight_format() {
    for (k, weight) in WEIGHTS.into_iter().enumerate() {
        let tile_rows = if k % 2 == 0 { 128 } else { 64 };
        let (state, factor) = (STATES[k], [Dtype::Bf16, Dtype::F16][k % 2]);
        check(&adamw(weight, state, factor, WHOLE_RUNS, (tile_rows, k == 2)));
    }
}

#[test]
fn every_state_format() {
    for (k, state) in STATES.into_iter().enumerate() {
        check(&adamw(BF16_STOCHASTIC, state, Dtype::Bf16, WHOLE_RUNS, (128, k % 2 == 1)));
    }
}

#[test]
fn ragged_rows_columns_and_tokens() {
    for (weight, state, tile_rows) in [(2, 2, 64), (4, 4, 128), (0, 0, 64), (3, 3, 128)] {
        let factor = if tile_rows == 64 { Dtype::F16 } else { Dtype::Bf16 };
        let buffer = weight == 4;
        check(&adamw(WEIGHTS[weight], STATES[state], factor, RAGGED, (tile_rows, buffer)));
    }
}

#[test]
fn every_rule() {
    for (k, (name, flags)) in rules().into_iter().enumerate() {
        if name == "adamw" && flags == 0 {
            continue;
        }
        let (weight, state) =
            if k % 2 == 0 { (WEIGHTS[0], STATES[0]) } else { (BF16_STOCHASTIC, STATES[3]) };
        let scheme = scheme(name, flags, weight, state, Dtype::Bf16);
        let shape = Shape { tokens: &[35], rows: 64, ..WHOLE_RUNS };
        check(&Check { name, scheme, shape, tile_rows: 64, accumulator: false });
    }
}

/// A row of dW that is not finite: its 64 rows are left alone, the others are updated.
#[test]
fn a_tile_that_is_not_finite_is_left_alone() {
    for (tile_rows, accumulator, value) in [(128, false, f32::INFINITY), (64, true, f32::NAN)] {
        let check =
            adamw(BF16_STOCHASTIC, STATES[3], Dtype::Bf16, WHOLE_RUNS, (tile_rows, accumulator));
        let Shape { rows, cols, .. } = check.shape;
        let mut r = Random(3);
        let mut segments = check.shape.segments(&mut r, Dtype::Bf16);
        let (row, last) = (70, segments.last_mut().unwrap());
        let mut dy = last.dy.values.clone();
        dy[(last.tokens - 1) * rows + row] = value;
        last.dy = Factor::of(&dy, rows, Dtype::Bf16);
        let outcome = check.run_with(&segments, &mut r);
        let bad: Vec<u32> = outcome.partials.iter().map(|p| p.nonfinite).collect();
        assert_eq!(bad, [0, 0, 1, 1, 0, 0], "{check}");
        let changed = |row: usize| {
            let of = |m: &Memory| m.states[0].bytes()[row * cols..(row + 1) * cols].to_vec();
            of(&outcome.before) != of(&outcome.after)
        };
        assert!((64..128).all(|row| !changed(row)) && changed(63) && changed(128), "{check}");
        let weights = |m: &Memory| m.weight.bytes()[2 * 64 * cols..2 * 128 * cols].to_vec();
        assert_eq!(weights(&outcome.before), weights(&outcome.after), "{check}");
    }
}

/// A finite gradient whose product with `grad_scale` is not.
#[test]
fn a_gradient_that_overflows_when_scaled_is_left_alone() {
    let check = adamw(WEIGHTS[0], STATES[0], Dtype::Bf16, RAGGED, (128, false));
    let shard = check.shape.shard();
    let segments = check.shape.segments(&mut Random(5), Dtype::Bf16);
    let factors = factors(&segments);
    let mut memory = Memory::zeros(&check.scheme, &shard);
    let before = memory.clone();
    let scalars = StepScalars { grad_scale: 1e38, ..scalars("adamw", 1) };
    let mut partials = Guarded::new(16 * Region::whole(&shard).tiles() as usize);
    let (arrays, at) = (memory.arrays(), partials.address());
    let call = Call {
        arrays: Some(&arrays),
        step: KernelStep::new(&StepSource::new(&check.scheme, &scalars), 0),
        ..Call::plain(&check.scheme, &shard, &factors, None, Mode::Update, at)
    };
    let launch = call.plan_with(128).unwrap();
    let told = fused(&check.scheme, &launch, &mut partials, Order::Ascending);
    memory.assert_same_bits(&before, "left alone");
    assert!(told[0].nonfinite == 1 && told[0].sum_of_squares.is_finite(), "{told:?}");
}

/// The scalars of a step from device memory, and a report from the partials.
#[test]
fn a_captured_step_and_its_report() {
    let check = adamw(BF16_STOCHASTIC, STATES[2], Dtype::F16, RAGGED, (64, false));
    let outcome = check.run();
    let (scheme, shard) = (&check.scheme, &outcome.shard);
    let mut r = Random(7);
    let segments = check.shape.segments(&mut r, Dtype::F16);
    let factors = factors(&segments);

    // forge_step_scalars.
    let mut source: Vec<u8> = Vec::new();
    source.extend(outcome.step.step.to_ne_bytes());
    source.extend(outcome.step.seed.to_ne_bytes());
    source.extend(outcome.step.grad_scale.to_ne_bytes());
    let mut hyper = outcome.step.hyper.to_vec();
    hyper.resize(16, 0.0);
    source.extend(hyper.iter().flat_map(|h| h.to_ne_bytes()));
    let (mut source, mut scalars) =
        (Guarded::of(&source), Guarded::new(size_of::<KernelScalars>()));
    let prologue =
        Kernel::new(&[sources::PROLOGUE], &["forge_prologue"], &specialise::rule(scheme));
    let (mut from, mut parameter, mut maximize) = (source.address(), scheme.parameter_id, 0u32);
    let mut to = scalars.address();
    let mut list = parameters!(from, parameter, maximize, to);
    // SAFETY: the kernel's parameters, as the backend passes them.
    unsafe { prologue.launch("forge_prologue", (1, 1, 0), &mut list, Order::Ascending) };
    scalars.check();

    let tiles = Region::whole(shard).tiles();
    let mut memory = outcome.before.clone();
    let mut partials = Guarded::new(16 * tiles as usize);
    let (arrays, mut at) = (memory.arrays(), partials.address());
    let call = Call {
        arrays: Some(&arrays),
        step: KernelStep { device: scalars.address(), ..KernelStep::default() },
        ..Call::plain(scheme, shard, &factors, None, Mode::Update, at)
    };
    let launch = call.plan_with(check.tile_rows).unwrap();
    let told = fused(scheme, &launch, &mut partials, Order::Descending);
    memory.assert_same_bits(&outcome.after, "scalars from device memory");
    assert_eq!(bits(&told), bits(&outcome.partials));

    let reduce = Kernel::new(&[sources::REDUCE], &["forge_report", "forge_norm"], &[]);
    let mut report = KernelReport::default();
    let (mut count, mut first, mut second) =
        (tiles, (&raw mut report) as DevicePtr, 0 as DevicePtr);
    let mut list = parameters!(at, count, first, second);
    // SAFETY: as above.
    unsafe { reduce.launch("forge_report", (1, 1024, 0), &mut list, Order::Ascending) };
    let sum: f64 = told.iter().map(|p| p.sum_of_squares).sum();
    assert!((report.sum_of_squares - sum).abs() <= 1e-12 * sum, "{report:?}, {sum}");
    assert_eq!((report.struct_size, report.tiles, report.nonfinite_tiles), (32, tiles, 0));
}

/// FFMA with one accumulator, terms in order: the bits of a loop of `mul_add`.
#[test]
fn exact_products_are_a_loop_of_fma() {
    for (dtype, code) in [(Dtype::F32, 0), (Dtype::F16, 2)] {
        let (rows, cols) = (RAGGED.rows, RAGGED.cols);
        let mut r = Random(9);
        let segments = RAGGED.segments(&mut r, dtype);
        let mut initial = Guarded::of_f32(&r.vector(rows * cols));
        let defines =
            [("LEFT", code), ("RIGHT", code), ("OUT", 0), ("LEFT_ROWS", 1), ("RIGHT_ROWS", 1)];
        let defines = defines.map(|(name, value)| format!("FORGE_{name}={value}"));
        let kernel = Kernel::new(&[sources::EXACT], &["forge_exact"], &defines);
        let mut expected = initial.f32();
        let mut params = exact::Params {
            n_segments: segments.len() as u64,
            rows: rows as u64,
            cols: cols as u64,
            initial: initial.address(),
            initial_stride: cols as u64,
            out_stride: cols as u64 + 3,
            ..exact::Params::default()
        };
        for (to, segment) in params.segments.iter_mut().zip(&segments) {
            let operand = |m: Matrix| exact::Operand {
                data: m.data as DevicePtr,
                row: 1,
                depth: m.stride as u64,
            };
            let (left, right) = (operand(segment.dy.matrix()), operand(segment.x.matrix()));
            *to = exact::Segment { left, right, terms: segment.tokens as u64 };
            let dy = segment.dy.values.chunks_exact(rows);
            for (dy, x) in dy.zip(segment.x.values.chunks_exact(cols)) {
                for (k, sum) in expected.iter_mut().enumerate() {
                    *sum = dy[k / cols].mul_add(x[k % cols], *sum);
                }
            }
        }
        for order in [Order::Ascending, Order::Descending] {
            let mut out = Guarded::new(4 * ((cols + 3) * (rows - 1) + cols));
            params.out = out.address();
            let blocks = rows.div_ceil(128) * cols.div_ceil(128);
            // SAFETY: the kernel's parameter.
            unsafe {
                let size = (blocks as u64, THREADS, 0);
                kernel.launch("forge_exact", size, &mut parameters!(params), order);
            }
            out.check();
            let out = out.f32();
            for (k, expected) in expected.iter().enumerate() {
                let ours = out[k / cols * (cols + 3) + k % cols];
                assert_eq!(ours.to_bits(), expected.to_bits(), "{dtype:?} {order:?} [{k}]");
            }
        }
    }
}

/// Checkpoint images: states to fp32 and back.
#[test]
fn images_are_the_cpus() {
    let scheme = scheme("adamw", 0, WEIGHTS[3], STATES[3], Dtype::Bf16);
    let shard = RAGGED.shard();
    let mut memory = warm(&scheme, &shard, &mut Random(1), "adamw");
    for k in 0..2 {
        let mut theirs = vec![0f32; shard.rows * shard.cols];
        let arrays = memory.arrays();
        let (image, to) = (Image::State(k), theirs.as_mut_ptr());
        // SAFETY: arrays of the layout's sizes, an image of the shard's.
        unsafe { backend().export(&scheme, &shard, &arrays, image, to, Stream::NULL).unwrap() };
        let signed = scheme.state_kind(k) == StateKind::Signed;
        let defines = [("IMAGE", 1), ("FORMAT", 2), ("KIND", u32::from(!signed))];
        let defines = defines.map(|(name, value)| format!("FORGE_{name}={value}"));
        let kernel = Kernel::new(&[sources::IMAGE], &["forge_export", "forge_import"], &defines);
        let mut image = Guarded::new(4 * theirs.len());
        let (mut arrays, mut of) = (KernelArrays::from(&arrays), KernelShard::from(&shard));
        let (mut index, mut data) = (k as u32, image.address());
        let warps = shard.rows * shard.cols.div_ceil(128);
        let size = (warps.div_ceil(8) as u64, THREADS, 0);
        let before = memory.states[k].bytes().to_vec();
        let mut list = parameters!(arrays, of, index, data);
        // SAFETY: the kernels' parameters, as the backend passes them.
        unsafe {
            kernel.launch("forge_export", size, &mut list, Order::Ascending);
            near("export", &image.f32(), &theirs);
            kernel.launch("forge_import", size, &mut list, Order::Descending);
        }
        image.check();
        memory.states[k].check();
        assert_eq!(memory.states[k].bytes(), before, "codes of an image are the same codes");
    }
}

#[test]
fn what_the_kernel_does_not_take_is_left_to_panels() {
    let scheme = scheme("adamw", 0, WEIGHTS[1], STATES[1], Dtype::Bf16);
    let shard = RAGGED.shard();
    let limits = Limits { sm_count: 108, shared_memory_per_block: 99 << 10 };
    let plan = |scheme: &Scheme, factors: &[Factors]| {
        Call::plain(scheme, &shard, factors, None, Mode::Norm, 0).plan(&limits)
    };
    let segments = RAGGED.segments(&mut Random(1), Dtype::Bf16);
    let all = factors(&segments);
    assert!(plan(&scheme, &all).is_some());
    assert!(plan(&Scheme { factor_dtype: Dtype::F32, ..scheme }, &all).is_none());
    assert!(plan(&scheme, &[]).is_none());
    assert!(plan(&scheme, &vec![all[0]; MOST_SEGMENTS]).is_some());
    assert!(plan(&scheme, &vec![all[0]; MOST_SEGMENTS + 1]).is_none());
    let odd = |change: fn(&mut Factors)| {
        let mut factors = all[0];
        change(&mut factors);
        plan(&scheme, &[factors])
    };
    assert!(odd(|f| f.x.stride += 1).is_none());
    assert!(odd(|f| f.dy.data = f.dy.data.wrapping_add(2)).is_none());
    assert!(odd(|f| f.tokens = 0).is_none());
}

const WRONG: [&str; 6] = [
    "waits_for_ever",
    "waits_at_different_places",
    "copies_past_the_end",
    "never_waits_for_its_copies",
    "reads_too_early",
    "races",
];

/// The emulator itself.
#[test]
fn mistakes_are_found() {
    let source = Source { name: "wrong.cu", text: include_str!("emulated/wrong.cu") };
    let kernel = Kernel::new(&[source], &WRONG, &["FORGE_FACTOR=1".into()]);
    let run = |name: &str, order| {
        let (mut out, mut data) = (Guarded::zeros(256), Guarded::of_f32(&[1.0; 64]));
        let (mut to, mut from) = (out.address(), data.address());
        let mut list = parameters!(to, from);
        // SAFETY: the parameters of these kernels, 64 elements each.
        let why = unsafe { kernel.try_launch(name, (1, 64, 1024), &mut list, order) };
        (why.unwrap_or_default(), out.f32())
    };
    let fails = |name, what: &str| {
        let why = run(name, Order::Ascending).0;
        assert!(why.contains(what), "{name}: {why}");
    };
    fails(WRONG[0], "for ever");
    fails(WRONG[1], "different places");
    fails(WRONG[2], "an address outside");
    fails(WRONG[3], "before its copies have come");
    let early = run(WRONG[4], Order::Ascending).1;
    assert!(early[0] == 1.0 && early[1].is_nan() && early[2] == 1.0, "{early:?}");
    assert_ne!(run(WRONG[5], Order::Ascending).1, run(WRONG[5], Order::Descending).1);
}
