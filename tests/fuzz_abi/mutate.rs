//! Ways to spoil a call, and what the library must say of each.

use super::call::{Call, Op, Pointer, Role};
use super::memory::{Guarded, Random};
use super::world::World;
use forge::error::forge_status::{self, *};
use std::ffi::CStr;

/// The status that a spoiled call must give, and what its message must contain.
#[derive(Debug)]
pub struct Expected {
    pub status: forge_status,
    pub naming: String,
}

fn expect(status: forge_status, naming: impl Into<String>) -> Option<Expected> {
    Some(Expected { status, naming: naming.into() })
}

/// Spoils the call in one way. Every way fails by itself and with any other.
pub fn spoil(call: &mut Call, world: &World, random: &mut Random) -> Expected {
    loop {
        // Buffers are most of what there is to get wrong.
        let spoiled = match random.below(24) {
            0 => spoil_linear(call, random),
            1 => spoil_stream(call, random),
            2 | 3 => spoil_struct(call, random),
            4 | 5 => spoil_scalars(call, world, random),
            6 => spoil_enum(call, random),
            7 => spoil_index(call, world, random),
            8 | 9 => spoil_tokens(call, world, random),
            10 | 11 => spoil_stride(call, world, random),
            12 => spoil_segments(call, random),
            13 | 14 => overlap(call, random),
            15 => give_what_does_not_exist(call, random),
            _ => spoil_slot(call, random),
        };
        if let Some(expected) = spoiled {
            return expected;
        }
    }
}

fn spoil_linear(call: &mut Call, random: &mut Random) -> Option<Expected> {
    let (pointer, status) = bad_pointer(random);
    call.linear = pointer;
    expect(status, "linear")
}

fn bad_pointer(random: &mut Random) -> (Pointer, forge_status) {
    random.pick(&[(Pointer::Null, FORGE_ERROR_NULL), (Pointer::Misaligned, FORGE_ERROR_MISALIGNED)])
}

fn spoil_stream(call: &mut Call, random: &mut Random) -> Option<Expected> {
    if call.is_image() || call.op == Op::CheckStep {
        return None;
    }
    call.stream = 1 + random.next() as usize / 2;
    expect(FORGE_ERROR_STREAM, "stream")
}

fn spoil_struct(call: &mut Call, random: &mut Random) -> Option<Expected> {
    let (pointer, status) = bad_pointer(random);
    let reads_step = call.updates();
    let mut args = Vec::new();
    if call.uses_parameter() {
        args.push(("parameter", &mut call.parameter));
    }
    if reads_step {
        args.push(("step", &mut call.step));
    }
    match call.op {
        Op::Backward => args.push(("backward", &mut call.main)),
        Op::Update => args.push(("update", &mut call.main)),
        Op::Norm => args.push(("out", &mut call.out)),
        Op::NormAsync => args.push(("device_out", &mut call.out)),
        _ => {}
    }
    if matches!(call.op, Op::Backward | Op::Update) {
        if random.percent(10) {
            call.device_report = Pointer::Misaligned;
            return expect(FORGE_ERROR_MISALIGNED, "device_report");
        }
        if call.report.pointer == Pointer::Good {
            args.push(("report", &mut call.report));
        }
    }
    if args.is_empty() {
        return None;
    }
    let which = random.below(args.len());
    let (name, arg) = &mut args[which];
    let optional = *name == "report" && pointer == Pointer::Null;
    // The host does not look into the backend's memory.
    let has_size = *name != "device_out";
    if has_size && (optional || random.percent(40)) {
        // None of these structs has one of these sizes.
        arg.size = Some(random.pick(&[0, 4, 12, 20, 1001, u32::MAX]));
        return expect(FORGE_ERROR_STRUCT_SIZE, *name);
    }
    arg.pointer = pointer;
    expect(status, *name)
}

