//! Calls in which any number may be anything. What they declare of memory is true, as the ABI asks;
//! what they will give is not known, but a call that is refused has changed nothing, and one that is
//! taken has written where it may.

use super::call::{Call, OPS, Op, Pointer, Role};
use super::memory::Random;
use super::mutate::Expected;
use super::world::{Context, RULES, World, collectives, random_config, sized};
use super::{Made, Tally, make, rules};
use forge::error::forge_status::{self, *};
use forge::ffi::comm::*;
use forge::ffi::context::*;
use forge::ffi::linear::*;
use forge::ffi::rule::*;
use forge::ffi::run::forge_linear_check_step;
use forge::ffi::types::*;
use std::ffi::CString;
use std::ptr::null_mut;

const UNKNOWN: &[Expected] = &[];

/// One call on a linear's data, disturbed in a few places.
pub fn data_call(world: &World, random: &mut Random, tally: &mut Tally) {
    let mut op = random.pick(OPS);
    if world.layout.n_states == 0 && matches!(op, Op::ExportState | Op::ImportState) {
        op = Op::ExportWeight;
    }
    let mut call = Call::valid(world, op, random);
    for _ in 0..1 + random.below(4) {
        disturb(&mut call, random);
    }
    let Made { status, before, after, context, .. } = make(&mut call, world);
    for (i, memory) in call.memories.iter().enumerate() {
        let range = memory.ptr() as usize..=memory.ptr() as usize + memory.bytes();
        let written = |s: &super::call::Slot| {
            let factor = matches!(s.role, Role::Dy(_) | Role::X(_));
            !factor && range.contains(&(s.ptr as usize))
        };
        let may_change = matches!(status, FORGE_OK | FORGE_ERROR_COLLECTIVE)
            && (call.may_write(i) || call.slots.iter().any(written));
        assert!(may_change || before[i] == after[i], "{context}: memory {i} changed");
    }
    tally.count(status, UNKNOWN);
}

fn disturb(call: &mut Call, random: &mut Random) {
    match random.below(12) {
        0 | 1 if !call.batches.is_empty() => {
            let k = random.below(call.batches.len());
            let batch = &mut call.batches[k];
            let field = random.pick(&[0, 1, 2]);
            *[&mut batch.tokens, &mut batch.dy_stride, &mut batch.x_stride][field] = random.any();
        }
        2 => {
            let field = random.pick(&[0, 1, 2]);
            *[&mut call.mode, &mut call.method, &mut call.index][field] = random.any() as u32;
        }
        3 => call.scalars.step = random.any(),
        4 => call.scalars.grad_scale = f64::from_bits(random.any()),
        5 => call.scalars.hyper[random.below(16)] = f64::from_bits(random.any()),
        6 => {
            let arg = random.pick(&[0, 1, 2, 3, 4]);
            let args = [
                &mut call.main,
                &mut call.parameter,
                &mut call.step,
                &mut call.report,
                &mut call.out,
            ];
            args[arg].size = Some(random.any() as u32);
        }
        7 => {
            let pointer = random.pick(&[Pointer::Null, Pointer::Misaligned, Pointer::Good]);
            match random.below(9) {
                0 => call.linear = pointer,
                1 => call.segments = pointer,
                2 => call.device_report = pointer,
                8 => call.device_norm = pointer,
                3 => call.main.pointer = pointer,
                4 => call.parameter.pointer = pointer,
                5 => call.step.pointer = pointer,
                6 => call.report.pointer = pointer,
                _ => call.out.pointer = pointer,
            }
        }
        8 => call.stream = random.any() as usize,
        _ if !call.slots.is_empty() => {
            // Anywhere in any memory of the call, with no more bytes than there are.
            let which = random.below(call.slots.len());
            let memory = if random.percent(50) {
                call.slots[which].memory
            } else {
                random.below(call.memories.len())
            };
            let (at, room) = (call.memories[memory].ptr(), call.memories[memory].bytes());
            let offset = random.any() as usize % (room + 1);
            let slot = &mut call.slots[which];
            slot.ptr = if random.percent(10) { null_mut() } else { at.wrapping_add(offset) };
            slot.bytes = if slot.ptr.is_null() { random.any() } else { (room - offset) as u64 };
            if random.percent(50) {
                slot.bytes = slot.bytes.min(random.any());
            }
        }
        _ => {}
    }
}

/// One call that makes or describes an object.
pub fn object(context: &Context, world: &World, random: &mut Random, tally: &mut Tally) {
    let status = match random.below(8) {
        0 => new_context(random),
        1 => new_comm(context, random),
        2 => {
            let (sum, scale, most) = (random.any(), random.any(), random.any());
            let [sum, scale, most] = [sum, scale, most].map(f64::from_bits);
            let (mut norm, mut coefficient) = (0.0, 0.0);
            // SAFETY: both out arguments live.
            let status =
                unsafe { forge_clip_coefficient(sum, scale, most, &mut norm, &mut coefficient) };
            // What gradients are multiplied by is never NaN, whatever the sum is.
            assert!(status != FORGE_OK || coefficient.is_finite(), "{sum} {scale} {most}");
            status
        }
        3 => {
            let mut out = sized::<forge_rule_info>();
            // SAFETY: a name of RULES, and a live struct.
            unsafe {
                if random.percent(50) {
                    forge_rule_get(random.any() as u32, &mut out)
                } else {
                    forge_rule_find(random.pick(RULES).as_ptr(), random.any() as u32, &mut out)
                }
            }
        }
        4 => describe(world.linear, random),
        5 => rules::register(random),
        6 => rules::warm(context, random),
        _ if world.comm.is_null() => return,
        _ => new_linear(context, world, random),
    };
    assert_ne!(status, FORGE_ERROR_PANIC);
    tally.count(status, UNKNOWN);
}

