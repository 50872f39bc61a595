//! Several weights in one launch: the bits of a launch for each.

use crate::check::{RAGGED, Shape, WHOLE_RUNS, bits, factors, fused, partials_of, warm};
use crate::common::{Random, STATES, WEIGHTS, scalars, scheme};
use crate::kernel::{Kernel, Order, parameters};
use crate::memory::{Guarded, Memory, Segment};
use forge::backend::cuda::driver::DevicePtr;
use forge::backend::cuda::group::Group;
use forge::backend::cuda::parameters::{KernelReport, KernelScalars, KernelStep, Region};
use forge::backend::cuda::reduce::{ReportOf, Reports};
use forge::backend::cuda::sm80::{Call, Launch, Mode, THREADS};
use forge::backend::cuda::sources;
use forge::backend::{Accumulator, Scheme, Step};
use forge::format::Dtype;

/// A weight of the group, and what it is when it is updated alone.
struct One {
    scheme: Scheme,
    shape: Shape,
    segments: Vec<Segment>,
    buffer: Option<Guarded>,
    before: Memory,
}

impl One {
    fn new(shape: Shape, parameter_id: u32, buffer: bool, r: &mut Random) -> Self {
        let (weight, state) = (WEIGHTS[2], STATES[3]);
        let scheme = Scheme { parameter_id, ..scheme("adamw", 0, weight, state, Dtype::Bf16) };
        let shard = shape.shard();
        let segments = shape.segments(r, Dtype::Bf16);
        let buffer = buffer.then(|| Guarded::of_f32(&r.vector(shard.rows * shard.cols)));
        let before = warm(&scheme, &shard, r, "adamw");
        Self { scheme, shape, segments, buffer, before }
    }

    fn launch(&mut self, memory: &mut Memory, partials: DevicePtr) -> Launch {
        self.launch_with(memory, partials, KernelStep::from(&self.step()))
    }

    fn step(&self) -> Step {
        Step::new(&self.scheme, &scalars("adamw", 2))
    }

    fn launch_with(
        &mut self,
        memory: &mut Memory,
        partials: DevicePtr,
        step: KernelStep,
    ) -> Launch {
        let (shard, factors) = (self.shape.shard(), factors(&self.segments));
        let arrays = memory.arrays();
        let buffer = self.buffer.as_mut().map(|b| Accumulator::fp32(b.pointer().cast()));
        let call = Call {
            arrays: Some(&arrays),
            step,
            ..Call::plain(&self.scheme, &shard, &factors, buffer, Mode::Update, partials)
        };
        call.plan_with(64).unwrap()
    }

    fn partials(&self) -> Guarded {
        Guarded::new(16 * Region::whole(&self.shape.shard()).tiles() as usize)
    }
}

/// Weights of one kernel: together and alone, with their reports, in tiles of both heights.
fn check(shapes: &[Shape], buffer: bool) {
    for tile_rows in [64, 128] {
        check_in(shapes, buffer, tile_rows);
    }
}

fn check_in(shapes: &[Shape], buffer: bool, tile_rows: u32) {
    let mut r = Random(11);
    let mut all: Vec<One> = Vec::new();
    for (k, shape) in shapes.iter().enumerate() {
        all.push(One::new(*shape, 40 + k as u32, buffer, &mut r));
    }
    let mut alone = Vec::new();
    for one in &mut all {
        let (mut memory, mut partials) = (one.before.clone(), one.partials());
        let launch = one.launch(&mut memory, partials.address()).cut(tile_rows);
        let told = fused(&one.scheme, &launch, &mut partials, Order::Ascending);
        alone.push((memory, told));
    }
    // The second time with the scalars in memory, as a prologue leaves them: of whichever weight.
    let of_first = KernelScalars::from(&all[0].step());
    for order in [Order::Ascending, Order::Descending] {
        let in_memory = (order == Order::Descending).then_some((&raw const of_first) as DevicePtr);
        let mut memories: Vec<Memory> = all.iter().map(|one| one.before.clone()).collect();
        let mut partials: Vec<Guarded> = all.iter().map(One::partials).collect();
        let mut group: Option<Group> = None;
        for (k, one) in all.iter_mut().enumerate() {
            let step = match in_memory {
                Some(device) => KernelStep { device, ..KernelStep::default() },
                None => KernelStep::from(&one.step()),
            };
            let at = partials[k].address();
            let launch = one.launch_with(&mut memories[k], at, step).cut(tile_rows);
            let group = group.get_or_insert_with(|| Group::for_launches_like(&launch));
            assert!(group.takes(&launch) && group.add(&launch));
        }
        let group = group.unwrap();
        let defines = group.specialisation.defines(&all[0].scheme);
        let kernel = Kernel::new(&[sources::WGRAD_SM80], &["forge_wgrad_sm80"], &defines);
        let mut params = group.params();
        let size = (u64::from(group.blocks), THREADS, group.shared_bytes);
        // SAFETY: the kernel's parameter, and the memory that it names.
        unsafe { kernel.launch("forge_wgrad_sm80", size, &mut parameters!(params), order) };
        for (k, (memory, told)) in alone.iter().enumerate() {
            memories[k].assert_same_bits(memory, &format!("weight {k} of a group, {order:?}"));
            partials[k].check();
            assert_eq!(bits(&partials_of(&partials[k])), bits(told), "weight {k}, {order:?}");
        }
        check_reports(&mut partials, order);
    }
}

