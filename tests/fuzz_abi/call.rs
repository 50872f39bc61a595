//! One call that moves data, as a description that can be spoiled before it is made.

use super::memory::Guarded;
use super::world::{World, sized};
use forge::error::forge_status;
use forge::ffi::linear::forge_linear;
use forge::ffi::run::*;
use forge::ffi::types::*;
use forge::ffi::update_group::forge_linear_update_group;
use std::ptr::{null, null_mut};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Backward,
    Dgrad,
    Update,
    Accumulate,
    Norm,
    NormAsync,
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
    Op::NormAsync,
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
    /// Report or norm: in the first two memories.
    pub report: Arg,
    pub out: Arg,
    /// In the third memory; NULL where none is wanted.
    pub device_report: Pointer,
    /// Of a backward that keeps factors: in the second memory.
    pub device_norm: Pointer,
    /// Whether all inputs are finite.
    pub finite: bool,
}

/// Indices of the memories of the report, the norm, and the report for the device.
const REPORT: usize = 0;
const OUT: usize = 1;
const DEVICE_REPORT: usize = 2;

impl Call {
    /// Whether it reads a step.
    pub fn updates(&self) -> bool {
        matches!(self.op, Op::Update | Op::CheckStep) || (self.op == Op::Backward && self.mode == 0)
    }

    pub fn has_segments(&self) -> bool {
        matches!(self.op, Op::Update | Op::Accumulate | Op::Norm | Op::NormAsync)
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

    /// What an update has left in the backend's memory, where it was asked to.
    pub fn device_report_value(&self) -> Option<forge_report> {
        let wanted = self.device_report == Pointer::Good && self.updates();
        wanted.then(|| self.memories[DEVICE_REPORT].read())
    }

    /// Whether it keeps factors and leaves their norm.
    pub fn keeps_norm(&self) -> bool {
        self.op == Op::Backward && self.mode == 2 && self.device_norm == Pointer::Good
    }

    pub fn norm_value(&self) -> forge_norm {
        self.memories[OUT].read()
    }

    /// Memories that a successful call may write.
    pub fn may_write(&self, memory: usize) -> bool {
        match memory {
            REPORT => matches!(self.op, Op::Backward | Op::Update),
            OUT => matches!(self.op, Op::Norm | Op::NormAsync) || self.keeps_norm(),
            DEVICE_REPORT => self.updates() && self.op != Op::CheckStep,
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
        let at_norm = self.memories[OUT].ptr().cast::<forge_norm>().cast_const();
        let out = self.out.pointer.of(at_norm).cast_mut();
        let device_report = self.memories[DEVICE_REPORT].ptr().cast::<forge_report>();
        let device_report = self.device_report.of(device_report.cast_const()).cast_mut();
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
                    backward.device_report = device_report;
                    backward.device_norm = self.device_norm.of(at_norm).cast_mut();
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
                    update.device_report = device_report;
                    let update = self.main.pointer.of(&update);
                    // A group of one, where no report on the host is wanted.
                    if self.report.pointer == Pointer::Null {
                        forge_linear_update_group(&linear, &update, 1, stream)
                    } else {
                        forge_linear_update(linear, update, report, stream)
                    }
                }
                Op::Accumulate => {
                    let accumulator = self.mutable(Role::Accumulator);
                    forge_linear_accumulate(linear, segments, n_segments, accumulator, stream)
                }
                Op::Norm | Op::NormAsync => {
                    let accumulator = self.constant(Role::Accumulator);
                    let norm = if self.op == Op::Norm {
                        forge_linear_norm
                    } else {
                        forge_linear_norm_async
                    };
                    norm(linear, segments, n_segments, accumulator, self.method, out, stream)
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