fn new_context(random: &mut Random) -> forge_status {
    let mut config = sized::<forge_context_config>();
    // More threads than this are allowed, but each input would start them all.
    let threads = random.any() as u32;
    config.threads = if (4..=4096).contains(&threads) { threads % 4 } else { threads };
    config.backend = random.any() as u32;
    config.device = random.any() as i32;
    let mut context = null_mut();
    // SAFETY: all pointers are to live values.
    let status = unsafe { forge_context_new(&config, &mut context) };
    assert_eq!(status == FORGE_OK, !context.is_null());
    drop(Context(context));
    status
}

fn new_comm(context: &Context, random: &mut Random) -> forge_status {
    let mut host = collectives(null_mut(), random.percent(50));
    host.struct_size = if random.percent(20) { random.any() as u32 } else { host.struct_size };
    host.reserved = if random.percent(20) { random.any() as u32 } else { 0 };
    let mut comm = null_mut();
    let (rank, size) = (random.any() as u32, random.any() as u32);
    // SAFETY: all pointers are to live values.
    unsafe {
        let status = forge_comm_new_host(context.0, rank, size, &host, &mut comm);
        assert_eq!(status == FORGE_OK, !comm.is_null());
        forge_comm_free(comm);
        status
    }
}

/// A linear of any configuration, which is described but, having no memory, not called.
fn new_linear(context: &Context, world: &World, random: &mut Random) -> forge_status {
    let (mut c, name) = random_config(random, world.rank.size);
    let bytes = (0..random.below(6)).map(|_| 1 + random.below(255) as u8).collect::<Vec<_>>();
    let any_name = CString::new(bytes).expect("no zero");
    c.rule = if random.percent(80) { name.as_ptr() } else { any_name.as_ptr() };
    for _ in 0..random.below(4) {
        let value = random.any();
        let fields = [
            &mut c.struct_size,
            &mut c.factor_dtype,
            &mut c.parallel,
            &mut c.sequence_parallel,
            &mut c.reduce_dgrad,
            &mut c.weight_format,
            &mut c.weight_rounding,
            &mut c.state_rounding,
            &mut c.state_formats[0],
            &mut c.rule_flags,
            &mut c.parameter_id,
            &mut c.fp32_products,
        ];
        match random.below(fields.len() + 2) {
            0 => c.out_features = value,
            1 => c.in_features = value,
            n => {
                if let Some(field) = fields.into_iter().nth(n - 2) {
                    *field = value as u32;
                }
            }
        }
    }
    let mut linear = null_mut();
    // SAFETY: all pointers are to live values, and the name ends in NUL.
    unsafe {
        let status = forge_linear_new(context.0, world.comm, &c, &mut linear);
        assert_eq!(status == FORGE_OK, !linear.is_null());
        if status == FORGE_OK {
            describe(linear, random);
        }
        forge_linear_free(linear);
        status
    }
}

/// What a linear says of itself must be consistent, however large it is.
fn describe(linear: *mut forge_linear, random: &mut Random) -> forge_status {
    let mut layout = sized::<forge_layout>();
    let mut request = sized::<forge_plan_request>();
    request.schedule = random.any() as u32;
    request.tokens_per_micro_batch = random.any();
    request.micro_batches = random.any() as u32;
    request.needs_norm = random.pick(&[0, 1]);
    let mut plan = sized::<forge_plan>();
    let mut step = sized::<forge_step>();
    step.scalars.step = random.any();
    step.scalars.grad_scale = f64::from_bits(random.any());
    step.scalars.hyper = [(); 16].map(|()| f64::from_bits(random.next()));
    let mut bytes = 0;
    // SAFETY: the linear lives, and so do all structs.
    unsafe {
        assert_eq!(forge_linear_layout(linear, &mut layout), FORGE_OK);
        let elements = layout.out_local * layout.in_local;
        assert!(elements > 0 && layout.accumulator.bytes == 4 * elements);
        for (k, state) in layout.states.iter().enumerate() {
            let size = if k < layout.n_states as usize { state.bytes / elements } else { 0 };
            assert!(state.bytes == size * elements && size <= 4);
        }
        forge_linear_workspace(linear, random.any() as u32, random.any(), &mut bytes);
        forge_linear_check_step(linear, &step);
        let status = forge_linear_plan(linear, &request, &mut plan);
        assert!(status != FORGE_OK || (1..=3).contains(&plan.schedule));
        status
    }
}
