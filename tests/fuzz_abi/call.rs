//! One call that moves data, as a description that can be spoiled before it is made.

use super::memory::{Guarded, Random};
use super::world::{World, sized};
use forge::error::forge_status;
use forge::ffi::linear::forge_linear;
use forge::ffi::run::*;
use forge::ffi::types::*;
use half::{bf16, f16};
use std::ptr::{null, null_mut};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Backward,
    Dgrad,
    Update,
    Accumulate,
    Norm,
    CheckStep,
    ExportWeight,
    ImportWeight,
    ExportState,
    ImportState,
}

pub const OPS: &[Op] = &[
    Op::Backward,
    Op::Backward,
    Op::Backward,
    Op::Dgrad,
    Op::Update,
    Op::Update,
    Op::Accumulate,
    Op::Norm,
    Op::CheckStep,
    Op::ExportWeight,
    Op::ImportWeight,
    Op::ExportState,
    Op::ImportState,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Dy(usize),
    X(usize),
    Dx,
    Dbias,
    Workspace,
    Accumulator,
    Weight,
    Extra,
    State(usize),
    Scale(usize),
    Fp32,
}

/// A buffer of the call: what is passed, and what would be right.
pub struct Slot {
    pub role: Role,
    pub name: String,
    pub ptr: *mut u8,
    pub bytes: u64,
    /// What shapes and formats need.
    pub needed: u64,
    /// Bytes of an element.
    pub element: usize,
    pub written: bool,
    /// Whether NULL is an error.
    pub required: bool,
    /// Whether the formats have such an array at all.
    pub exists: bool,
    /// Index of its memory.
    pub memory: usize,
}

impl Slot {
    /// Factors and workspaces may be larger than needed.
    pub fn exact(&self) -> bool {
        !matches!(self.role, Role::Dy(_) | Role::X(_) | Role::Workspace)
    }

    pub fn is_factor(&self) -> bool {
        matches!(self.role, Role::Dy(_) | Role::X(_))
    }
}

/// Tokens and strides of one micro-batch.
#[derive(Clone, Copy)]
pub struct Batch {
    pub tokens: u64,
    pub dy_stride: u64,
    pub x_stride: u64,
    pub dy_rows: u64,
    pub x_rows: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pointer {
    Good,
    Null,
    Misaligned,
}

impl Pointer {
    pub fn of<T>(self, value: *const T) -> *const T {
        match self {
            Pointer::Good => value,
            Pointer::Null => null(),
            Pointer::Misaligned => value.wrapping_byte_add(1),
        }
    }
}

/// A struct argument: its pointer and its size can be wrong.
#[derive(Clone, Copy)]
pub struct Arg {
    pub pointer: Pointer,
    pub size: Option<u32>,
}

const GOOD: Arg = Arg { pointer: Pointer::Good, size: None };

pub struct Call {
    pub op: Op,
    pub linear: Pointer,
    pub batches: Vec<Batch>,
    /// A segment too many, without data.
    pub empty_segment: bool,
    pub segments: Pointer,
    pub slots: Vec<Slot>,
    pub memories: Vec<Guarded>,
    pub mode: u32,
    pub method: u32,
    pub index: u32,
    pub stream: usize,
    pub scalars: forge_step_scalars,
    pub device_scalars: bool,
    pub device_pointer: Pointer,
    /// forge_backward or forge_update.
    pub main: Arg,
    pub parameter: Arg,
    pub step: Arg,
    /// Report or norm: in memory 0 and 1.
    pub report: Arg,
    pub out: Arg,
    /// Whether all inputs are finite.
    pub finite: bool,
}

const REPORT: usize = 0;
const OUT: usize = 1;

/// Tokens: mostly few, now and then more than the CPU backend sums in one go.
fn few_or_many(random: &mut Random, few: usize, many: usize) -> u64 {
    let most = if random.percent(3) { many } else { few };
    random.below(most) as u64
}

/// Writes element `i` of an array of `dtype`.
pub fn store(dtype: u32, memory: &Guarded, i: usize, value: f32) {
    let bytes = match dtype {
        1 => value.to_ne_bytes().to_vec(),
        2 => bf16::from_f32(value).to_ne_bytes().to_vec(),
        3 => f16::from_f32(value).to_ne_bytes().to_vec(),
        _ => unreachable!("floats only"),
    };
    assert!((i + 1) * bytes.len() <= memory.bytes());
    // SAFETY: within the payload.
    unsafe { memory.ptr().add(i * bytes.len()).copy_from(bytes.as_ptr(), bytes.len()) };
}

/// Reads element `i` of an array of `dtype`.
pub fn load(dtype: u32, payload: &[u8], i: usize) -> f64 {
    let at = |n: usize| &payload[i * n..(i + 1) * n];
    match dtype {
        1 => f64::from(f32::from_ne_bytes(at(4).try_into().unwrap())),
        2 => f64::from(bf16::from_ne_bytes(at(2).try_into().unwrap())),
        3 => f64::from(f16::from_ne_bytes(at(2).try_into().unwrap())),
        _ => unreachable!("floats only"),
    }
}

impl Call {
    /// Whether it reads a step.
    pub fn updates(&self) -> bool {
        matches!(self.op, Op::Update | Op::CheckStep) || (self.op == Op::Backward && self.mode == 0)
    }