/// All reports by one launch: the bits of a launch for each.
fn check_reports(partials: &mut [Guarded], order: Order) {
    let names = ["forge_report", "forge_reports"];
    let kernel = Kernel::new(&[sources::REDUCE], &names, &[]);
    let mut together = vec![KernelReport::default(); partials.len()];
    let mut of = Vec::new();
    for (memory, report) in partials.iter_mut().zip(&mut together) {
        let count = memory.bytes().len() as u64 / 16;
        let target = (&raw mut *report) as DevicePtr;
        of.push(ReportOf { partials: memory.address(), count, target });
    }
    let mut all = Reports::new(&of);
    // SAFETY: the kernel's parameter, and the memory that it names.
    unsafe {
        let size = (of.len() as u64, 1024, 0);
        kernel.launch("forge_reports", size, &mut parameters!(all), order);
    }
    for (one, theirs) in of.into_iter().zip(&together) {
        let mut report = KernelReport::default();
        let ReportOf { partials: mut at, mut count, .. } = one;
        let (mut first, mut second) = ((&raw mut report) as DevicePtr, 0 as DevicePtr);
        let mut list = parameters!(at, count, first, second);
        // SAFETY: as above.
        unsafe { kernel.launch("forge_report", (1, 1024, 0), &mut list, order) };
        let bits = |r: &KernelReport| {
            (r.struct_size, r.tiles, r.nonfinite_tiles, r.sum_of_squares.to_bits())
        };
        assert_eq!(bits(theirs), bits(&report));
    }
}

#[test]
fn a_group_of_ragged_weights_is_each_of_them() {
    let small = Shape { rows: 5, cols: 9, first: (0, 0), global_cols: 9, tokens: &[3] };
    let wide = Shape { rows: 30, cols: 261, first: (2, 7), global_cols: 300, tokens: &[40] };
    check(&[RAGGED, small, wide, RAGGED], false);
}

#[test]
fn a_group_with_buffers_is_each_of_them() {
    let other = Shape { rows: 70, cols: 40, first: (0, 32), global_cols: 96, tokens: &[8, 9] };
    check(&[other, WHOLE_RUNS, other], true);
}

#[test]
fn a_group_has_the_room_that_its_parameter_has() {
    let mut r = Random(1);
    let shape = Shape { rows: 8, cols: 8, first: (0, 0), global_cols: 32, tokens: &[1] };
    let mut one = One::new(shape, 1, false, &mut r);
    let mut memory = one.before.clone();
    let launch = one.launch(&mut memory, 0);
    let mut group = Group::for_launches_like(&launch);
    while group.add(&launch) {}
    // 16 words for each and 5 for its segment, of 4082.
    assert_eq!((group.len(), group.blocks), (194, 194));

    // Another parameter is taken, another step or kernel is not.
    let mut other = One::new(shape, 2, false, &mut r);
    assert!(group.takes(&other.launch(&mut memory, 0)));
    other.buffer = Some(Guarded::zeros(256));
    assert!(!group.takes(&other.launch(&mut memory, 0)));
    let (shard, factors) = (shape.shard(), factors(&one.segments));
    let step = KernelStep::from(&Step::new(&one.scheme, &scalars("adamw", 3)));
    let arrays = memory.arrays();
    let call = Call {
        arrays: Some(&arrays),
        step,
        ..Call::plain(&one.scheme, &shard, &factors, None, Mode::Update, 0)
    };
    assert!(!group.takes(&call.plan_with(64).unwrap()));
}
