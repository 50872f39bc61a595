//! The kernels on a machine without a GPU: compiled by the host's compiler, run thread by thread
//! (tests/emulated), and compared with products in fp64, with each other, and with the CPU backend.
//!
//! Every kernel runs twice, with blocks, warps and lanes in opposite orders, and must give the same bits.

#[path = "emulated/check.rs"]
mod check;
mod common;
#[path = "emulated/grouped.rs"]
mod grouped;
#[path = "emulated/kernel.rs"]
mod kernel;
#[path = "emulated/memory.rs"]
mod memory;
#[path = "emulated/near.rs"]
mod near;

use check::{Check, RAGGED, Shape, WHOLE_RUNS, backend, bits, factors, fused, warm};
use common::{Random, STATES, WEIGHTS, rules, scalars, scheme};
use forge::backend::cuda::driver::DevicePtr;
use forge::backend::cuda::parameters::{
    KernelArrays, KernelReport, KernelScalars, KernelShard, KernelStep, Region,
};
use forge::backend::cuda::sm80::{Call, Limits, MOST_SEGMENTS, Mode};
use forge::backend::cuda::sources::Source;
use forge::backend::cuda::{exact, sources, specialise};
use forge::backend::{Backend, Factors, Fp32Products, Image, Matrix, Scheme, Step, Stream};
use forge::format::{Dtype, Rounding, StateFormat, StateKind, WeightFormat};
use forge::rule::StepScalars;
use kernel::{Kernel, Order, parameters};
use memory::{Factor, Guarded, Memory};
use near::{assert_near_cpu, near};

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

/// fp32 factors, split into two bf16 each.
#[test]
fn split_factors() {
    for (weight, state, tile_rows, shape) in
        [(0, 0, 64, RAGGED), (0, 2, 128, WHOLE_RUNS), (3, 3, 128, WHOLE_RUNS), (0, 0, 128, RAGGED)]
    {
        let mut split =
            adamw(WEIGHTS[weight], STATES[state], Dtype::F32, shape, (tile_rows, state == 2));
        split.scheme.fp32_products = Fp32Products::Bf16x3;
        check(&split);
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
        step: KernelStep::from(&Step::new(&check.scheme, &scalars)),
        ..Call::plain(&check.scheme, &shard, &factors, None, Mode::Update, at)
    };
    let launch = call.plan_with(128).unwrap();
    let told = fused(&check.scheme, &launch, &mut partials, Order::Ascending);
    memory.assert_same_bits(&before, "left alone");
    assert!(told[0].nonfinite == 1 && told[0].sum_of_squares.is_finite(), "{told:?}");
}

/// Squares that overflow fp32: the sum is told all the same, and nothing is left alone.
#[test]
fn large_gradients_are_summed_and_applied() {
    for accumulator in [false, true] {
        let check = adamw(WEIGHTS[0], STATES[0], Dtype::Bf16, WHOLE_RUNS, (128, accumulator));
        let mut r = Random(3);
        let mut segments = check.shape.segments(&mut r, Dtype::Bf16);
        for segment in &mut segments {
            let large: Vec<f32> = segment.dy.values.iter().map(|v| v * 1e25).collect();
            segment.dy = Factor::of(&large, check.shape.rows, Dtype::Bf16);
        }
        let outcome = check.run_with(&segments, &mut r);
        let told: f64 = outcome.partials.iter().map(|p| p.sum_of_squares).sum();
        let exact: f64 = outcome.gradient.iter().map(|g| f64::from(*g).powi(2)).sum();
        assert!((told - exact).abs() <= 1e-5 * exact && exact > 1e50, "{told} {exact}");
        assert!(outcome.partials.iter().all(|p| p.nonfinite == 0));
    }
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
                let size = (blocks as u64, 256, 0);
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
        let size = (warps.div_ceil(8) as u64, 256, 0);
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
    let fp32 = Scheme { factor_dtype: Dtype::F32, ..scheme };
    assert!(plan(&fp32, &all).is_none());
    assert!(plan(&Scheme { fp32_products: Fp32Products::Bf16x3, ..fp32 }, &all).is_some());
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