fn spoil_scalars(call: &mut Call, world: &World, random: &mut Random) -> Option<Expected> {
    if !call.updates() {
        return None;
    }
    let garbage = random.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300, -1e300]);
    match random.below(4) {
        0 => {
            call.scalars.step = random.pick(&[0, 1 << 32, u64::MAX]);
            expect(FORGE_ERROR_SCALAR, "step")
        }
        1 => {
            call.scalars.grad_scale = garbage;
            expect(FORGE_ERROR_SCALAR, "grad_scale")
        }
        2 if call.device_scalars => {
            call.device_pointer = Pointer::Misaligned;
            expect(FORGE_ERROR_MISALIGNED, "device_scalars")
        }
        _ => {
            let k = random.below(world.rule.n_hyper as usize);
            // Rates and decays are not negative either.
            let value = if k < 2 && random.percent(50) { -1e-3 } else { garbage };
            call.scalars.hyper[k] = value;
            // SAFETY: a static string of the rule's.
            let name = unsafe { CStr::from_ptr(world.rule.hyper_names[k]) };
            expect(FORGE_ERROR_SCALAR, name.to_string_lossy())
        }
    }
}

fn spoil_enum(call: &mut Call, random: &mut Random) -> Option<Expected> {
    let unknown = random.pick(&[3, 4, 77, u32::MAX]);
    match call.op {
        Op::Backward => {
            // The mode also says which arguments are looked at; what was valid for the old one is
            // passed on.
            call.mode = unknown;
            expect(FORGE_ERROR_ENUM, "mode")
        }
        Op::Norm | Op::NormAsync => {
            call.method = unknown;
            expect(FORGE_ERROR_ENUM, "method")
        }
        _ => None,
    }
}

fn spoil_index(call: &mut Call, world: &World, random: &mut Random) -> Option<Expected> {
    if !matches!(call.op, Op::ExportState | Op::ImportState) {
        return None;
    }
    call.index = world.layout.n_states + random.pick(&[0, 1, 1000]);
    expect(FORGE_ERROR_STATE_INDEX, "index")
}

fn spoil_tokens(call: &mut Call, world: &World, random: &mut Random) -> Option<Expected> {
    if call.batches.is_empty() {
        return None;
    }
    let k = random.below(call.batches.len());
    let splits = call.op == Op::Backward && world.config.sequence_parallel == 1;
    let ranks = world.ranks() as u64;
    let dy = call.slot(Role::Dy(k)).expect("every batch has one");
    let name = dy.name.clone();
    // Only a factor that is there and has no room to spare is certainly too small for more tokens.
    let has_no_room = dy.required && dy.bytes == dy.needed;
    let batch = &mut call.batches[k];
    // Already spoiled: adding would wrap around to what is right again.
    if batch.tokens >= 1 << 32 {
        return None;
    }
    match random.below(3) {
        0 if splits && ranks > 1 && batch.tokens.is_multiple_of(ranks) => {
            batch.tokens += 1 + random.below(ranks as usize - 1) as u64;
            expect(FORGE_ERROR_SHARD, "tokens")
        }
        1 if has_no_room => {
            batch.tokens += if splits { ranks } else { 1 };
            expect(FORGE_ERROR_BUFFER_SIZE, name)
        }
        _ => {
            batch.tokens = random.pick(&[1 << 60, u64::MAX, u64::MAX / 2, 1 << 63]);
            expect(FORGE_ERROR_OVERFLOW, "tokens")
        }
    }
}

fn spoil_stride(call: &mut Call, world: &World, random: &mut Random) -> Option<Expected> {
    if call.batches.is_empty() {
        return None;
    }
    let k = random.below(call.batches.len());
    let of_x = call.op != Op::Dgrad && random.percent(50);
    let slot = call.slot(if of_x { Role::X(k) } else { Role::Dy(k) })?;
    let (name, element) = (slot.name.clone(), slot.element as u64);
    let batch = &mut call.batches[k];
    let (stride, rows, columns) = if of_x {
        (&mut batch.x_stride, batch.x_rows, world.layout.in_local)
    } else {
        (&mut batch.dy_stride, batch.dy_rows, world.layout.out_local)
    };
    let gathered = if of_x { world.gathers_x() } else { world.gathers_dy() };
    if call.op == Op::Backward && gathered {
        *stride = columns + 1 + random.below(100) as u64;
        return expect(FORGE_ERROR_UNSUPPORTED, format!("{name}_stride"));
    }
    match random.below(3) {
        0 if columns > 1 => {
            *stride = 1 + random.below(columns as usize - 1) as u64;
            expect(FORGE_ERROR_SHAPE, format!("{name}_stride"))
        }
        1 if rows > 1 => {
            *stride = random.pick(&[u64::MAX, 1 << 63, (1 << 63) / element, u64::MAX / 2]);
            expect(FORGE_ERROR_OVERFLOW, name)
        }
        2 if rows > 1 => {
            // Large, but no overflow: the buffer is too small.
            *stride = random.pick(&[columns + 1000, 1 << 40]);
            expect(FORGE_ERROR_BUFFER_SIZE, name)
        }
        _ => None,
    }
}

