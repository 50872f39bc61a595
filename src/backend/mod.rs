//! Where tiles are computed. One trait; the CPU's thread pool implements it, and an NVIDIA GPU.
//! A backend knows shapes, formats and rules; it knows no layer, no schedule and no ranks.

pub mod cpu;
pub mod cuda;
pub mod warm;

use crate::error::Result;
use crate::format::{Dtype, Rounding, StateFormat, StateKind, WeightFormat};
use crate::philox::Noise;
use crate::rule::{Constants, ErasedRule, MAX_STATES, MAXIMIZE, StepScalars};
use cuda::driver::Device;
use std::ffi::c_void;
use std::sync::Arc;
use warm::{Tell, Warmed, Work};

/// A row-major matrix whose rows are `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// First element.
    pub data: *const u8,
    /// Elements from one row to the next.
    pub stride: usize,
}

impl Matrix {
    /// The same rows from this column on.
    pub fn skip_columns(self, columns: usize, dtype: Dtype) -> Self {
        Self { data: self.data.wrapping_add(columns * dtype.bytes()), stride: self.stride }
    }
}

// SAFETY: memory that the C caller keeps alive and unchanged during the call; the backend only reads
// through it.
unsafe impl Send for Matrix {}
// SAFETY: as above.
unsafe impl Sync for Matrix {}

/// The factors of one micro-batch, as this rank's shard of W needs them:
/// dY `[tokens, rows]` and X `[tokens, cols]`.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    /// The gradient of the layer's output.
    pub dy: Matrix,
    /// The layer's input.
    pub x: Matrix,
    /// Rows of both.
    pub tokens: usize,
}

/// The arrays of one parameter's shard. Unused ones are null.
#[derive(Clone, Copy, Debug)]
pub struct Arrays {
    /// Model weight `[rows, cols]`.
    pub weight: *mut u8,
    /// Master or lower halves `[rows, cols]`.
    pub extra: *mut u8,
    /// States `[rows, cols]`.
    pub states: [*mut u8; MAX_STATES],
    /// q8 scales `[ceil(cols/128), rows]`.
    pub scales: [*mut f32; MAX_STATES],
}

impl Arrays {
    /// No array at all.
    pub const NONE: Self = {
        let null = std::ptr::null_mut();
        let scales = [std::ptr::null_mut(); MAX_STATES];
        Self { weight: null, extra: null, states: [null; MAX_STATES], scales }
    };
}

// SAFETY: tiles are disjoint, so threads never touch the same element or the same scale.
unsafe impl Send for Arrays {}
// SAFETY: as above.
unsafe impl Sync for Arrays {}

/// A buffer `[rows, cols]` that is added to dW, or that dW is added to: fp32. Where there are no factors, so that
/// it is all of the gradient, it may also be of the factors' type.
#[derive(Clone, Copy, Debug)]
pub struct Accumulator {
    data: *mut u8,
    dtype: Dtype,
}

// SAFETY: as `Arrays`.
unsafe impl Send for Accumulator {}
// SAFETY: as `Arrays`.
unsafe impl Sync for Accumulator {}

impl Accumulator {
    /// Of fp32.
    pub fn fp32(data: *mut f32) -> Self {
        Self { data: data.cast(), dtype: Dtype::F32 }
    }

    /// A gradient that is only read.
    pub fn gradient(data: *const u8, dtype: Dtype) -> Self {
        Self { data: data.cast_mut(), dtype }
    }

    /// First element of one of fp32. A method, so that closures capture the whole (shareable) value.
    pub fn get(self) -> *mut f32 {
        debug_assert_eq!(self.dtype, Dtype::F32, "only what has factors is asked");
        self.data.cast()
    }

    /// First element, of any type.
    pub fn data(self) -> *mut u8 {
        self.data
    }

    /// Of its elements.
    pub fn dtype(self) -> Dtype {
        self.dtype
    }
}

/// This rank's shard of W.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Rows (out features) here.
    pub rows: usize,
    /// Columns (in features) here.
    pub cols: usize,
    /// Global index of the first row.
    pub row_offset: u64,
    /// Global index of the first column.
    pub col_offset: u64,
    /// Columns of the whole W: the stride of the global element index.
    pub global_cols: u64,
}

impl Shard {
    /// Index in the whole W of an element of this shard.
    #[inline(always)]
    pub fn global_index(&self, row: usize, col: usize) -> u64 {
        (self.row_offset + row as u64) * self.global_cols + self.col_offset + col as u64
    }
}

/// How a GPU multiplies fp32 factors. The CPU's products are exact either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fp32Products {
    /// By fp32 fma, one accumulator for each element: the CPU's bits.
    Exact,
    /// By tensor cores, of factors that are split into two bf16 each; what is left out of a product is at
    /// most 3·2⁻¹⁶ of it.
    Bf16x3,
}

