//! Calls that are valid, of every kind, with random shapes and data.

use super::call::{Arg, Batch, Call, Op, Pointer, Role, Slot};
use super::memory::{Guarded, Random, store};
use super::world::{World, sized};
use forge::ffi::types::*;
use std::ffi::CStr;
use std::ptr::null_mut;

const GOOD: Arg = Arg { pointer: Pointer::Good, size: None };

/// Tokens: mostly few, now and then more than the CPU backend sums in one go.
fn few_or_many(random: &mut Random, few: usize, many: usize) -> u64 {
    let most = if random.percent(3) { many } else { few };
    random.below(most) as u64
}

impl Call {
    /// A valid call of this kind.
    pub fn valid(world: &World, op: Op, random: &mut Random) -> Self {
        let layout = &world.layout;
        let mut call = Self {
            op,
            linear: Pointer::Good,
            batches: Vec::new(),
            empty_segment: false,
            segments: Pointer::Good,
            slots: Vec::new(),
            memories: vec![
                Guarded::holding(sized::<forge_report>()),
                Guarded::holding(sized::<forge_norm>()),
                Guarded::new(size_of::<forge_report>()),
            ],
            mode: random.pick(&[0, 0, 1, 2]),
            method: random.pick(&[0, 1, 2]),
            index: 0,
            stream: 0,
            scalars: random_scalars(world, random),
            device_scalars: random.percent(30),
            device_pointer: Pointer::Good,
            main: GOOD,
            parameter: GOOD,
            step: GOOD,
            report: GOOD,
            out: GOOD,
            device_report: if random.percent(30) { Pointer::Good } else { Pointer::Null },
            device_norm: if random.percent(30) { Pointer::Good } else { Pointer::Null },
            finite: true,
        };
        if random.percent(20) {
            call.report.pointer = Pointer::Null;
        }
        match op {
            Op::Backward => call.add_backward(world, random),
            Op::CheckStep => {}
            Op::Dgrad => {
                let tokens = random.below(12) as u64;
                call.add_factors(world, 0, tokens, [tokens, tokens], random);
                call.slots.retain(|s| !matches!(s.role, Role::X(_)));
                call.add_parameter(world, true, random);
                call.add_dx(world, tokens, true);
            }
            Op::Update | Op::Accumulate | Op::Norm | Op::NormAsync => {
                for k in 0..random.below(4) {
                    let tokens = few_or_many(random, 10, 600);
                    call.add_factors(world, k, tokens, [tokens, tokens], random);
                }
                if op == Op::Accumulate || random.percent(40) {
                    call.add_accumulator(world, op == Op::Accumulate, random);
                }
                if op == Op::Update {
                    call.add_parameter(world, false, random);
                }
            }
            _ => {
                let states = layout.n_states as usize;
                if matches!(op, Op::ExportState | Op::ImportState) && states > 0 {
                    call.index = random.below(states) as u32;
                }
                call.add_parameter(world, false, random);
                call.add("fp32", Role::Fp32, layout.accumulator.bytes, 4);
                let fp32 = call.slots.last_mut().expect("just added");
                fp32.written = matches!(op, Op::ExportWeight | Op::ExportState);
                call.fill_floats(Role::Fp32, random);
                for slot in &mut call.slots {
                    slot.written = (slot.role == Role::Fp32)
                        == matches!(op, Op::ExportWeight | Op::ExportState);
                }
            }
        }
        call
    }

    fn add(&mut self, name: &str, role: Role, needed: u64, element: usize) {
        let memory = Guarded::new(needed as usize);
        self.slots.push(Slot {
            role,
            name: name.to_string(),
            ptr: memory.ptr(),
            bytes: needed,
            needed,
            element,
            written: true,
            required: true,
            exists: true,
            memory: self.memories.len(),
        });
        self.memories.push(memory);
    }