    pub fn has_segments(&self) -> bool {
        matches!(self.op, Op::Update | Op::Accumulate | Op::Norm)
    }

    pub fn is_image(&self) -> bool {
        use Op::*;
        matches!(self.op, ExportWeight | ImportWeight | ExportState | ImportState)
    }

    pub fn uses_parameter(&self) -> bool {
        self.slot(Role::Weight).is_some()
    }

    pub fn slot(&self, role: Role) -> Option<&Slot> {
        self.slots.iter().find(|s| s.role == role)
    }

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
            Op::Update | Op::Accumulate | Op::Norm => {
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
        self.add("accumulator", Role::Accumulator, world.layout.accumulator.bytes, 4);
        let slot = self.slots.last_mut().expect("just added");
        slot.written = written;
        slot.required = written;
        self.fill_floats(Role::Accumulator, random);
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

    fn mutable(&self, role: Role) -> forge_buffer {
        self.slot(role).map_or(forge_buffer { data: null_mut(), bytes: 0 }, |s| forge_buffer {
            data: s.ptr.cast(),
            bytes: s.bytes,
        })
    }

    fn constant(&self, role: Role) -> forge_const_buffer {
        let forge_buffer { data, bytes } = self.mutable(role);
        forge_const_buffer { data, bytes }
    }

    /// Prepares what must be in memory before the snapshot.
    pub fn prepare(&mut self) {
        for (memory, arg, size) in [
            (REPORT, self.report, size_of::<forge_report>()),
            (OUT, self.out, size_of::<forge_norm>()),
        ] {
            // SAFETY: the first field of the struct in that memory.
            unsafe {
                self.memories[memory].ptr().cast::<u32>().write(arg.size.unwrap_or(size as u32))
            };
        }
    }

    pub fn report_value(&self) -> Option<forge_report> {
        (self.report.pointer == Pointer::Good).then(|| self.memories[REPORT].read())
    }

    pub fn norm_value(&self) -> forge_norm {
        self.memories[OUT].read()
    }

    /// Memories that a successful call may write.
    pub fn may_write(&self, memory: usize) -> bool {
        match memory {
            REPORT => matches!(self.op, Op::Backward | Op::Update),
            OUT => self.op == Op::Norm,
            _ => self.slots.iter().any(|s| s.memory == memory && s.written),
        }
    }

    /// Makes the call.
    pub fn make(&self, world: &World) -> forge_status {
        let mut parameter = sized::<forge_parameter>();
        parameter.struct_size = self.parameter.size.unwrap_or(parameter.struct_size);
        parameter.weight = self.mutable(Role::Weight);
        parameter.weight_extra = self.mutable(Role::Extra);
        for k in 0..3 {
            parameter.states[k] = self.mutable(Role::State(k));
            parameter.scales[k] = self.mutable(Role::Scale(k));
        }
        let scalars = self.scalars;
        let mut step = sized::<forge_step>();
        step.struct_size = self.step.size.unwrap_or(step.struct_size);
        if self.device_scalars {
            step.device_scalars = self.device_pointer.of(&scalars);
        } else {
            step.scalars = scalars;
        }
        let mut segments: Vec<forge_segment> = Vec::new();
        for (k, b) in self.batches.iter().enumerate() {
            segments.push(forge_segment {
                dy: self.constant(Role::Dy(k)),
                x: self.constant(Role::X(k)),
                tokens: b.tokens,
                dy_stride: b.dy_stride,
                x_stride: b.x_stride,
            });
        }
        if self.empty_segment {
            // SAFETY: a C struct of numbers and pointers.
            segments.push(unsafe { std::mem::zeroed() });
            segments.last_mut().expect("just added").tokens = 1;
        }
        let n_segments = segments.len() as u32;
        let segments = self.segments.of(segments.as_ptr());

        let linear: *mut forge_linear = self.linear.of(world.linear.cast_const()).cast_mut();
        let parameter = self.parameter.pointer.of(&parameter);
        let step = self.step.pointer.of(&step);
        let report = self.report.pointer.of(self.memories[REPORT].ptr().cast::<forge_report>());
        let report = report.cast_mut();
        let out = self.out.pointer.of(self.memories[OUT].ptr().cast::<forge_norm>()).cast_mut();
        let stream = std::ptr::without_provenance_mut(self.stream);
        // SAFETY: what is passed is what the ABI asks for, or wrong in a way that it must notice
        // before it looks at memory; that is the test.
        unsafe {
            match self.op {
                Op::Backward => {
                    let b = self.batches[0];
                    let mut backward = sized::<forge_backward>();
                    backward.struct_size = self.main.size.unwrap_or(backward.struct_size);
                    backward.mode = self.mode;
                    backward.tokens = b.tokens;
                    backward.dy = self.constant(Role::Dy(0));
                    backward.x = self.constant(Role::X(0));
                    backward.dy_stride = b.dy_stride;
                    backward.x_stride = b.x_stride;
                    backward.dx = self.mutable(Role::Dx);
                    backward.dbias = self.mutable(Role::Dbias);
                    backward.workspace = self.mutable(Role::Workspace);
                    backward.accumulator = self.mutable(Role::Accumulator);
                    backward.parameter = if self.uses_parameter() { parameter } else { null() };
                    backward.step = if self.updates() { step } else { null() };
                    let backward = self.main.pointer.of(&backward);
                    forge_linear_backward(linear, backward, report, stream)
                }
                Op::Dgrad => {
                    let b = self.batches[0];
                    let (dy, dx) = (self.constant(Role::Dy(0)), self.mutable(Role::Dx));
                    forge_linear_dgrad(linear, b.tokens, dy, b.dy_stride, parameter, dx, stream)
                }
                Op::Update => {
                    let mut update = sized::<forge_update>();
                    update.struct_size = self.main.size.unwrap_or(update.struct_size);
                    update.n_segments = n_segments;
                    update.segments = segments;
                    update.accumulator = self.constant(Role::Accumulator);
                    update.parameter = parameter;
                    update.step = step;
                    forge_linear_update(linear, self.main.pointer.of(&update), report, stream)
                }
                Op::Accumulate => {
                    let accumulator = self.mutable(Role::Accumulator);
                    forge_linear_accumulate(linear, segments, n_segments, accumulator, stream)
                }
                Op::Norm => {
                    let accumulator = self.constant(Role::Accumulator);
                    let method = self.method;
                    forge_linear_norm(
                        linear,
                        segments,
                        n_segments,
                        accumulator,
                        method,
                        out,
                        stream,
                    )
                }
                Op::CheckStep => forge_linear_check_step(linear, step),
                Op::ExportWeight => {
                    forge_linear_export_weight(linear, parameter, self.mutable(Role::Fp32), stream)
                }
                Op::ImportWeight => {
                    forge_linear_import_weight(linear, parameter, self.constant(Role::Fp32), stream)
                }
                Op::ExportState => {
                    let fp32 = self.mutable(Role::Fp32);
                    forge_linear_export_state(linear, parameter, self.index, fp32, stream)
                }
                Op::ImportState => {
                    let fp32 = self.constant(Role::Fp32);
                    forge_linear_import_state(linear, parameter, self.index, fp32, stream)
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

fn random_scalars(world: &World, random: &mut Random) -> forge_step_scalars {
    // Garbage beyond the rule's own hyper-parameters must not matter.
    let mut hyper = [f64::NAN; 16];
    for (k, value) in hyper.iter_mut().enumerate().take(world.rule.n_hyper as usize) {
        *value = match (world.rule_name(), k) {
            (_, 0) => random.pick(&[0.0, 1e-3, 0.1]),
            (_, 1) => random.pick(&[0.0, 0.01]),
            ("adam" | "adamw", 4) => random.pick(&[1e-8, 1e-3]),
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