/// How a parameter is stored and updated: what a kernel is specialised for.
#[derive(Clone, Copy)]
pub struct Scheme {
    /// The optimizer's rule.
    pub rule: &'static dyn ErasedRule,
    /// Its flags.
    pub flags: u32,
    /// States it has with these flags.
    pub n_states: usize,
    /// Of the weight.
    pub weight_format: WeightFormat,
    /// Of a bf16 weight.
    pub weight_rounding: Rounding,
    /// Of each state.
    pub state_formats: [StateFormat; MAX_STATES],
    /// Of bf16 and q8 states.
    pub state_rounding: Rounding,
    /// Of X, dY and dX.
    pub factor_dtype: Dtype,
    /// Of fp32 factors.
    pub fp32_products: Fp32Products,
    /// Philox key of the parameter.
    pub parameter_id: u32,
}

impl Scheme {
    /// Whether every backend gives the same bits.
    pub fn is_exact(&self) -> bool {
        self.factor_dtype == Dtype::F32 && self.fp32_products == Fp32Products::Exact
    }

    /// What 8-bit codes may assume of state `k`.
    pub fn state_kind(&self, k: usize) -> StateKind {
        self.rule.states(self.flags)[k].kind
    }
}

/// The scalars of a step, in the form the tiles use.
#[derive(Clone, Copy)]
pub struct Step {
    /// Of the rule.
    pub constants: Constants,
    /// Multiplies dW; carries the sign of `maximize`.
    pub grad_scale: f32,
    /// Of stochastic rounding.
    pub noise: Noise,
    /// What the constants were computed from: a user's function gets it, and a GPU's prologue.
    pub scalars: StepScalars,
}

impl Step {
    /// Computes the constants of a step for a scheme.
    pub fn new(scheme: &Scheme, scalars: &StepScalars) -> Self {
        let scale = scalars.grad_scale as f32;
        Self {
            constants: scheme.rule.constants(scalars, scheme.flags),
            grad_scale: if scheme.flags & MAXIMIZE != 0 { -scale } else { scale },
            noise: Noise::new(scalars.seed, scheme.parameter_id, scalars.step),
            scalars: *scalars,
        }
    }
}

/// The scalars of a step, or where the backend finds them when the work runs.
#[derive(Clone, Copy)]
// One for each call, on the stack.
#[allow(clippy::large_enum_variant)]
pub enum StepSource {
    /// Known now.
    Value(Step),
    /// A `forge_step_scalars` in the backend's memory.
    Device(*const c_void),
}

impl StepSource {
    /// Scalars that are known now.
    pub fn new(scheme: &Scheme, scalars: &StepScalars) -> Self {
        Self::Value(Step::new(scheme, scalars))
    }
}

/// The order of work on a device: a `CUstream`, or NULL. The CPU has one order only.
#[derive(Clone, Copy, Debug)]
pub struct Stream(pub *mut c_void);

impl Stream {
    /// The CPU's only one; CUDA's default stream.
    pub const NULL: Self = Self(std::ptr::null_mut());
}

/// Where a call's result is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Deliver {
    /// Returned by the call, which a device must wait for.
    pub host: bool,
    /// A struct of the C ABI in the backend's memory, written when the work runs; NULL: nowhere. For a
    /// backend whose memory is the host's the caller writes it from what the call returns.
    pub device: *mut c_void,
}

impl Deliver {
    /// To the caller alone.
    pub const HOST: Self = Self { host: true, device: std::ptr::null_mut() };
}

/// One of several updates that are asked for together.
#[derive(Clone, Copy)]
pub struct GroupEntry<'a> {
    /// How the parameter is stored and updated.
    pub scheme: &'a Scheme,
    /// Its shard.
    pub shard: &'a Shard,
    /// Its factors.
    pub factors: &'a [Factors],
    /// A buffer that is added to dW.
    pub accumulator: Option<Accumulator>,
    /// Its weight and states.
    pub arrays: &'a Arrays,
    /// Scalars.
    pub step: &'a StepSource,
    /// As [`Deliver::device`].
    pub device_report: *mut c_void,
}

/// What an update did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Tiles of the shard.
    pub tiles: u64,
    /// Tiles left as they were because their gradient was not finite.
    pub nonfinite_tiles: u64,
    /// Σ dW² of this shard, before `grad_scale`.
    pub sum_of_squares: f64,
}

/// How a norm is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormMethod {
    /// The cheaper one that is accurate.
    Auto,
    /// `‖dYᵀX‖² = Σ (XXᵀ)∘(dYdYᵀ)`.
    Gram,
    /// Squares of tiles that are then discarded.
    Tiles,
}

/// A norm without a gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// The method that gave it.
    pub method: NormMethod,
    /// Σ dW² of this shard; not finite where dW is not.
    pub sum_of_squares: f64,
}

/// A parameter's array as an fp32 image, for checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// The master weight.
    Weight,
    /// The state of this index.
    State(usize),
}

/// Tiles on a device. All sizes and pointers were checked by the caller.
///
/// Work is enqueued on the stream and done in its order; on the CPU it is done when a call returns.
pub trait Backend: Send + Sync {
    /// Refuses what this backend cannot run: a user's rule that lacks the half it needs, or that does not
    /// compile. Asked once for each linear, before it exists.
    fn check_scheme(&self, scheme: &Scheme) -> Result<()>;