    fn add_backward(&mut self, world: &World, random: &mut Random) {
        let ranks = world.ranks() as u64;
        let mut tokens = few_or_many(random, 12, 300);
        let share = |split: bool, tokens: u64| if split { tokens / ranks } else { tokens };
        if world.config.sequence_parallel == 1 {
            tokens = tokens / ranks * ranks;
        }
        let dy_rows = share(world.gathers_dy(), tokens);
        let x_rows = share(world.gathers_x(), tokens);
        self.add_factors(world, 0, tokens, [dy_rows, x_rows], random);
        if random.percent(75) {
            self.add_dx(world, x_rows, false);
        }
        if random.percent(50) {
            let element = world.element();
            self.add("dbias", Role::Dbias, world.layout.out_local * element as u64, element);
            self.slots.last_mut().expect("just added").required = false;
        }
        let needed = workspace_bytes(world, tokens);
        if needed > 0 {
            self.add("workspace", Role::Workspace, needed, world.element());
        }
        match self.mode {
            0 => {
                if random.percent(30) {
                    self.add_accumulator(world, false, random);
                }
                self.add_parameter(world, false, random);
            }
            mode => {
                if mode == 1 {
                    self.add_accumulator(world, true, random);
                }
                if self.slot(Role::Dx).is_some() {
                    self.add_parameter(world, true, random);
                }
            }
        }
    }

    /// dY and X of a micro-batch, of halves: sums of their products are exact in fp32.
    fn add_factors(
        &mut self,
        world: &World,
        k: usize,
        tokens: u64,
        rows: [u64; 2],
        random: &mut Random,
    ) {
        let (element, dtype) = (world.element(), world.config.factor_dtype);
        let segment = |name: &str| match self.op {
            Op::Backward | Op::Dgrad => name.to_string(),
            _ => format!("segments[{k}].{name}"),
        };
        let columns = [world.layout.out_local, world.layout.in_local];
        let gathered = [world.gathers_dy(), world.gathers_x()];
        let names = [segment("dy"), segment("x")];
        let mut strides = [0; 2];
        for f in 0..2 {
            let whole = self.op == Op::Backward && gathered[f];
            if random.percent(50) {
                let padding = if whole { 0 } else { random.below(4) as u64 };
                strides[f] = columns[f] + padding;
            }
            let stride = if strides[f] == 0 { columns[f] } else { strides[f] };
            let elements = if rows[f] == 0 { 0 } else { (rows[f] - 1) * stride + columns[f] };
            let role = if f == 0 { Role::Dy(k) } else { Role::X(k) };
            self.add(&names[f], role, elements * element as u64, element);
            let slot = self.slots.last_mut().expect("just added");
            slot.written = false;
            slot.required = rows[f] > 0;
            if rows[f] == 0 && random.percent(50) {
                slot.ptr = null_mut();
            }
            let memory = &self.memories[slot.memory];
            for i in 0..elements as usize {
                store(dtype, memory, i, random.fraction(4, 2.0));
            }
            if elements > 0 && random.percent(2) {
                let value = random.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
                store(dtype, memory, random.below(elements as usize), value);
                self.finite = false;
            }
        }
        let [dy_rows, x_rows] = rows;
        let [dy_stride, x_stride] = strides;
        self.batches.push(Batch { tokens, dy_stride, x_stride, dy_rows, x_rows });
    }

    fn add_dx(&mut self, world: &World, rows: u64, required: bool) {
        let element = world.element();
        self.add("dx", Role::Dx, rows * world.layout.in_local * element as u64, element);
        self.slots.last_mut().expect("just added").required = required;
    }

    fn add_accumulator(&mut self, world: &World, written: bool, random: &mut Random) {
        // Without segments it is the gradient, and may be of the factors' type.
        let whole = matches!(self.op, Op::Update | Op::Norm | Op::NormAsync)
            && self.batches.is_empty()
            && !self.empty_segment;
        let element = if whole && random.percent(50) { world.element() } else { 4 };
        let elements = world.layout.accumulator.bytes / 4;
        self.add("accumulator", Role::Accumulator, elements * element as u64, element);
        let slot = self.slots.last_mut().expect("just added");
        slot.written = written;
        slot.required = written;
        if element == 4 {
            self.fill_floats(Role::Accumulator, random);
        } else {
            let memory = &self.memories[slot.memory];
            for i in 0..elements as usize {
                store(world.config.factor_dtype, memory, i, random.fraction(4, 2.0));
            }
        }
    }