fn spoil_segments(call: &mut Call, random: &mut Random) -> Option<Expected> {
    if !call.has_segments() {
        return None;
    }
    if call.batches.is_empty() || random.percent(50) {
        call.empty_segment = true;
        return expect(FORGE_ERROR_NULL, format!("segments[{}].dy", call.batches.len()));
    }
    let (pointer, status) = bad_pointer(random);
    call.segments = pointer;
    expect(status, "segments")
}

/// Puts one buffer into another, one of them written.
fn overlap(call: &mut Call, random: &mut Random) -> Option<Expected> {
    if call.slots.len() < 2 {
        return None;
    }
    let (a, b) = (random.below(call.slots.len()), random.below(call.slots.len()));
    let (from, into) = (&call.slots[a], &call.slots[b]);
    let there = |s: &super::call::Slot| s.exists && s.needed > 0 && !s.ptr.is_null();
    if a == b || !there(from) || !there(into) || !(from.written || into.written) {
        return None;
    }
    // Spoiled before, perhaps: then this would be misaligned first of all.
    if !(into.ptr as usize).is_multiple_of(from.element) {
        return None;
    }
    // Somewhere inside, often at the very end: one common element is one too many.
    let places = (into.needed as usize).div_ceil(from.element);
    let place = if random.percent(30) { places - 1 } else { random.below(places) };
    // A buffer at the end of the address space has no such place.
    (into.ptr as usize).checked_add(place * from.element)?;
    let ptr = into.ptr.wrapping_add(place * from.element);
    let name = from.name.clone();
    call.slots[a].ptr = ptr;
    expect(FORGE_ERROR_OVERLAP, name)
}

/// Passes an array that the formats do not have.
fn give_what_does_not_exist(call: &mut Call, random: &mut Random) -> Option<Expected> {
    let absent: Vec<usize> = (0..call.slots.len()).filter(|i| !call.slots[*i].exists).collect();
    if absent.is_empty() {
        return None;
    }
    let memory = Guarded::new(16);
    let slot = &mut call.slots[random.pick(&absent)];
    slot.ptr = memory.ptr();
    slot.bytes = random.pick(&[0, 16]);
    slot.memory = call.memories.len();
    let name = slot.name.clone();
    call.memories.push(memory);
    expect(FORGE_ERROR_UNSUPPORTED, name)
}

fn spoil_slot(call: &mut Call, random: &mut Random) -> Option<Expected> {
    if call.slots.is_empty() {
        return None;
    }
    let which = random.below(call.slots.len());
    let slot = &mut call.slots[which];
    // A factor without rows is not looked at.
    if !slot.exists || (slot.is_factor() && slot.needed == 0) {
        return None;
    }
    let name = slot.name.clone();
    match random.below(4) {
        0 if slot.required => {
            slot.ptr = std::ptr::null_mut();
            expect(FORGE_ERROR_NULL, name)
        }
        // Twice would be right again.
        1 if slot.element > 1 && (slot.ptr as usize).is_multiple_of(slot.element) => {
            slot.ptr = slot.ptr.wrapping_add(1 + random.below(slot.element - 1));
            expect(FORGE_ERROR_MISALIGNED, name)
        }
        2 => {
            let (needed, element) = (slot.needed, slot.element as u64);
            let wrong: &[u64] = match (slot.exact(), needed) {
                (true, 0) => &[1, element],
                (true, _) => &[0, needed - 1, needed + 1, needed + element, 2 * needed, u64::MAX],
                (false, 0) => return None,
                (false, _) => &[0, needed - 1],
            };
            slot.bytes = random.pick(wrong);
            if slot.role == Role::Accumulator && element == 2 && slot.bytes == 2 * needed {
                // An fp32 one would be right as well.
                slot.bytes += 1;
            }
            expect(FORGE_ERROR_BUFFER_SIZE, name)
        }
        3 if slot.needed > 15 => {
            // The last 16 bytes of the address space, or fewer.
            slot.ptr = std::ptr::without_provenance_mut(usize::MAX & !15);
            expect(FORGE_ERROR_OVERFLOW, name)
        }
        _ => None,
    }
}
