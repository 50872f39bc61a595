//! Where tiles are computed. One trait; the CPU's thread pool implements it here, CUDA comes beside
//! it. A backend knows shapes, formats and rules; it knows no layer, no schedule and no ranks.

pub mod cpu;

use crate::error::Result;
use crate::format::{Dtype, Rounding, StateFormat, WeightFormat};
use crate::philox::Noise;
use crate::rule::{Constants, ErasedRule, MAX_STATES, MAXIMIZE, StepScalars};

/// A row-major matrix whose rows are `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    /// First element.
    pub data: *const u8,
    /// Elements from one row to the next.
    pub stride: usize,
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

// SAFETY: tiles are disjoint, so threads never touch the same element or the same scale.
unsafe impl Send for Arrays {}
// SAFETY: as above.
unsafe impl Sync for Arrays {}

/// An optional fp32 buffer `[rows, cols]` that is added to dW.
#[derive(Clone, Copy, Debug)]
pub struct Accumulator(pub *mut f32);

// SAFETY: as `Arrays`.
unsafe impl Send for Accumulator {}
// SAFETY: as `Arrays`.
unsafe impl Sync for Accumulator {}

impl Accumulator {
    /// First element. A method, so that closures capture the whole (shareable) value.
    pub fn get(self) -> *mut f32 {
        self.0
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
    /// Philox key of the parameter.
    pub parameter_id: u32,
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
}

impl Step {
    /// Computes the constants of a step for a scheme.
    pub fn new(scheme: &Scheme, scalars: &StepScalars) -> Self {
        let scale = scalars.grad_scale as f32;
        Self {
            constants: scheme.rule.constants(scalars, scheme.flags),
            grad_scale: if scheme.flags & MAXIMIZE != 0 { -scale } else { scale },
            noise: Noise::new(scalars.seed, scheme.parameter_id, scalars.step),
        }
    }
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
pub trait Backend: Send + Sync {
    /// Refuses streams that are not this backend's.
    fn check_stream(&self, stream: *mut std::ffi::c_void) -> Result<()>;

    /// Bytes that pointers must be aligned to, for arrays of this element size.
    fn alignment(&self, element_bytes: usize) -> usize;

    /// For each tile: `g = Σ dYᵀX (+ accumulator)` in scratch, then the rule.
    ///
    /// # Safety
    /// All pointers are valid for the shard and the factors' tokens, and nothing else touches the
    /// written ones during the call.
    unsafe fn update(
        &self,
        scheme: &Scheme,
        shard: &Shard,
        factors: &[Factors],
        accumulator: Option<Accumulator>,
        arrays: &Arrays,
        step: &Step,
    ) -> Report;

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
    );

    /// `‖Σ dYᵀX (+ accumulator)‖²`, without it.
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
    ) -> Norm;

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
    );

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
    );

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
    );

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
    );
}