    fn fill_floats(&mut self, role: Role, random: &mut Random) {
        let memory = &self.memories[self.slot(role).expect("was added").memory];
        for i in 0..memory.bytes() / 4 {
            store(1, memory, i, random.fraction(16, 4.0));
        }
    }

    /// The arrays of the parameter; `weight_only` where the call reads nothing else.
    fn add_parameter(&mut self, world: &World, weight_only: bool, random: &mut Random) {
        let layout = &world.layout;
        let mut arrays = vec![("parameter.weight".to_string(), Role::Weight, layout.weight)];
        if !weight_only {
            let name = "parameter.weight_extra".to_string();
            arrays.push((name, Role::Extra, layout.weight_extra));
            for k in 0..3 {
                let name = format!("parameter.states[{k}]");
                arrays.push((name, Role::State(k), layout.states[k]));
                let name = format!("parameter.scales[{k}]");
                arrays.push((name, Role::Scale(k), layout.scales[k]));
            }
        }
        for (name, role, array) in arrays {
            let element = array.alignment as usize;
            self.add(&name, role, array.bytes, element);
            let slot = self.slots.last_mut().expect("just added");
            slot.written = !weight_only;
            slot.exists = array.bytes > 0;
            slot.required = slot.exists;
            if !slot.exists {
                slot.ptr = null_mut();
            }
        }
        // Multiples of 1/64 up to 2 are bf16 numbers, so that every format holds them exactly; lower
        // halves are then zero. q8 states start as zeros, as the header asks.
        for i in 0..(layout.out_local * layout.in_local) as usize {
            let value = random.fraction(128, 64.0);
            let memory = |role| self.slot(role).map(|s: &Slot| &self.memories[s.memory]);
            store(layout.weight.dtype, memory(Role::Weight).expect("added"), i, value);
            if weight_only {
                continue;
            }
            if layout.weight_extra.dtype == 1 {
                store(1, memory(Role::Extra).expect("added"), i, value);
            }
            for k in 0..3 {
                // The second moment of Adam is not negative.
                let value = random.fraction(8, 16.0);
                let value = if k == 1 { value.abs() } else { value };
                if matches!(layout.states[k].dtype, 1 | 2) {
                    store(layout.states[k].dtype, memory(Role::State(k)).expect("added"), i, value);
                }
            }
        }
    }
}

/// Bytes of workspace, computed from the header's words: the gathered factor, rounded up to 256, and
/// for column parallel with SP the dX that is reduce-scattered.
fn workspace_bytes(world: &World, tokens: u64) -> u64 {
    let (layout, element) = (&world.layout, world.element() as u64);
    if world.gathers_x() {
        let bytes = tokens * layout.in_local * element;
        bytes.next_multiple_of(256) + bytes
    } else if world.gathers_dy() {
        (tokens * layout.out_local * element).next_multiple_of(256)
    } else {
        0
    }
}

fn hyper_is(world: &World, k: usize, name: &CStr) -> bool {
    // SAFETY: a name of the library's, which lives as long as it.
    unsafe { CStr::from_ptr(world.rule.hyper_names[k]) == name }
}

fn random_scalars(world: &World, random: &mut Random) -> forge_step_scalars {
    // Garbage beyond the rule's own hyper-parameters must not matter.
    let mut hyper = [f64::NAN; 16];
    for (k, value) in hyper.iter_mut().enumerate().take(world.rule.n_hyper as usize) {
        *value = match (world.rule_name(), k) {
            (_, 0) => random.pick(&[0.0, 1e-3, 0.1]),
            (_, 1) => random.pick(&[0.0, 0.01]),
            _ if hyper_is(world, k, c"eps") => random.pick(&[1e-8, 1e-3]),
            _ if hyper_is(world, k, c"eta_plus") => random.pick(&[1.0, 1.2]),
            _ => random.pick(&[0.0, 0.5, 0.9]),
        };
    }
    forge_step_scalars {
        step: random.pick(&[1, 2, 3, 1000, u64::from(u32::MAX)]),
        seed: random.next(),
        grad_scale: random.pick(&[1.0, 0.5, -0.25, 0.0]),
        hyper,
    }
}