    /// Refuses streams that are not this backend's.
    fn check_stream(&self, stream: Stream) -> Result<()>;

    /// Bytes that pointers must be aligned to, for arrays of this element size.
    fn alignment(&self, element_bytes: usize) -> usize;

    /// Whether the host can read and write this backend's memory.
    fn memory_is_host(&self) -> bool;

    /// The GPU, where it is one.
    fn device(&self) -> Option<Arc<Device>> {
        None
    }

    /// Refuses memory that this backend cannot reach.
    fn check_memory(&self, name: &str, data: *const u8) -> Result<()> {
        let _ = (name, data);
        Ok(())
    }

    /// Makes ready what these calls need, so that the first of them does not wait for it. A backend that
    /// has nothing to compile has nothing to do.
    fn warm(&self, work: &Work, threads: usize, tell: &mut Tell) -> Result<Warmed> {
        let _ = (work, threads, tell);
        Ok(Warmed::default())
    }

    /// Bytes that [`Backend::set_workspace`] wants.
    fn workspace_bytes(&self) -> u64 {
        0
    }

    /// Lends the backend memory of its own device, until it is replaced or the backend is dropped.
    ///
    /// # Safety
    /// The memory stays valid that long, and nothing else uses it.
    unsafe fn set_workspace(&self, data: *mut u8, bytes: u64) -> Result<()> {
        let _ = (data, bytes);
        Ok(())
    }

    /// For each tile: `g = Σ dYᵀX (+ accumulator)` in scratch, then the rule. The report is returned
    /// if `deliver.host` says so.
    ///
    /// # Safety
    /// All pointers are valid for the shard and the factors' tokens, and nothing else touches the
    /// written ones until the work is done.
    unsafe fn update(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        arrays: &Arrays,
        step: &StepSource,
        deliver: Deliver,
        stream: Stream,
    ) -> Result<Option<Report>>;

    /// The updates of several parameters, which share nothing that is written: in any order, or at once.
    /// Reports as of an update that the host does not wait for.
    ///
    /// # Safety
    /// As [`Backend::update`], of each.
    unsafe fn update_group(
        &self,
        entries: &[GroupEntry],
        stream: Stream,
    ) -> Result<Vec<Option<Report>>> {
        let one = |e: &GroupEntry| {
            let deliver = Deliver { host: false, device: e.device_report };
            let (accumulator, arrays, step) = (e.accumulator, e.arrays, e.step);
            // SAFETY: as promised by the caller.
            unsafe {
                self.update(
                    e.scheme,
                    e.shard,
                    e.factors,
                    accumulator,
                    arrays,
                    step,
                    deliver,
                    stream,
                )
            }
        };
        entries.iter().map(one).collect()
    }

    /// `accumulator += Σ dYᵀX`.
    ///
    /// # Safety
    /// As [`Backend::update`].
    unsafe fn accumulate(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Accumulator,
        stream: Stream,
    ) -> Result<()>;

    /// `‖Σ dYᵀX (+ accumulator)‖²`, without it; returned if `deliver.host` says so.
    ///
    /// # Safety
    /// As [`Backend::update`].
    unsafe fn norm(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        method: NormMethod,
        deliver: Deliver,
        stream: Stream,
    ) -> Result<Option<Norm>>;

    /// `dX = dY · W`, of the model weight; dX `[tokens, cols]` contiguous.
    ///
    /// # Safety
    /// As [`Backend::update`].
    unsafe fn dgrad(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        tokens: usize,
        dy: Matrix,
        weight: *const u8,
        dx: *mut u8,
        stream: Stream,
    ) -> Result<()>;

    /// `dbias[o] = Σ_t dY[t,o]`.
    ///
    /// # Safety
    /// As [`Backend::update`].
    unsafe fn bias_grad(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        tokens: usize,
        dy: Matrix,
        dbias: *mut u8,
        stream: Stream,
    ) -> Result<()>;

    /// `to [rows, cols]`, contiguous, = a matrix of as many elements of `dtype`.
    ///
    /// # Safety
    /// As [`Backend::update`]; both are in this backend's memory.
    unsafe fn copy(
        &self,
        from: Matrix,
        size: (usize, usize),
        dtype: Dtype,
        to: *mut u8,
        stream: Stream,
    ) -> Result<()>;

    /// Writes zeros.
    ///
    /// # Safety
    /// As [`Backend::update`].
    unsafe fn zero(&self, to: *mut u8, bytes: usize, stream: Stream) -> Result<()>;

    /// Writes an array as fp32 `[rows, cols]`.
    ///
    /// # Safety
    /// As [`Backend::update`].
    unsafe fn export(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        arrays: &Arrays,
        image: Image,
        out: *mut f32,
        stream: Stream,
    ) -> Result<()>;

    /// Reads an array from fp32 `[rows, cols]`, rounding to nearest.
    ///
    /// # Safety
    /// As [`Backend::update`].
    unsafe fn import(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        arrays: &Arrays,
        image: Image,
        values: *const f32,
        stream: Stream,
    ) -> Result<()>;
}
